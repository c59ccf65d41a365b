r"""The quadratic model of the loss in the span of a few directions.

$$q(w) = \tfrac12 w^\top (M + R) w + b^\top w, \qquad
  M_{ij} = u_i^\top G u_j, \quad R_{ij} = \sum_l \lambda_l \langle u_i, u_j \rangle_l, \quad
  b_i = \langle g, u_i \rangle$$

for directions $u_i$ over all parameters. With the Jacobian $J$ of the recorded columns
$G = \sum_{v,n} J_{vn} J_{vn}^\top$, so that $M = S S^\top$ with the directional derivatives
$S_{i,vn} = \langle J_{vn}, u_i \rangle$: no pass through the network, forward or backward, is
needed for it.

Source: J. Martens, R. Grosse, *Optimizing Neural Networks with Kronecker-factored Approximate
    Curvature*, ICML 2015,
sections 6.4 and 7.
"""

import math
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from lightning_curv.optimizers.step_size.directional import directional_derivatives
from lightning_curv.terms.jacobian import Jacobian

# share of a direction's squared length, in the metric of the model, that must not lie in others
DEPENDENT = 1e-7

Matrix = Sequence[Sequence[float]]


def curvature_along(jacobians: Sequence[dict[int, Jacobian]], vectors: Sequence[Tensor]) -> Tensor:
    """$M$, [K, K] in float64, the mean over batches.

    Args:
        jacobians: of each batch, by the number of the parameter; those of one batch are of the same
            columns.
        vectors: the part of the directions that belongs to each parameter, [K, *p].
    """
    moments = []
    for batch in jacobians:
        products = sum(
            directional_derivatives(jacobian, vectors[i]) for i, jacobian in batch.items()
        )
        if isinstance(products, Tensor):
            wide = products.flatten(1).to(_wide(products))
            moments.append(wide @ wide.mT)
    return moments[0] if len(moments) == 1 else torch.stack(moments).mean(0)


def inner_products(first: Tensor, second: Tensor) -> Tensor:
    """Of all pairs of rows, in float64: first [K, P], second [L, P] → [K, L]."""
    return (first @ second.mT).to(_wide(first))


def minimizer(curvature: Matrix, slope: Sequence[float]) -> list[float]:
    r"""$w$ with $(M + R) w = -b$; of directions that are linear combinations of others only the first ones are used.

    Args:
        curvature: $M + R$, [K, K].
        slope: $b$, [K].

    Returns:
        The weights of the directions, NaN where anything is not finite.

    >>> minimizer([[2.0, 0.0], [0.0, 0.0]], [4.0, 0.0])
    [-2.0, 0.0]
    """
    if not all(map(math.isfinite, chain(slope, *curvature))):
        return [math.nan] * len(slope)
    # Directions differ in length by orders of magnitude: a unit diagonal, then elimination as of a
    # Gram matrix.
    scales = [row[i] ** -0.5 if row[i] > 0 else 0.0 for i, row in enumerate(curvature)]
    rows = [
        [*(s * c * t for c, t in zip(row, scales, strict=True)), -s * b]
        for row, s, b in zip(curvature, scales, slope, strict=True)
    ]
    solution = [0.0] * len(slope)
    used = []
    for i in range(len(rows)):
        row = rows[i]
        if row[i] > DEPENDENT:
            used.append(i)
            rows = [
                r if r is row else [x - r[i] / row[i] * y for x, y in zip(r, row, strict=True)]
                for r in rows
            ]
    for i in used:
        solution[i] = scales[i] * rows[i][-1] / rows[i][i]
    return solution


def change(curvature: Matrix, slope: Sequence[float], w: Sequence[float]) -> float:
    """$q(w)$ with the given curvature."""
    quadratic = sum(
        c * a * b for row, a in zip(curvature, w, strict=True) for c, b in zip(row, w, strict=True)
    )
    return 0.5 * quadratic + sum(b * a for b, a in zip(slope, w, strict=True))


def shortened(curvature: float, slope: float, most: float) -> float:
    r"""The factor $\tau \le 1$ of a step at which the model $\tau s + \tau^2 c$ falls by no more than `most`.

    Args:
        curvature: $c \ge 0$.
        slope: $s$.
        most: largest decrease, may be inf.

    >>> shortened(1.0, -2.0, most=0.75)
    0.5
    """
    if not -(slope + curvature) > most:
        return 1.0
    return 2 * most / (math.sqrt(max(slope * slope - 4 * curvature * most, 0.0)) - slope)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64
