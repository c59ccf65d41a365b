r"""Weight and bias as one matrix that acts on inputs with a 1 appended.

Inputs $a$ with mean $m$ are $(a, 1) = T (a - m, 1)$: their second moment is
$T \operatorname{diag}(C, 1) T^\top$ with the covariance $C$ and
$T = \begin{pmatrix} I & m \\ 0 & 1 \end{pmatrix}$. In these coordinates damping does not depend on
where the inputs are centered, and the mean, often by far the largest eigenvalue, stays exact if
only diagonal blocks of $C$ are kept. Gradients are multiplied by $T^{-\top}$, then preconditioned,
then multiplied by $T^{-1}$. `center` is $[m]$, or empty for $T = I$.

The factors of a transposed convolution are those of its weight [G·i, o, *k] with outputs in front,
[G, o, i, *k]. `layout` is [G, i], or empty where the factors are in the order of the weight's own
axes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_curv.optimizers.linear_algebra.factors import parts_of


def joined(
    grads: Sequence[Tensor],
    center: Sequence[Tensor] = (),
    layout: Sequence[int] = (),
) -> Tensor:
    r"""The matrix whose block the factors are.

    Args:
        grads: of a parameter, or of weight [o, *i] and bias [o].
        center: $[m]$ or empty.
        layout: of a single parameter, or empty.

    Returns:
        A parameter as it is, or outputs first; $[W \; b] \, T^{-\top}$, [o, prod(i) + 1].
    """
    weight, *bias = grads
    if not bias:
        return outputs_first(weight, layout)
    matrix = torch.cat([weight.flatten(1), bias[0].to(weight.dtype).unsqueeze(1)], dim=1)
    for mean in center:
        matrix[:, :-1].addr_(matrix[:, -1], mean.to(matrix.dtype), alpha=-1)
    return matrix


def outputs_first(weight: Tensor, layout: Sequence[int]) -> Tensor:
    """A weight, [G·i, o, *k], in the order of its factors, [G, o, i, *k]."""
    if not layout:
        return weight
    grouped = weight.reshape(*layout, -1, *weight.shape[2:])
    return grouped.transpose(1, 2).contiguous()


def separated(
    matrix: Tensor,
    like: Sequence[Tensor],
    center: Sequence[Tensor] = (),
    layout: Sequence[int] = (),
) -> list[Tensor]:
    """The opposite for directions: the matrix times $T^{-1}$, in the shapes of `like`."""
    weight, *bias = like
    if not bias:
        return [matrix.transpose(1, 2).reshape(weight.shape) if layout else matrix]
    rows = matrix[:, :-1].contiguous()
    column = matrix[:, -1]
    for mean in center:
        column = column - rows @ mean
    return [rows.view(weight.shape), column]


def centered(second_moment: Tensor, mean: Tensor) -> Tensor:
    r"""The factor in coordinates of the center, $\operatorname{diag}(C, 1)$.

    Args:
        second_moment: of $(a, 1)$, [d + 1, s], whole or split.
        mean: $m$, [d].

    Returns:
        A tensor of the shape of the second moment.
    """
    result = second_moment.clone()
    blocks = parts_of(result, False)
    # Nothing is subtracted from the 1, hence the zero behind the mean.
    pieces = torch.cat([mean, mean.new_zeros(1)]).split(result.shape[1])
    for block, piece in zip(blocks, pieces, strict=True):
        block.addr_(piece, piece, alpha=-1)
    # The mean itself, which stood beside the 1; the blocks are views of the result.
    last_block = blocks[-1]
    last_block[-1, :-1] = last_block[:-1, -1] = 0
    return result
