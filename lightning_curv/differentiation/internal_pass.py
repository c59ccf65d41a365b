"""Which backward passes are ours, so that hooks do not take them for the user's; where they end."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import Node


class InternalPasses:
    """Context of our own passes, and of what hooks do; counts how many are running.

    Autograd may run hooks in threads of its own, which know nothing of the thread that has started
    the pass. So whoever registers a hook keeps this object of its thread, and asks it.

    Attributes:
        running: How many are running, one inside of the other; 0: the pass is the user's.
    """

    __slots__ = ("running",)

    def __init__(self) -> None:
        self.running = 0

    def __enter__(self) -> None:
        self.running += 1
        RUNNING.append(self)

    def __exit__(self, *exception: object) -> None:
        self.running -= 1
        RUNNING.remove(self)


_local = threading.local()
# Once for every pass of ours that some thread makes, perhaps through another thread's graph. Python
# appends and removes in one step each, whichever thread does so.
RUNNING: list[InternalPasses] = []


def internal_pass() -> InternalPasses:
    """Context in which the hooks of this thread stay silent; they ask whether it is `running`."""
    passes: InternalPasses | None = getattr(_local, "passes", None)
    if passes is None:
        passes = _local.passes = InternalPasses()
    return passes


@contextmanager
def kept_gradients(values: Iterable[ref[Tensor]]) -> Iterator[None]:
    """Context whose passes leave the gradients that values retain (`retain_grad`) as they were."""
    alive = [value for reference in values if (value := reference()) is not None]
    before = [(value, value.grad) for value in alive if value.retains_grad]
    try:
        yield
    finally:
        for value, gradient in before:
            value.grad = gradient


@contextmanager
def nothing_below(nodes: Iterable[Node]) -> Iterator[None]:
    """Context in which passes bring nothing below nodes where parameters may be used again."""
    handles = [node.register_prehook(_zeros) for node in nodes]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _zeros(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if g is None else torch.zeros_like(g) for g in gradients)
