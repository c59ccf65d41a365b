"""Ops with several outputs: one node that receives the cotangents of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# The axis of every output that carries the samples; `None`: none does, rows belong to samples.
Axes = Sequence[int | None] | None


def pack_outputs(outputs: Sequence[Tensor], axes: Axes) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The outputs as the rows `[N, K]` of one tensor, and the outputs computed from that.

    Values, strides and version counters stay; gradients pass through unchanged.

    Args:
        outputs: The outputs.
        axes: See `rows`.
    """
    whole = rows(outputs, axes)
    return whole, _Parts.apply(whole, axes, outputs)


def rows(tensors: Sequence[Tensor], axes: Axes) -> Tensor:
    """The entries of every sample, `[N, K]`, or every row of ragged tensors, `[R, K]`.

    Args:
        tensors: The tensors.
        axes: The axis of each that carries the samples; `None`: unknown, then N is 1. `None`
            for all of them: they are ragged. What is in front of the last axis of each is rows,
            those of one tensor behind those of another and with zeros where another's are wider.
    """
    if axes is None:
        width = max(tensor.shape[-1] for tensor in tensors)
        ragged = []
        for tensor in tensors:
            missing = width - tensor.shape[-1]
            ragged.append(F.pad(tensor.flatten(0, -2), (0, missing)))
        return torch.cat(ragged)
    by_sample = []
    for tensor, axis in zip(tensors, axes, strict=True):
        if axis is None:
            samples_first = tensor[None]
        else:
            samples_first = tensor.movedim(axis, 0)
        by_sample.append(samples_first.flatten(1))
    return torch.cat(by_sample, dim=1)


class _Parts(torch.autograd.Function):
    """The outputs of an op as functions of its rows: gradients are brought together again.

    What is returned are the outputs themselves, detached: nothing is computed or copied.
    """

    @staticmethod
    def forward(
        ctx: Any,
        whole: Tensor,
        axes: Axes,
        parts: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        ctx.axes = axes
        return tuple(part.detach() for part in parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return rows(gradients, ctx.axes), None, None
