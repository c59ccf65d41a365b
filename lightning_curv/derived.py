"""Parameters behind a transform: casts, transposes, slices, parametrizations."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_curv.graph import leaves
from lightning_curv.jacobian import Jacobian
from lightning_curv.rules.fallback import dense
from lightning_curv.terms import Term


def pulled_back(edge: GradientEdge, value: Tensor, term: Term) -> Iterator[tuple[Tensor, Term]]:
    """Terms of the leaves that ``value`` was computed from, given its own term.

    Args:
        edge: The value's place in the graph, which must not be freed yet.
        value: The value, detached.
        term: Its term. The result is dense: ``[V, N, *leaf]`` is held in memory.
    """
    jacobian = Jacobian(value, [term]).per_sample().to(value.dtype)
    parameters = leaves(edge)
    for parameter, pulled in zip(parameters, _pull(edge, parameters, jacobian.flatten(0, 1)), strict=True):
        if pulled is not None:
            yield parameter, dense(pulled.reshape(*jacobian.shape[:2], *parameter.shape))


def _pull(edge: GradientEdge, inputs: list[Tensor], cotangents: Tensor) -> list[Tensor | None]:
    """The transposed derivative of a transform, applied to every entry of the leading axis."""
    try:
        return list(
            torch.autograd.grad(edge, inputs, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=True)
        )
    except RuntimeError:  # an op without a batching rule
        rows = [torch.autograd.grad(edge, inputs, c, retain_graph=True, allow_unused=True) for c in cotangents]
        return [None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True)]
