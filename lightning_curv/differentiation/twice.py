"""Passes through the graph that are differentiated again: all in them needs a second derivative.

Hooks replace the gradients of fused ops by those of their `FORMULAS`, and refuse what leaves no
graph. They are there during our own passes alone: the forward pass and every pass of the user's
stay torch's own, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node

from lightning_curv.differentiation.formulas import FORMULAS
from lightning_curv.errors import once_differentiable


def fused(outputs: Iterable[Tensor | GradientEdge]) -> list[Node]:
    """The nodes below `outputs` that `differentiable` looks after.

    Those are nodes with a formula, and the user's functions.
    """
    stack = [output.grad_fn if isinstance(output, Tensor) else output.node for output in outputs]
    seen: set[Node] = set()
    watched = []
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if node.name() in FORMULAS or isinstance(node, BackwardCFunction):
                watched.append(node)
            stack += [after for after, _ in node.next_functions]
    return watched


@contextmanager
def differentiable(nodes: Iterable[Node]) -> Iterator[None]:
    """In this context passes with a graph of their own (`create_graph`) use formulas of nodes.

    Raises:
        UnsupportedError: The backward function of a `torch.autograd.Function` leaves no graph:
            what torch makes of it is a second derivative of zero.
    """
    handles = []
    for node in nodes:
        # Torch's own derivative of the node is replaced while the context lasts.
        if node.name() in FORMULAS:
            handles.append(node.register_hook(_Replacing(node)))
        elif isinstance(node, BackwardCFunction):
            handles += [
                node.register_prehook(_required),
                node.register_hook(partial(_refuse_lost, node.name())),
            ]
    try:
        yield
    finally:
        for handle in handles:  # a node that kept its hook would keep itself alive
            handle.remove()


def _required(cotangents: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
    """Cotangents that a graph starts from where there is none: where it is lost, that is seen."""
    if not torch.is_grad_enabled():
        return None
    return tuple(
        g
        if g is None or g.requires_grad or not g.is_floating_point()
        else g.detach().requires_grad_()
        for g in cotangents
    )


def _refuse_lost(
    name: str,
    found: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
) -> None:
    """Whether the graph of a user's function is whole: gradients are linear in the cotangents then.

    Torch drops that of a `once_differentiable` function silently.
    """
    if not torch.is_grad_enabled():
        return
    gradients = [g for g in found if g is not None and g.is_floating_point()]
    starts = [c for c in cotangents if c is not None and c.requires_grad]
    size = sum(_dot(g, g) for g in gradients)
    whole = [g for g in gradients if g.requires_grad]
    pairs = []
    if whole and starts:
        seeds = [g.detach() for g in whole]
        shares = torch.autograd.grad(whole, starts, seeds, retain_graph=True, allow_unused=True)
        pairs = [(share, c) for share, c in zip(shares, starts, strict=True) if share is not None]
    rounding = size + sum((_dot(share, share) * _dot(c, c)) ** 0.5 for share, c in pairs)
    eps = max((torch.finfo(g.dtype).eps for g in gradients), default=0.0)
    if abs(sum(_dot(share, c) for share, c in pairs) - size) > 100 * eps * rounding:
        found_out = "its backward function leaves no graph, or is not linear in the gradient."
        raise once_differentiable(name, RuntimeError(found_out))


def _dot(a: Tensor, b: Tensor) -> float:
    precise = torch.promote_types(a.dtype, torch.float32)
    return float((a.detach().to(precise) * b.detach().to(precise)).sum())


class _Replacing:
    """Hook that replaces the gradients of a node by those of its formula."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def __call__(
        self,
        found: Sequence[Tensor | None],
        cotangents: Sequence[Tensor | None],
    ) -> tuple[Tensor | None, ...] | None:
        g = cotangents[0]
        if not torch.is_grad_enabled() or g is None:
            return None
        with torch._C.DisableTorchFunction(), torch.autocast(g.device.type, enabled=False):
            try:
                return self._gradients(found, g)
            except RuntimeError as error:
                if not _is_of_checkpoint(error):
                    raise
                # A checkpoint gives what was saved once per pass.
                return _in_own_pass(partial(self._gradients, found, g))

    def _gradients(
        self,
        found: Sequence[Tensor | None],
        cotangent: Tensor,
    ) -> tuple[Tensor | None, ...] | None:
        formula, names = FORMULAS[self._node.name()]
        if cotangent.is_sparse:  # formulas are written in dense ops
            cotangent = cotangent.to_dense()
        saved = [self._saved(name, g, cotangent) for name, g in zip(names, found, strict=False)]
        # inputs may be one and the same tensor: each gets a node of its own
        inputs = [x.view_as(x) if isinstance(x, Tensor) and x.requires_grad else x for x in saved]
        output = formula(self._node, *inputs)
        if output is None:
            return None
        wanted = [i for i, g in enumerate(found) if g is not None]
        by = [cast("Tensor", inputs[i]) for i in wanted]
        gradients = torch.autograd.grad(
            output,
            by,
            cotangent,
            create_graph=True,
            materialize_grads=True,
        )
        replaced = dict(zip(wanted, gradients, strict=True))
        return tuple(replaced.get(i) for i in range(len(found)))

    def _saved(
        self,
        name: str | None,
        gradient: Tensor | None,
        cotangent: Tensor,
    ) -> Tensor | None:
        """What the node has saved, or an input that it is linear in and has not saved."""
        saved = None if name is None else getattr(self._node, f"_saved_{name}")
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


def _is_of_checkpoint(error: RuntimeError) -> bool:
    """Whether `torch.utils.checkpoint` refused to give what it has saved."""
    # Here, as it imports sympy in some versions, which takes longer than all of this package.
    from torch.utils.checkpoint import CheckpointError

    return isinstance(error, CheckpointError)
