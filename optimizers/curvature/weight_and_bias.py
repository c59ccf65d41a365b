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

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_curv.optimizers.linear_algebra.factors import parts_of


def joined(
    grads: Sequence[Tensor], center: Sequence[Tensor] = (), layout: Sequence[int] = ()
) -> Tensor:
    r"""A parameter as it is; weight [o, *i] and bias [o] as $[W \; b] \, T^{-\top}$, [o, prod(i) + 1]."""
    weight, *bias = grads
    if not bias:
        return outputs_first(weight, layout)
    matrix = torch.cat([weight.flatten(1), bias[0].to(weight.dtype).unsqueeze(1)], dim=1)
    for mean in center:
        matrix[:, :-1].addr_(matrix[:, -1], mean.to(matrix.dtype), alpha=-1)
    return matrix


def outputs_first(weight: Tensor, layout: Sequence[int]) -> Tensor:
    """A weight, [G·i, o, *k], in the order of its factors, [G, o, i, *k]."""
    return (
        weight.reshape(*layout, -1, *weight.shape[2:]).transpose(1, 2).contiguous()
        if layout
        else weight
    )


def separated(
    matrix: Tensor,
    like: Sequence[Tensor],
    center: Sequence[Tensor] = (),
    layout: Sequence[int] = (),
) -> list[Tensor]:
    """Weight and bias of the matrix times $T^{-1}$, in the shapes of `like`."""
    weight, *bias = like
    if not bias:
        return [matrix.transpose(1, 2).reshape(weight.shape) if layout else matrix]
    rows, column = matrix[:, :-1].contiguous(), matrix[:, -1]
    for mean in center:
        column = column - rows @ mean
    return [rows.view(weight.shape), column]


def centered(second_moment: Tensor, mean: Tensor) -> Tensor:
    r"""$\operatorname{diag}(C, 1)$ from the second moment of $(a, 1)$, [d + 1, s], whole or split, and $m$, [d]."""
    result = second_moment.clone()
    pieces = torch.cat([mean, mean.new_zeros(1)]).split(result.shape[1])
    for part, piece in zip(parts_of(result, False), pieces, strict=True):
        part.addr_(piece, piece, alpha=-1)
    last = parts_of(result, False)[-1]
    last[-1, :-1] = last[:-1, -1] = 0
    return result
