r"""The quadratic model of the loss in the span of a few directions.

$$q(w) = \tfrac12 w^\top (M + R) w + b^\top w, \qquad
  M_{ij} = u_i^\top G u_j, \quad R_{ij} = \sum_l \lambda_l \langle u_i, u_j \rangle_l, \quad
  b_i = \langle g, u_i \rangle$$

for directions $u_i$ over all parameters. With the Jacobian $J$ of the recorded columns
$G = \sum_{v,n} J_{vn} J_{vn}^\top$, so that $M = S S^\top$ with the directional derivatives
$S_{i,vn} = \langle J_{vn}, u_i \rangle$: no pass through the network, forward or backward, is
needed for it.

Source: J. Martens, R. Grosse, *Optimizing Neural Networks with Kronecker-factored Approximate
    Curvature*, ICML 2015, sections 6.4 and 7.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from lightning_curv.devices import on_one_device
from lightning_curv.precision import widest
from lightning_curv.terms.directional import directional_derivatives
from lightning_curv.terms.jacobian import Jacobian

# The share of a direction's squared length in the metric of the model that others must not have.
DEPENDENT = 1e-7

Matrix = Sequence[Sequence[float]]


def curvature_along(jacobians: Sequence[dict[int, Jacobian]], vectors: Sequence[Tensor]) -> Tensor:
    """The matrix $M$, [K, K] in float64, the mean over batches.

    Args:
        jacobians: of each batch, by the number of the parameter; those of one batch are of the same
            columns.
        vectors: the part of the directions that belongs to each parameter, [K, *p].
    """
    moments = []
    for batch in jacobians:
        derivatives = None
        for i, jacobian in batch.items():
            found = directional_derivatives(jacobian, vectors[i])
            # Parameters may be on several devices.
            derivatives = (
                found if derivatives is None else derivatives + found.to(derivatives.device)
            )
        # None of a batch in which no parameter has a Jacobian.
        if derivatives is not None:
            s = derivatives.flatten(1).to(widest(derivatives.device))
            moments.append(s @ s.mT)
    if len(moments) == 1:
        return moments[0]
    return torch.stack(on_one_device(moments)).mean(0)


def inner_products(first: Tensor, second: Tensor) -> Tensor:
    """The inner products of all pairs of rows: first [K, P], second [L, P] → [K, L]."""
    return first @ second.mT


def minimizer(curvature: Matrix, slope: Sequence[float]) -> list[float]:
    r"""The weights $w$ with $(M + R) w = -b$.

    Of directions that are linear combinations of others only the first ones are used.

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
    # Directions differ in length by orders of magnitude: rows and columns are scaled to a unit
    # diagonal, of a Gram matrix then.
    scales = [row[i] ** -0.5 if row[i] > 0 else 0.0 for i, row in enumerate(curvature)]
    rows = []
    for row, scale, b in zip(curvature, scales, slope, strict=True):
        scaled_row = [scale * entry * other for entry, other in zip(row, scales, strict=True)]
        rows.append([*scaled_row, -scale * b])
    # Gauss-Jordan elimination. A pivot is what of a direction's unit length no other one has.
    used = []
    for i in range(len(rows)):
        pivot_row = rows[i]
        if pivot_row[i] > DEPENDENT:
            used.append(i)
            rows = [row if row is pivot_row else _eliminated(row, pivot_row, i) for row in rows]
    solution = [0.0] * len(slope)
    for i in used:
        solution[i] = scales[i] * rows[i][-1] / rows[i][i]
    return solution


def _eliminated(row: list[float], pivot_row: list[float], i: int) -> list[float]:
    """The row minus the multiple of another one that leaves zero in column i."""
    multiple = row[i] / pivot_row[i]
    return [entry - multiple * pivot for entry, pivot in zip(row, pivot_row, strict=True)]


def change(curvature: Matrix, slope: Sequence[float], w: Sequence[float]) -> float:
    """The value $q(w)$ with the given curvature and slope."""
    quadratic = sum(
        entry * first * second
        for row, first in zip(curvature, w, strict=True)
        for entry, second in zip(row, w, strict=True)
    )
    linear = sum(b * weight for b, weight in zip(slope, w, strict=True))
    return 0.5 * quadratic + linear


def shortened(curvature: float, slope: float, most: float) -> float:
    r"""The factor $\tau \le 1$ that shortens a step which promises too much.

    It is the largest one at which the model $\tau s + \tau^2 c$ falls by no more than `most`.

    Args:
        curvature: $c \ge 0$.
        slope: $s$.
        most: largest decrease, may be inf.

    >>> shortened(1.0, -2.0, most=0.75)
    0.5
    """
    promised = -(slope + curvature)
    if not promised > most:
        return 1.0
    # The smaller root of τ² c + τ s + most = 0, without cancellation, as s is negative.
    discriminant = max(slope * slope - 4 * curvature * most, 0.0)
    return 2 * most / (math.sqrt(discriminant) - slope)
