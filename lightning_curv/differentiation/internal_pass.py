"""Which backward passes are our own: hooks must not take them for the user's; and where they end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import Node


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


@contextmanager
def nothing_below(nodes: Iterable[Node]) -> Iterator[None]:
    """Context in which passes bring nothing below some nodes: parameters may be used again there."""
    handles = [node.register_prehook(_zeros) for node in nodes]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _zeros(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if g is None else torch.zeros_like(g) for g in gradients)
