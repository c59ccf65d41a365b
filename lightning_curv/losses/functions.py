"""The loss functions of torch, each as a weighted likelihood."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction
from torch.nn import functional as F

from lightning_curv.errors import UnsupportedError
from lightning_curv.losses.likelihoods import Bernoulli, Categorical, Gaussian
from lightning_curv.losses.registry import loss


def _reduction_of(reduction: str, size_average: bool | None, reduce: bool | None) -> str:
    if size_average is None and reduce is None:
        return reduction
    return _reduction.legacy_get_string(size_average, reduce, emit_warning=False)


def _full(input: Tensor, value: Tensor | None) -> Tensor:
    return torch.ones_like(input) if value is None else value.to(input.dtype).expand(input.shape)


@loss(F.cross_entropy)
def cross_entropy(
    scale: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Categorical:
    """Σ_c τ_c (-log p_c) per row, divided by Σ of the rows' weights for class indices, by their number otherwise."""
    axis = 1 if input.ndim > 1 else 0
    p = input.softmax(axis)
    if target.is_floating_point():
        target = target * (1 - label_smoothing) + label_smoothing / input.shape[axis]
        if weight is not None:
            target = target * weight.reshape(-1, *[1] * (input.ndim - axis - 1))
        rows = target.sum(axis)
        normaliser: Tensor | int = rows.numel()
    else:
        label = _label_weight(input, target, weight, ignore_index)
        uniform = 1.0 if weight is None else weight.sum() / input.shape[axis]
        smooth = uniform * (target != ignore_index)
        rows = (1 - label_smoothing) * label + label_smoothing * smooth if label_smoothing else label
        normaliser = label.sum()
    return Categorical(
        p, _reduced(rows, normaliser, scale, _reduction_of(reduction, size_average, reduce)).unsqueeze(axis), axis
    )


@loss(F.nll_loss)
def nll_loss(
    scale: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Categorical:
    """Cross-entropy of log-probabilities."""
    axis = 1 if input.ndim > 1 else 0
    p = input.exp()
    if not torch.allclose(p.sum(axis), torch.ones((), dtype=p.dtype, device=p.device), atol=1e-2):
        raise UnsupportedError(
            "`nll_loss` expects log-probabilities (the output of `log_softmax`), found an input whose exponentials "
            "do not "
            "sum to one; use `cross_entropy` with the logits."
        )
    rows = _label_weight(input, target, weight, ignore_index)
    rows = _reduced(rows, rows.sum(), scale, _reduction_of(reduction, size_average, reduce))
    return Categorical(p, rows.unsqueeze(axis), axis, normalized=True)


def _label_weight(input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """The weight of every row's class, 0 where it is ignored."""
    kept = target != ignore_index
    if weight is None:
        return kept.to(input.dtype)
    return weight[target.where(kept, torch.zeros_like(target))] * kept


def _reduced(weights: Tensor, normaliser: Tensor | int, scale: Tensor, reduction: str) -> Tensor:
    """Weights of the rows or entries after the reduction and all factors that follow it."""
    return weights * scale / normaliser if reduction == "mean" else weights * scale


@loss(F.mse_loss)
def mse_loss(
    scale: Tensor,
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Gaussian:
    """Squared error over any shape."""
    _same_shape("mse_loss", input, target)
    weights = _full(input, weight)
    return Gaussian(_reduced(weights, weights.sum(), scale, _reduction_of(reduction, size_average, reduce)))


@loss(F.binary_cross_entropy_with_logits)
def binary_cross_entropy_with_logits(
    scale: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Bernoulli:
    """Binary cross-entropy over any shape."""
    weights = _full(input, weight)
    if pos_weight is not None:
        weights = weights * (target * pos_weight + 1 - target)
    reduced = _reduced(weights, input.numel(), scale, _reduction_of(reduction, size_average, reduce))
    return Bernoulli(input.sigmoid(), reduced)


def _same_shape(name: str, input: Tensor, target: Any) -> None:
    if input.shape != target.shape:
        raise UnsupportedError(
            f"`{name}` expects input and target of one shape, found {tuple(input.shape)} and {tuple(target.shape)}; "
            "broadcast them yourself before the loss."
        )
