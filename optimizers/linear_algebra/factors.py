"""Kronecker factors of a parameter's block: matrices, diagonals or block-diagonal matrices.

A block is a list of factors in the row-major order of the parameter's axes. Each is a matrix [d,
d], a diagonal [d], or the diagonal blocks of a matrix, [d, s] with s < d: row r has the s columns
from s·⌊r/s⌋ on, zeros where the last block is narrower. `batched` says that all have a leading
group dimension [G]; it is what tells a matrix [d, d] from a batched diagonal [G, d].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_curv.kernels.onednn import mm
from lightning_curv.kernels.symmetric import gram


def is_batched(factors: Sequence[Tensor]) -> bool:
    """Whether the factors carry a leading group dimension."""
    return any(factor.dim() == 3 for factor in factors)


def is_diagonal(factor: Tensor, batched: bool) -> bool:
    """Whether the factor is stored as its diagonal."""
    return factor.dim() - batched == 1


def diagonal(factor: Tensor, batched: bool) -> Tensor:
    """The factor's diagonal, [d], or [G, d] if batched; a view unless the factor is split."""
    if is_diagonal(factor, batched):
        return factor
    diagonals = [part.diagonal(dim1=-2, dim2=-1) for part in parts_of(factor, batched)]
    if len(diagonals) == 1:
        return diagonals[0]
    return torch.cat(diagonals, dim=-1)


def rows(factor: Tensor, batched: bool) -> int:
    """The number of rows of a factor, d."""
    return factor.shape[int(batched)]


def parts_of(factor: Tensor, batched: bool) -> list[Tensor]:
    """The diagonal blocks of a factor, views: only itself unless it is split."""
    if is_diagonal(factor, batched):
        return [factor]
    height, width = factor.shape[-2:]
    if height == width:
        return [factor]
    # The last block may be narrower; behind its columns are zeros.
    return [part[..., : part.shape[-2]] for part in factor.split(width, dim=-2)]


def partwise(
    function: Callable[..., Tensor],
    *factors: Tensor,
    batched: bool,
) -> Tensor:
    """A factor whose diagonal blocks are a function of those of other factors.

    Args:
        function: Gives a matrix of the shape of its arguments.
        factors: All of the same shape, whole or split in the same way.
        batched: Whether they carry a leading group dimension.
    """
    if len(parts_of(factors[0], batched)) == 1:
        return function(*factors)
    # Behind a narrower last block zeros are left.
    result = torch.zeros_like(factors[0])
    targets = parts_of(result, batched)
    arguments = zip(*(parts_of(factor, batched) for factor in factors), strict=True)
    for target, parts in zip(targets, arguments, strict=True):
        target.copy_(function(*parts))
    return result


def part_size(rows: int, size: int) -> int:
    """The number of rows of the diagonal blocks of a split factor, the last of which may have less.

    All blocks have about `size` rows.

    >>> part_size(785, 256), part_size(300, 256), part_size(384, 256)
    (262, 300, 192)
    """
    # Rounded, not up: one block of 300 rows is better than two of 150 where 256 were asked for.
    blocks = max(1, round(rows / size))
    return math.ceil(rows / blocks)


def split_gram(x: Tensor, size: int) -> Tensor:
    """The diagonal blocks of x xᵀ, [d, size]; if d is at most `size` the whole matrix, [d, d].

    Args:
        x: [d, R].
        size: number of rows of a block.
    """
    if len(x) <= size:
        return gram(x)
    result = x.new_zeros(len(x), size)
    for part, piece in zip(parts_of(result, False), x.split(size), strict=True):
        part.copy_(gram(piece))
    return result


def mean_eigenvalue(factor: Tensor, batched: bool) -> Tensor:
    """The trace over the dimension, [], or [G] if batched."""
    return diagonal(factor, batched).mean(dim=-1)


def block_size(factors: Sequence[Tensor], batched: bool) -> int:
    """The number of parameters that a block of these factors covers."""
    groups = factors[0].shape[0] if batched else 1
    size_of_group = math.prod(rows(factor, batched) for factor in factors)
    return groups * size_of_group


def limit_size(factor: Tensor, max_size: int, batched: bool) -> Tensor:
    """The factor, or its diagonal where the matrix has more than `max_size` rows."""
    if rows(factor, batched) <= max_size:
        return factor
    return diagonal(factor, batched)


def kronecker_matmul(factors: Sequence[Tensor], v: Tensor, batched: bool) -> Tensor:
    r"""Multiply a tensor by a Kronecker product, $(F_1 \otimes \dots \otimes F_k) \, v$.

    Each factor acts on one axis of $v$ seen as a [d_1, …, d_k] tensor; the product is never formed.

    Args:
        factors: of the axes; all with a leading [G] if `batched`.
        v: G · d_1 ⋯ d_k elements in row-major order, of any shape.
        batched: whether the factors carry a leading group dimension, the first axis of `v`.

    Returns:
        The product, in the shape of `v`.

    Cost: $|v| \sum_i d_i$ time (a diagonal: $|v|$), one copy of `v`.

    >>> import torch
    >>> factors = [torch.tensor([1.0, 2.0]), 3 * torch.eye(2)]
    >>> kronecker_matmul(factors, torch.ones(2, 2), batched=False)
    tensor([[3., 3.],
            [6., 6.]])
    """
    groups = factors[0].shape[0] if batched else 1
    # `left` is the number of rows of all factors that have been applied: the axis of the next one
    # is the third of [G, left, d_i, right].
    out = v
    left = 1
    for factor in factors:
        size = rows(factor, batched)
        out = out.reshape(groups, left, size, -1)
        if is_diagonal(factor, batched):
            out = out * factor.reshape(-1, 1, size, 1)
        else:
            out = _matmul(parts_of(factor, batched), out)
        left *= size
    return out.reshape(v.shape)


def _matmul(parts: Sequence[Tensor], v: Tensor) -> Tensor:
    """A block-diagonal matrix, or one matrix [d, d] or [G, d, d], times [G, L, d, R]."""
    if len(parts) == 1:
        return _product(parts[0], v)
    sizes = [part.shape[-1] for part in parts]
    pieces = v.split(sizes, dim=2)
    return torch.cat(
        [_product(part, piece) for part, piece in zip(parts, pieces, strict=True)], dim=2
    )


def _product(matrix: Tensor, v: Tensor) -> Tensor:
    """A matrix [d, d] or [G, d, d] times [G, L, d, R], as few large products as possible."""
    groups, left, size, right = v.shape
    # One matrix product instead of L matrix-vector products.
    if groups == 1 and right == 1:
        rows_of_v = v.reshape(left, size)
        product = mm(rows_of_v, matrix.reshape(size, size).mT)
        return product.view(v.shape)
    if groups == left == 1:
        columns_of_v = v.reshape(size, right)
        product = mm(matrix.reshape(size, size), columns_of_v)
        return product.view(v.shape)
    if right == 1:
        product = v.squeeze(-1) @ matrix.mT
        return product.unsqueeze(-1)
    one_matrix_per_group = matrix.reshape(-1, 1, size, size)
    return one_matrix_per_group @ v
