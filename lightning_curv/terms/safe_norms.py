"""Norms that neither underflow nor overflow."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lightning_curv.precision import widest

# Norms outside of these: their squares may be no normal numbers of the type.
_USUAL = {torch.float64: (2.0**-480, 2.0**480), torch.float32: (2.0**-60, 2.0**60)}


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
    norms = torch.linalg.vector_norm(rows, dim=start, dtype=dtype)
    # bfloat16 has the range of float32.
    if torch.finfo(tensor.dtype).max > torch.finfo(dtype).max ** 0.5:
        small, large = _USUAL[dtype]
        odd = ~((norms > small) & (norms < large))
        if bool(odd.any()):
            norms[odd] = _scaled_norms(rows[odd].to(dtype))
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
