"""Per-sample gradients with a graph of their own, for `loss.backward(create_graph=True)`.

Recorded inputs are detached, and terms are contractions of values. Here autograd makes every
per-sample gradient itself: the cotangent at the output of an op, all other samples set to zero, is
backpropagated through the op alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_curv.differentiation.internal_pass import internal_pass
from lightning_curv.errors import UnsupportedError, describe, differentiating_twice
from lightning_curv.graph.joins import Join, node_of
from lightning_curv.passes.passes import Passes
from lightning_curv.recording.records import Use
from lightning_curv.samples.groups import owner_of_rows


def gradients_per_sample(passes: Passes) -> dict[Tensor, Tensor]:
    """The per-sample gradients of every parameter, `[N, *p]`, with a graph.

    Cost: one more backward pass with a graph, and per op N times the part of a pass that is the
        gradient by its
    parameters; the graph holds N cotangents per op, each of the size of the op's output.

    Raises:
        UnsupportedError: A parameter has tensor hooks, or an op no second derivative.
    """
    uses = {node: use for node, use in passes.tape.uses.items() if use.operands}
    # A hook changes the gradient of the batch, which nothing says how to share out to the samples.
    for parameter in {p for node in uses for p in passes.tape.parameters[node]}:
        if parameter._backward_hooks:
            raise UnsupportedError(
                "`create_graph` with first-order quantities needs parameters without tensor hooks, "
                f"found some on {describe(parameter)}; remove them, or change `.grad` after the "
                "backward pass instead."
            )
    gradients: dict[Tensor, Tensor] = {}
    with torch.enable_grad(), internal_pass(), differentiating_twice():
        # To the ops only: each of them is then passed once per sample, the network is not.
        edges = [GradientEdge(node_of(key), use.output_nr) for key, use in uses.items()]
        cotangents = torch.autograd.grad(
            [passes.loss],
            edges,
            [passes.seed],
            create_graph=True,
            allow_unused=True,
        )
        for (node, use), g in zip(uses.items(), cotangents, strict=True):
            for parameter, rows in _of_use(passes, node, use, g) if g is not None else ():
                before = gradients.get(parameter)
                if before is None:
                    gradients[parameter] = rows
                else:
                    gradients[parameter] = before + rows
    return gradients


def _of_use(
    passes: Passes,
    key: Node | Join,
    use: Use,
    g: Tensor,
) -> Iterator[tuple[Tensor, Tensor]]:
    """What one op adds to the per-sample gradients of its parameters."""
    of_row = owner_of_rows(use, passes.samples.uses[key]).to(g.device)
    parameters = passes.tape.parameters[key]
    edge = GradientEdge(node_of(key), use.output_nr)
    columns: list[list[Tensor]] = [[] for _ in parameters]
    # A hook sets the seed of the op, once per pass: one sample after the other.
    for n in range(passes.samples.count):
        with _only(key, use, torch.where(of_row == n, g.reshape(use.shape), 0).reshape(g.shape)):
            row = torch.autograd.grad(edge, parameters, g, create_graph=True, allow_unused=True)
        for parameter, column, gradient in zip(parameters, columns, row, strict=True):
            column.append(torch.zeros_like(parameter) if gradient is None else gradient.to_dense())
    for parameter, column in zip(parameters, columns, strict=True):
        if column:
            stacked = torch.stack(column)
        else:
            stacked = parameter.new_zeros(0, *parameter.shape)
        yield parameter, stacked.to(torch.promote_types(parameter.dtype, torch.float32))


@contextmanager
def _only(key: Node | Join, use: Use, seed: Tensor) -> Iterator[None]:
    """Context in which an op gets `seed` after all hooks of its output, and its data nothing.

    Below the data the parameters of the op may be used again. No node of the data is between the op
    and a parameter: such a parameter would be reached without a recorded op, which is refused.
    """

    def start(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        return tuple(seed if i == use.output_nr else g for i, g in enumerate(gradients))

    data = key.data if isinstance(key, Join) else {edge.node for edge in use.inputs.values()}
    handles = [
        node_of(key).register_prehook(start),
        *(below.register_prehook(_nothing) for below in data),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _nothing(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if g is None else torch.zeros_like(g) for g in gradients)
