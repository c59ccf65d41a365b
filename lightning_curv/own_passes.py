"""Which backward passes are our own: hooks must not take them for the user's."""

from __future__ import annotations


class _Own:
    """Context of our own passes through graphs, and of what hooks do; counts how many are running.

    Shared by all threads: autograd may run hooks in threads of its own.
    """

    def __init__(self) -> None:
        self.passes = 0

    def __enter__(self) -> None:
        self.passes += 1

    def __exit__(self, *exception: object) -> None:
        self.passes -= 1


_OWN = _Own()


def own_pass() -> bool:
    """Whether the pass that is running is one of ours."""
    return _OWN.passes > 0


def unheard() -> _Own:
    """Context in which hooks stay silent."""
    return _OWN
