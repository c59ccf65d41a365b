r"""The quadratic model of the loss in the span of a few directions.

$$q(w) = \tfrac12 w^\top (M + R) w + b^\top w, \qquad
  M_{ij} = u_i^\top G u_j, \quad R_{ij} = \sum_l \lambda_l \langle u_i, u_j \rangle_l, \quad
  b_i = \langle g, u_i \rangle$$

for directions $u_i$ over all parameters. With the Jacobian $J$ of the recorded columns
$G = \sum_{v,n} J_{vn} J_{vn}^\top$, so that $M = S S^\top$ with the directional derivatives
$S_{i,vn} = \langle J_{vn}, u_i \rangle$: no pass through the network, forward or backward, is needed for it.

Source: J. Martens, R. Grosse, *Optimizing Neural Networks with Kronecker-factored Approximate Curvature*, ICML 2015,
sections 6.4 and 7.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_curv.jacobian import Jacobian

from .directional import directional_derivatives


def curvature_along(jacobians: Sequence[Jacobian], vectors: Sequence[Tensor]) -> Tensor:
    """$M$, [K, K] in float64.

    Args:
        jacobians: of each parameter; of the same columns.
        vectors: the part of the directions that belongs to each parameter, [K, *p].
    """
    products = sum(directional_derivatives(j, u) for j, u in zip(jacobians, vectors, strict=True))
    assert isinstance(products, Tensor)
    wide = products.flatten(1).to(_wide(products))
    return wide @ wide.mT


def inner_products(first: Tensor, second: Tensor) -> Tensor:
    """Of all pairs of rows, in float64: first [K, *p], second [L, *p] → [K, L]."""
    return (first.flatten(1) @ second.flatten(1).mT).to(_wide(first))


def minimizer(curvature: Tensor, slope: Tensor) -> Tensor:
    r"""$w = -(M + R)^{+} b$, [K]; directions that are linear combinations of others do no harm.

    Args:
        curvature: $M + R$, [K, K].
        slope: $b$, [K].

    >>> minimizer(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([4.0, 0.0]))
    tensor([-2.,  0.])
    """
    # Directions differ in length by orders of magnitude: scale to a unit diagonal before deciding what is singular.
    scale = curvature.diagonal().clamp_min(torch.finfo(curvature.dtype).tiny).rsqrt()
    scaled = scale[:, None] * curvature * scale
    finite = scaled.isfinite().all()
    # The decomposition of NaN would raise; the result is NaN instead, and the step is rejected.
    values, vectors = torch.linalg.eigh(torch.where(finite, scaled, torch.eye(len(scale)).to(scaled)))
    inverse = torch.where(values > 1e-7 * values[-1], 1 / values, torch.zeros_like(values))
    w = -scale * (vectors @ (inverse * (vectors.mT @ (scale * slope)))) + 0.0
    return torch.where(finite, w, torch.full_like(w, math.nan))


def change(curvature: Tensor, slope: Tensor, w: Tensor) -> Tensor:
    """$q(w)$ with the given curvature, []."""
    return 0.5 * w @ curvature @ w + slope @ w


def shortened(curvature: Tensor, slope: Tensor, most: float) -> Tensor:
    r"""The factor $\tau \le 1$ of a step at which the model $\tau s + \tau^2 c$ falls by no more than `most`, [].

    Args:
        curvature: $c \ge 0$, [].
        slope: $s$, [].
        most: largest decrease, may be inf.

    >>> shortened(torch.tensor(1.0), torch.tensor(-2.0), most=0.75)
    tensor(0.5000)
    """
    if not math.isfinite(most):
        return torch.ones_like(slope)
    root = (slope.square() - 4 * curvature * most).clamp_min(0).sqrt()
    factor = 2 * most / (root - slope)
    return torch.where(-(slope + curvature) > most, factor, torch.ones_like(factor))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64
