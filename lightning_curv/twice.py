"""Passes through the graph that are differentiated again.

Hooks replace the gradients of fused ops by those of their `FORMULAS`. They are there during our own passes alone: the forward pass and every pass of the user's stay torch's own, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.utils.checkpoint import CheckpointError

from lightning_curv.formulas import FORMULAS


def fused(outputs: Iterable[Tensor | GradientEdge]) -> list[Node]:
    """The nodes below ``outputs`` that `differentiable` looks after."""
    stack = [output.grad_fn if isinstance(output, Tensor) else output.node for output in outputs]
    seen: set[Node] = set()
    found = []
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if node.name() in FORMULAS:
                found.append(node)
            stack += [after for after, _ in node.next_functions]
    return found


@contextmanager
def differentiable(nodes: Iterable[Node]) -> Iterator[None]:
    """In this context passes with a graph of their own (``create_graph``) use the formulas of these nodes."""
    handles = []
    for node in nodes:
        if node.name() in FORMULAS:
            handles.append(node.register_hook(_Replacing(node)))
    try:
        yield
    finally:
        for handle in handles:  # a node that kept its hook would keep itself alive
            handle.remove()


class _Replacing:
    """Hook that replaces the gradients of a node by those of its formula."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def __call__(
        self, found: Sequence[Tensor | None], cotangents: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...] | None:
        g = cotangents[0]
        if not torch.is_grad_enabled() or g is None:
            return None
        with torch._C.DisableTorchFunction(), torch.autocast(g.device.type, enabled=False):
            try:
                return self._gradients(found, g)
            except CheckpointError:  # it gives what was saved once per pass
                return _in_own_pass(partial(self._gradients, found, g))

    def _gradients(self, found: Sequence[Tensor | None], cotangent: Tensor) -> tuple[Tensor | None, ...] | None:
        formula, names = FORMULAS[self._node.name()]
        saved = [self._saved(name, g, cotangent) for name, g in zip(names, found, strict=False)]
        # inputs may be one and the same tensor: each gets a node of its own
        inputs = [x.view_as(x) if isinstance(x, Tensor) and x.requires_grad else x for x in saved]
        output = formula(self._node, *inputs)
        if output is None:
            return None
        wanted = [i for i, g in enumerate(found) if g is not None]
        by = [cast("Tensor", inputs[i]) for i in wanted]
        gradients = torch.autograd.grad(output, by, cotangent, create_graph=True, materialize_grads=True)
        replaced = dict(zip(wanted, gradients, strict=True))
        return tuple(replaced.get(i) for i in range(len(found)))

    def _saved(self, name: str, gradient: Tensor | None, cotangent: Tensor) -> Tensor | None:
        """What the node has saved, or an input that it is linear in and has not saved."""
        saved = getattr(self._node, f"_saved_{name}")
        if saved is None and gradient is not None:
            return cotangent.new_zeros(gradient.shape, requires_grad=True)
        return saved


def _in_own_pass(function: Callable[[], Any]) -> Any:
    """The result of a function that is called during another backward pass."""
    results: list[Any] = []

    def run(_: Tensor) -> None:
        with torch.enable_grad():
            results.append(function())

    start = torch.zeros((), requires_grad=True)
    end = start.clone()
    end.register_hook(run)
    torch.autograd.grad(end, start)
    return results[0]
