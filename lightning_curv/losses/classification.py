"""Losses of categorical and binary targets."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_curv.errors import UnsupportedError
from lightning_curv.losses.categorical import Categorical
from lightning_curv.losses.likelihoods import Bernoulli
from lightning_curv.losses.reduction import full, reduced, reduction_of, same_shape
from lightning_curv.losses.registry import loss


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
    """Σ_c τ_c (-log p_c) per row; a row weighs Σ_c τ_c.

    The mean is taken over the weights of the rows for class indices, over the number of rows for
    class probabilities.
    """
    axis = 1 if input.ndim > 1 else 0
    p = input.softmax(axis)
    if target.is_floating_point():
        target = target * (1 - label_smoothing) + label_smoothing / input.shape[axis]
        if weight is not None:
            target = target * weight.reshape(-1, *[1] * (input.ndim - axis - 1))
        rows = target.sum(axis)
        normaliser: Tensor | int = rows.numel()
    else:
        label = label_weight(input, target, weight, ignore_index)
        rows = label
        if label_smoothing:
            uniform = 1.0 if weight is None else weight.sum() / input.shape[axis]
            kept = target != ignore_index
            rows = (1 - label_smoothing) * label + label_smoothing * uniform * kept
        normaliser = label.sum()
    reduction = reduction_of(reduction, size_average, reduce)
    weights = reduced(rows, normaliser, scale, reduction)
    return Categorical(p, weights.unsqueeze(axis), axis)


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
    one = torch.ones((), dtype=p.dtype, device=p.device)
    if not torch.allclose(p.sum(axis), one, atol=1e-2):
        raise UnsupportedError(
            "`nll_loss` expects log-probabilities (the output of `log_softmax`), found an input "
            "whose exponentials do not sum to one; use `cross_entropy` with the logits."
        )
    rows = label_weight(input, target, weight, ignore_index)
    reduction = reduction_of(reduction, size_average, reduce)
    weights = reduced(rows, rows.sum(), scale, reduction)
    return Categorical(p, weights.unsqueeze(axis), axis, normalized=True)


@loss(F.kl_div)
def kl_div(
    scale: Tensor,
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Categorical:
    """Cross-entropy of log-probabilities with given ones; a row weighs as much as its target."""
    same_shape("kl_div", input, target)
    axis = _normalized_axis(input)
    reduction = reduction_of(reduction, size_average, reduce)
    normalisers = {"mean": input.numel(), "batchmean": len(input)}
    probabilities = target.exp() if log_target else target
    entries = probabilities * scale / normalisers.get(reduction, 1)
    return Categorical(input.exp(), entries.sum(axis, keepdim=True), axis, normalized=True)


def _normalized_axis(input: Tensor) -> int:
    """The axis over which the exponentials sum to one."""
    p = input.exp()
    tolerance = max(1e-4, 4 * torch.finfo(p.dtype).eps)
    axes = []
    for axis in range(1, p.ndim):
        error = (p.sum(axis) - 1).abs()
        if bool((error <= tolerance).all()):
            axes.append(axis)
    if len(axes) != 1:
        raise UnsupportedError(
            "`kl_div` expects log-probabilities (the output of `log_softmax`) over one axis other "
            f"than the first, found an input of shape {tuple(input.shape)} whose exponentials sum "
            f"to one over {len(axes)} axes; flatten it to rows `[N, C]`."
        )
    return axes[0]


@loss(F.binary_cross_entropy)
def binary_cross_entropy(
    scale: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Bernoulli:
    """Binary cross-entropy of probabilities over any shape."""
    reduction = reduction_of(reduction, size_average, reduce)
    weights = reduced(full(input, weight), input.numel(), scale, reduction)
    return Bernoulli(weights, input, target)


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
    weights = full(input, weight)
    if pos_weight is not None:
        weights = weights * (target * pos_weight + 1 - target)
    reduction = reduction_of(reduction, size_average, reduce)
    weights = reduced(weights, input.numel(), scale, reduction)
    return Bernoulli(weights, input.sigmoid())


def label_weight(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """The weight of every row's class, 0 where it is ignored."""
    kept = target != ignore_index
    if weight is None:
        return kept.to(input.dtype)
    label = target.where(kept, torch.zeros_like(target))  # an ignored index may be any number
    return weight[label] * kept
