"""Recording that gives up instead of disturbing what is recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_curv.recording.record import record


class lenient_record(record):
    """`record`, in which an error of the recording itself ends no forward pass.

    The call goes on as if it were not recorded, and so do all that follow; errors of the calls
    themselves are raised as they are.

    Attributes:
        failure: What went wrong; `None`: nothing.

    Example:
        >>> import torch
        >>> with lenient_record() as recording:
        ...     output = torch.nn.functional.linear(torch.ones(2, 3), torch.ones(4, 3))
        >>> recording.failure is None
        True
    """

    failure: Exception | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        run: Callable[..., Any] | None = None,
    ) -> Any:
        """Run `func` and record what it consumed, as long as that goes well."""
        kwargs = kwargs or {}
        if self.failure is not None:
            return func(*args, **kwargs)
        call = _Run(run or func)
        try:
            return super().__torch_function__(func, types, args, kwargs, call)
        except Exception as error:
            if call.failed:
                raise
            self.failure = error
            # What has run already may have changed its arguments: it must not run twice.
            return call.result if call.finished else func(*args, **kwargs)


class _Run:
    """A function, and what came of its call."""

    __slots__ = ("_func", "failed", "finished", "result")

    def __init__(self, func: Callable[..., Any]) -> None:
        self._func = func
        self.failed = False
        self.finished = False
        self.result: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            self.result = self._func(*args, **kwargs)
        except BaseException:
            self.failed = True
            raise
        self.finished = True
        return self.result
