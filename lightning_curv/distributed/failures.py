"""An error in one process ends the others within seconds, with its name.

Without, they wait for it in the next collective, until the timeout of the process group: half an
hour in Lightning.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from contextlib import ContextDecorator, suppress
from datetime import timedelta
from typing import Any
from uuid import uuid4

from torch import distributed as dist

KEY = "lightning_curv/failed"  # in the store of the process group: who failed last, and why
PATIENCE = timedelta(seconds=1)  # between two looks at it
NOTHING = "-"  # there instead, when who has failed is back
LONGEST = 2000  # letters of an error
_AVAILABLE = dist.is_available()
_heard: set[str] = set()  # what has ended this process once
_told: list[str] = []  # by this process, and not taken back


class OtherProcessError(RuntimeError):
    """This process cannot go on, because another one has failed."""


def distributed() -> bool:
    """Whether this process belongs to a group of processes, be it the only one in it."""
    return _AVAILABLE and dist.is_initialized()


def processes() -> int:
    """The number of processes that share the batch; 1 where nothing is distributed."""
    return dist.get_world_size() if distributed() else 1


class telling(ContextDecorator):
    """Context: an error that leaves it is told to the other processes.

    It is a class, since a generator would take longer than what many steps do.

    Raises:
        OtherProcessError: instead of the error of a connection that the process at its other end
            has left with an error.

    Cost: nothing without an error.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            told(error)


def told(error: BaseException) -> None:
    """Tell the other processes of an error that is about to be raised, as `telling` does."""
    if isinstance(error, Exception):
        tell(error)
        failure = _failure_behind(error)
        if failure is not None:
            raise OtherProcessError(failure) from error


def tell(error: BaseException) -> None:
    """Leave an error in the store of the process group, unless it is one of another process."""
    # An error that another process has caused would overwrite what it told of the cause.
    known = isinstance(error, OtherProcessError) or _is_connection(error)
    if processes() == 1 or known or getattr(error, "_is_told", False):
        return
    error._is_told = True  # type: ignore[attr-defined]
    # The number tells it from the same error at another time.
    text = f"{dist.get_rank()}|{uuid4().hex}|{type(error).__name__}: {error}"[:LONGEST]
    # A store that is gone has no readers.
    with suppress(RuntimeError):
        _store().set(KEY, text)
        _told[:] = [text]


def explain(error: BaseException) -> None:
    """Warn of what another process has told, if that is behind an error of the communication."""
    failure = _failure_behind(error)
    if failure is not None:
        warnings.warn(failure, stacklevel=2)


def _failure_behind(error: BaseException) -> str | None:
    return found_failure() if processes() > 1 and _is_connection(error) else None


def found_failure() -> str | None:
    """What another process has told and this one has not heard yet, as a sentence; else None."""
    try:
        store = _store()
        if not store.check([KEY]):
            return None
        text = store.get(KEY).decode(errors="replace")
    except (RuntimeError, ValueError):  # the store is gone
        return None
    if text == NOTHING:
        return None
    rank, number, reason = text.split("|", 2)
    # What has been heard before belongs to an earlier error, from which all have recovered.
    if number in _heard or int(rank) == dist.get_rank():
        return None
    _heard.add(number)
    return (
        f"Expected process {rank} to take part in this step, found that it has failed and does "
        f"not go on: {reason} Mend what its message says; a process cannot train without the "
        "others."
    )


def together(collective: Callable[..., Any], *arguments: Any, **named: Any) -> None:
    """Run a collective of torch; it ends where another process has told of an error.

    Args:
        collective: such as `torch.distributed.all_reduce`; it waits for all processes.
        arguments: its tensors first.
        named: its other arguments.

    Raises:
        OtherProcessError: another process has failed and does not come.

    Cost: nothing if it takes less than a second, then a look at the store every second. On other
    devices than the CPU the host does not wait for a collective, and does not look.
    """
    has_recovered = _take_back()
    first = arguments[0][0] if isinstance(arguments[0], list) else arguments[0]
    if first.device.type != "cpu":
        collective(*arguments, **named)
        return
    # Not waited for at once: a process that has failed never comes, and nothing would tell.
    work = collective(*arguments, async_op=True, **named)
    # None: this process is not in the group.
    while work is not None:
        try:
            work.wait(PATIENCE)
            return
        except RuntimeError as error:
            # Who has recovered from an error of this step waits for others to do so, too.
            failure = None if has_recovered else found_failure()
            if failure is not None:
                raise OtherProcessError(failure) from error
            # Either the collective has failed, or a second has passed.
            if work.is_completed():
                raise


def _take_back() -> bool:
    """Who has told of an error and meets the others again has been saved; whether that is so."""
    if not _told:
        return False
    # Not deleted: who has just seen that it is there would wait for it until the timeout.
    with suppress(RuntimeError):
        _store().compare_set(KEY, _told[0], NOTHING)
    _told.clear()
    return True


def _is_connection(error: BaseException) -> bool:
    """Whether it is an error of the communication itself."""
    is_backend = isinstance(error, getattr(dist, "DistError", ()))
    return is_backend or bool(re.search(r"gloo|[Cc]onnection (closed|reset)", str(error)))


def _store() -> Any:
    """What all processes can write to and read from; a build of torch may lack it."""
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()
