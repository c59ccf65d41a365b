"""Ops with several outputs: one node that receives the cotangents of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Axes = (
    Sequence[int | None] | None
)  # of every output; `None`: no axis carries the samples, rows belong to them


def joined(outputs: Sequence[Tensor], axes: Axes) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The outputs as the rows ``[N, K]`` of one tensor, and the same outputs computed from that tensor.

    Values, strides and version counters stay; gradients pass through unchanged.

    Args:
        outputs: The outputs.
        axes: See `rows`.
    """
    whole = rows(outputs, axes)
    return whole, _Parts.apply(whole, axes, outputs)


def rows(tensors: Sequence[Tensor], axes: Axes) -> Tensor:
    """The entries of every sample, ``[N, K]``, or every row of ragged tensors, ``[R, K]``.

    Args:
        tensors: The tensors.
        axes: The axis of each that carries the samples; ``None``: unknown, then N is 1. ``None``
            for all of them: they are ragged. What is in front of the last axis of each is rows,
            those of one tensor behind those of another and with zeros where another's are wider.
    """
    if axes is None:
        width = max(t.shape[-1] for t in tensors)
        return torch.cat([F.pad(t.flatten(0, -2), (0, width - t.shape[-1])) for t in tensors])
    by_sample = [
        t[None] if axis is None else t.movedim(axis, 0)
        for t, axis in zip(tensors, axes, strict=True)
    ]
    return torch.cat([t.flatten(1) for t in by_sample], dim=1)


class _Parts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, axes: Axes, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        ctx.axes = axes
        return tuple(part.detach() for part in parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return rows(gradients, ctx.axes), None, None
