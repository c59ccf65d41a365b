"""One check of many tensors for inf and NaN."""

from collections.abc import Iterable

import torch
from torch import Tensor


def finite_flags(tensors: Iterable[Tensor]) -> list[bool]:
    """Whether each tensor is finite, at the price of a single synchronisation with the device."""
    # t - t is 0, or NaN where t is not finite; unlike a sum of t it does not overflow.
    flags = [(tensor - tensor).sum() for tensor in tensors]
    return torch.stack([flag.to(flags[0]) for flag in flags]).isfinite().tolist() if flags else []
