"""Which backward passes are our own: hooks must not take them for the user's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class _Running:
    """Counts our own passes through graphs.

    Shared by all threads: autograd may run hooks in threads of its own.
    """

    def __init__(self) -> None:
        self.passes = 0

    @contextmanager
    def unheard(self) -> Iterator[None]:
        self.passes += 1
        try:
            yield
        finally:
            self.passes -= 1


_RUNNING = _Running()


def own_pass() -> bool:
    """Whether the pass that is running is one of ours."""
    return _RUNNING.passes > 0


unheard = _RUNNING.unheard
