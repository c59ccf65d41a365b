"""Losses of real and counted targets."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_curv.losses.likelihoods import Gaussian, GaussianVariance, PiecewiseLinear, Poisson
from lightning_curv.losses.reduction import full, reduced, reduction_of, same_shape
from lightning_curv.losses.registry import loss


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
    same_shape("mse_loss", input, target)
    weights = full(input, weight)
    reduction = reduction_of(reduction, size_average, reduce)
    return Gaussian(reduced(weights, weights.sum(), scale, reduction))


@loss(F.l1_loss)
def l1_loss(
    scale: Tensor,
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> PiecewiseLinear:
    """Absolute error: its second derivative, and the GGN with it, is zero almost everywhere."""
    same_shape("l1_loss", input, target)
    return PiecewiseLinear(torch.zeros_like(input))


@loss(F.smooth_l1_loss)
def smooth_l1_loss(
    scale: Tensor,
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> Gaussian:
    """Second derivative 1/β in the zone between ±β, else 0."""
    same_shape("smooth_l1_loss", input, target)
    # Half of the second derivative, see `Gaussian`; for β = 0 there is no zone to divide.
    halves = ((input - target).abs() < beta) / (2 * beta or 1.0)
    reduction = reduction_of(reduction, size_average, reduce)
    return Gaussian(reduced(halves.to(input.dtype), input.numel(), scale, reduction))


@loss(F.huber_loss)
def huber_loss(
    scale: Tensor,
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> Gaussian:
    """Second derivative 1 in the zone between ±δ, else 0."""
    same_shape("huber_loss", input, target)
    halves = ((input - target).abs() < delta) / 2  # of the second derivative, see `Gaussian`
    weights = full(input, weight) * halves
    return Gaussian(reduced(weights, input.numel(), scale, reduction))


@loss(F.poisson_nll_loss)
def poisson_nll_loss(
    scale: Tensor,
    input: Tensor,
    target: Tensor,
    log_input: bool = True,
    full: bool = False,
    size_average: bool | None = None,
    eps: float = 1e-8,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Poisson:
    """Counts with the rate exp(f) or f + ε."""
    same_shape("poisson_nll_loss", input, target)
    reduction = reduction_of(reduction, size_average, reduce)
    weights = reduced(torch.ones_like(input), input.numel(), scale, reduction)
    if log_input:
        return Poisson(weights, input.exp())
    return Poisson(weights, input + eps, target)


@loss(F.gaussian_nll_loss)
def gaussian_nll_loss(
    scale: Tensor,
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Gaussian:
    """Squared error over twice a variance, which `gaussian_variance` describes."""
    same_shape("gaussian_nll_loss", input, target)
    terms = reduced(torch.ones_like(input), input.numel(), scale, reduction)
    return Gaussian(0.5 / _variance(var, input, eps) * terms, terms)


@loss(F.gaussian_nll_loss, argument="var")
def gaussian_variance(
    scale: Tensor,
    input: Tensor,
    target: Tensor,
    var: Tensor,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> GaussianVariance:
    """The variance `input` around the mean `var`, with the Fisher information 1/(2 v²).

    There is none between mean and variance.
    """
    mean = var  # see `loss`: the differentiable argument is the input
    variance = _variance(input, mean, eps)
    terms = reduced(torch.ones_like(variance), mean.numel(), scale, reduction)
    weights = 0.25 / variance.square() * terms
    # One variance may belong to several entries of the mean, whose information adds up.
    shape = input.shape
    if input.ndim != mean.ndim:
        shape = torch.Size([*shape, 1])
    return GaussianVariance(weights.sum_to_size(shape).reshape(input.shape), terms)


def _variance(var: Tensor | float, mean: Tensor, eps: float) -> Tensor:
    """The variance in the shape of the mean."""
    variance = torch.as_tensor(var, dtype=mean.dtype, device=mean.device)
    one_per_row = variance.ndim > 0 and variance.shape == mean.shape[:-1]
    if one_per_row and variance.shape != mean.shape:
        variance = variance.unsqueeze(-1)
    return variance.clamp(min=eps).expand(mean.shape)
