"""Functions of the user's in a loss: whether their derivatives show how they join samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node

from lightning_curv.differentiation.twice import differentiable
from lightning_curv.graph.heads import Head, head_at
from lightning_curv.samples.forward import forward_owners
from lightning_curv.terms.owners import Owners

if TYPE_CHECKING:
    from lightning_curv.passes.passes import Passes

Gradients = Sequence[Tensor | None]


class Undecided(Exception):
    """The loss has no second derivative in torch, or one that does not show."""


@contextmanager
def bodies(nodes: Sequence[Node]) -> Iterator[None]:
    """In this context what `once_differentiable` keeps without a graph gets one.

    That a backward function is differentiated once is a promise of its author to torch: what it
    does with its inputs can be seen as long as it consists of torch's ops.
    """
    handles = []
    for node in nodes:
        body = _body(node)
        if body is not None:
            handles.append(node.register_hook(partial(_with_graph, node, body)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _body(node: Node) -> Callable[..., Any] | None:
    """The function that `once_differentiable` is around, if it is."""
    if not isinstance(node, BackwardCFunction):
        return None
    body: Callable[..., Any] | None = getattr(node._forward_cls.backward, "__wrapped__", None)
    return body


def _with_graph(
    node: Any,
    body: Callable[..., Any],
    found: Gradients,
    cotangents: Gradients,
) -> tuple[Tensor | None, ...] | None:
    """The gradients of a node by its body, for the inputs that have some."""
    if not torch.is_grad_enabled():
        return None
    made = body(node, *cotangents)
    of_arguments = made if isinstance(made, tuple) else (made,)
    # Of the arguments only tensors are inputs of the node, and only some have a gradient.
    gradients = [g for g, needed in zip(of_arguments, node.needs_input_grad) if needed]
    wanted = [i for i, (below, _) in enumerate(node.next_functions) if below is not None]
    if len(gradients) != len(wanted):
        return None
    replaced = dict(zip(wanted, gradients, strict=True))
    return tuple(replaced.get(i) for i in range(len(found)))


def refuse_hidden(
    passes: Passes,
    nodes: Sequence[Node],
    differentiated: Callable[[], Gradients],
    outputs: Sequence[tuple[Head, Owners]],
) -> None:
    """Refuse functions of the user's that may join samples in a way that derivatives do not show.

    Those are functions whose gradient does not depend on their inputs, as where it was computed in
    the forward pass, unless each of their outputs depends on one sample.

    Args:
        passes: The graph.
        nodes: Those of the part of the loss.
        differentiated: Differentiates that part, with a graph.
        outputs: The outputs of the network that it is a function of, and who owns their rows.

    Raises:
        Undecided: There is such a function.
    """
    functions = [node for node in nodes if isinstance(node, BackwardCFunction)]
    hidden = _with_constant_gradients(functions, differentiated) if functions else []
    if not hidden:
        return
    # Where torch drops the graph of a gradient, nothing is to be found with it.
    with differentiable(hidden):
        differentiated()
    heads = [
        head_at(GradientEdge(node, number), passes.loss)
        for node in hidden
        for number in range(len(node._input_metadata))
    ]
    count = outputs[0][1].count
    if forward_owners(passes, heads, outputs, count, by_entry=True) is None:
        raise Undecided(
            f"`{hidden[0].name()}` does not show how its gradient depends on its inputs; let it "
            "return a number per sample"
        )


def _with_constant_gradients(
    functions: Sequence[Node],
    differentiated: Callable[[], Gradients],
) -> list[Node]:
    """Functions of the user's whose gradients have no graph of their own."""
    constant: list[Node] = []

    def look(node: Node, gradients: Gradients, _: Gradients) -> None:
        if not any(g is not None and g.requires_grad for g in gradients):
            constant.append(node)

    handles = []
    for node in functions:
        # What arrives with a graph would leave with one.
        handles.append(node.register_prehook(_detached))
        handles.append(node.register_hook(partial(look, node)))
    try:
        differentiated()
    finally:
        for handle in handles:
            handle.remove()
    return constant


def _detached(cotangents: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if g is None else g.detach() for g in cotangents)
