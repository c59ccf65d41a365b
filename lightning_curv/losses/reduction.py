"""What the loss functions of torch share: reductions and weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import _reduction

from lightning_curv.errors import UnsupportedError


def reduction_of(reduction: str, size_average: bool | None, reduce: bool | None) -> str:
    """The reduction, legacy arguments considered."""
    if size_average is None and reduce is None:
        return reduction
    return _reduction.legacy_get_string(size_average, reduce, emit_warning=False)


def reduced(
    weights: Tensor,
    normaliser: Tensor | int,
    scale: Tensor,
    reduction: str,
) -> Tensor:
    """Weights of the rows or entries after the reduction and all factors that follow it."""
    if reduction == "mean":
        return weights * scale / normaliser
    return weights * scale


def full(input: Tensor, value: Tensor | None) -> Tensor:
    """A weight of the input's shape."""
    if value is None:
        return torch.ones_like(input)
    return value.to(input.dtype).expand(input.shape)


def same_shape(name: str, input: Tensor, target: Tensor) -> None:
    """Raise if the loss would broadcast."""
    if input.shape != target.shape:
        raise UnsupportedError(
            f"`{name}` expects input and target of one shape, found {tuple(input.shape)} and "
            f"{tuple(target.shape)}; broadcast them yourself before the loss."
        )
