"""Kronecker factors of a parameter's block: matrices [d, d] or diagonals [d], alone or batched over groups.

A block is a list of factors in the row-major order of the parameter's axes. `batched` says that each of them has a
leading group dimension [G]; it is what tells a full factor [d, d] from a batched diagonal [G, d].
"""

import math
from collections.abc import Sequence

from torch import Tensor


def is_batched(factors: Sequence[Tensor]) -> bool:
    """Whether the factors carry a leading group dimension."""
    return any(factor.dim() == 3 for factor in factors)


def is_diagonal(factor: Tensor, batched: bool) -> bool:
    """Whether the factor is stored as its diagonal."""
    return factor.dim() - batched == 1


def diagonal(factor: Tensor, batched: bool) -> Tensor:
    """The factor's diagonal, [d], or [G, d] if batched."""
    return factor if is_diagonal(factor, batched) else factor.diagonal(dim1=-2, dim2=-1)


def mean_eigenvalue(factor: Tensor, batched: bool) -> Tensor:
    """Trace over dimension, [], or [G] if batched."""
    return diagonal(factor, batched).mean(dim=-1)


def block_size(factors: Sequence[Tensor], batched: bool) -> int:
    """Number of parameters that a block of these factors covers."""
    groups = factors[0].shape[0] if batched else 1
    return groups * math.prod(factor.shape[-1] for factor in factors)


def limit_size(factor: Tensor, max_size: int, batched: bool) -> Tensor:
    """The factor, or its diagonal where the matrix has more than `max_size` rows."""
    return diagonal(factor, batched) if factor.shape[-1] > max_size else factor


def kronecker_matmul(factors: Sequence[Tensor], v: Tensor, batched: bool) -> Tensor:
    r"""Multiply a tensor by a Kronecker product of matrices, $(F_1 \otimes \dots \otimes F_k) \, v$.

    Each factor acts on one axis of $v$ seen as a [d_1, …, d_k] tensor; the product is never formed.

    Args:
        factors: matrices [d_i, d_i] or diagonals [d_i]; all with a leading [G] if `batched`.
        v: G · d_1 ⋯ d_k elements in row-major order, of any shape.
        batched: whether the factors carry a leading group dimension, the first axis of `v`.

    Returns:
        The product, in the shape of `v`.

    Cost: $|v| \sum_i d_i$ time (a diagonal: $|v|$), one copy of `v`.

    >>> import torch
    >>> kronecker_matmul([torch.tensor([1.0, 2.0]), 3 * torch.eye(2)], torch.ones(2, 2), batched=False)
    tensor([[3., 3.],
            [6., 6.]])
    """
    groups = factors[0].shape[0] if batched else 1
    out, left = v, 1
    for factor in factors:
        size = factor.shape[-1]
        out = out.reshape(groups, left, size, -1)
        if is_diagonal(factor, batched):
            out = out * factor.reshape(-1, 1, size, 1)
        elif out.shape[-1] == 1:  # one matrix product instead of `left` matrix-vector products
            out = out.squeeze(-1) @ factor.mT
        else:
            out = factor.reshape(-1, 1, size, size) @ out
        left *= size
    return out.reshape(v.shape)
