"""Norms that neither underflow nor overflow."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lightning_curv.precision import widest

# Norms outside of these: their squares may be no normal numbers of the type.
_USUAL = {torch.float64: (2.0**-480, 2.0**480), torch.float32: (2.0**-60, 2.0**60)}
# Entries of a block whose squares are added up in float32: 4 to 6 times as fast as in float64.
_BLOCKS = 64, 128, 32, 96, 112, 80, 48
_LARGE = 2**13  # entries that are worth blocks


@cache
def limit(dtype: torch.dtype) -> float:
    """The largest norm of a factor of a gradient: the root of the largest number.

    Times weights that undo a larger one, the other factor may underflow.
    """
    return torch.finfo(torch.promote_types(dtype, torch.float32)).max ** 0.5


def row_norms(tensor: Tensor, start: int) -> Tensor:
    """Norms over all axes from `start` on, in the widest type of the device.

    Squares of float32 are normal numbers of float64. Rows that are in the widest type themselves
    are divided by their largest entry where theirs may be none.
    """
    rows = tensor if tensor.ndim == start + 1 else tensor[..., None].flatten(start)
    dtype = widest(tensor.device)
    block = _block(rows)
    if block:
        return _norms_in_blocks(rows, start, block)
    norms = torch.linalg.vector_norm(rows, dim=start, dtype=dtype)
    # bfloat16 has the range of float32.
    if torch.finfo(tensor.dtype).max > torch.finfo(dtype).max ** 0.5:
        small, large = _USUAL[dtype]
        odd = ~((norms > small) & (norms < large))
        if bool(odd.any()):
            norms[odd] = _scaled_norms(rows[odd].to(dtype))
    return norms


def _block(rows: Tensor) -> int:
    """The entries of a block of `_norms_in_blocks`; 0 where float64 is used throughout."""
    if rows.dtype != torch.float32 or rows.device.type != "cpu" or rows.numel() < _LARGE:
        return 0
    return next((block for block in _BLOCKS if rows.shape[-1] % block == 0), 0)


def _norms_in_blocks(rows: Tensor, start: int, block: int) -> Tensor:
    """Norms of rows of float32 on a CPU, those of blocks in float32 and rounded up.

    Where squares of float32 may underflow or overflow, all of it is in float64.
    """
    of_blocks = torch.linalg.vector_norm(rows.unflatten(start, (-1, block)), dim=start + 1)
    norms = torch.linalg.vector_norm(of_blocks, dim=start, dtype=torch.float64)
    # Whatever the order of the sum: its B squares and B - 1 additions, the root, and one unit for
    # what underflows. That is √P 2⁻⁶³ at most, and less than 2⁻²⁸ of the square of a usual norm.
    norms *= 1 + (block / 2 + 2) * torch.finfo(torch.float32).eps / 2
    small, large = 2.0**-49 * rows.shape[-1] ** 0.5, 2.0**60
    lowest, highest = norms.aminmax()
    if not (float(lowest) > small and float(highest) < large):
        odd = ~((norms > small) & (norms < large))
        norms[odd] = torch.linalg.vector_norm(rows[odd], dim=-1, dtype=torch.float64)
    return norms


def _scaled_norms(rows: Tensor) -> Tensor:
    """Norms of rows `[R, E]`, divided by their largest entry before they are squared."""
    if not rows.shape[-1]:
        return rows.new_zeros(len(rows))
    largest = rows.abs().amax(-1, keepdim=True)
    # Rows of zeros, and those that are not finite, have no scale.
    scaled = largest.isfinite() & (largest > 0)
    largest = largest.where(scaled, torch.ones_like(largest))
    return torch.linalg.vector_norm(rows / largest, dim=-1) * largest[:, 0]


def product_norms(g: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Norms of products of two factors from those of the factors.

    They are infinite where one factor is beyond `limit` and the other is not zero.
    """
    products = g * x
    larger = torch.maximum(g, x)
    # The usual case is told by one number, which costs nothing where it need not be waited for; a
    # norm that is NaN is none of it.
    at_hand = products.device.type == "cpu" and products.numel()
    if at_hand and float(larger.amax()) <= limit(dtype):
        return products
    return products.masked_fill_((larger > limit(dtype)) & (products != 0), torch.inf)
