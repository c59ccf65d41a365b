"""What loggers raise ends no run: a full disk, a folder that is read only, a logger of a test."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard

from lightning_utilities.core.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    from pytorch_lightning.loggers import Logger

GUARDED = ("log_metrics", "save", "finalize")


class Tolerance:
    """Warns once of what cannot be written, and goes on.

    Attributes:
        warned: whether there was anything.
    """

    def __init__(self) -> None:
        self.warned = False

    @contextmanager
    def tolerating(self) -> Iterator[None]:
        """What our own calls of a logger raise."""
        try:
            yield
        except Exception as error:
            self._warn(error)

    def guard(self, loggers: Iterable[Logger]) -> None:
        """What Lightning's calls of loggers raise, until it finalizes them.

        A file is shared: where TensorBoard's thread fails at an event of ours, the next call of
        Lightning raises it, at the latest when the run ends. Only what the system refuses is
        tolerated: a value that a logger does not take is an error as ever.

        Args:
            loggers: of the trainer.
        """
        for logger in loggers:
            own = getattr(logger, "__dict__", None)
            # A second callback finds them guarded; what has no attributes of its own takes none.
            if own is None or any(_is_guard(own.get(name)) for name in GUARDED):
                continue
            for name in GUARDED:
                method = getattr(logger, name, None)
                if method is not None:
                    setattr(logger, name, partial(_guarded, self, logger, name, method))

    def _warn(self, error: Exception) -> None:
        if not self.warned:
            self.warned = True
            rank_zero_warn(
                f"CurvatureCallback cannot write to a logger ({type(error).__name__}: {error}) "
                "and goes on without; its values are still in `trainer.callback_metrics`."
            )


def _guarded(
    tolerance: Tolerance,
    logger: Logger,
    name: str,
    method: Callable[..., Any],
    *arguments: Any,
    **named: Any,
) -> Any:
    """A method of a logger; after `finalize` its class' own are back."""
    try:
        return method(*arguments, **named)
    except Exception as error:
        if not _refused_by_system(error):
            raise
        tolerance._warn(error)
        return None
    finally:
        if name == "finalize":
            _release(logger)


def _release(logger: Logger) -> None:
    """Take the guards off."""
    for name in GUARDED:
        guard = vars(logger).get(name)
        if _is_guard(guard):
            method = guard.args[3]
            # What a test has put on the object is put back; a method of the class is found again.
            delattr(logger, name)
            if getattr(logger, name, None) != method:
                setattr(logger, name, method)


def _is_guard(method: Any) -> TypeGuard[partial[Any]]:
    return isinstance(method, partial) and method.func is _guarded


def _refused_by_system(error: BaseException | None) -> bool:
    """Whether an `OSError` is the error or its cause: Fabric's logger puts its own around it."""
    while error is not None:
        if isinstance(error, OSError):
            return True
        error = error.__cause__
    return False
