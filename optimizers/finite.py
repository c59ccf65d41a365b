"""One check of many tensors for inf and NaN."""

from collections.abc import Iterable

import torch
from torch import Tensor


def finite_flags(tensors: Iterable[Tensor]) -> list[bool]:
    """Whether each tensor is finite, at the price of a single synchronisation with the device."""
    # Minimum and maximum carry inf and NaN; unlike a sum they do not overflow, unlike `isfinite` they need no mask.
    flags = [torch.stack(tensor.aminmax()).isfinite().all() for tensor in tensors]
    return torch.stack([flag.to(flags[0].device) for flag in flags]).tolist() if flags else []
