"""float64 where a device has it: MPS has none, nor have some GPUs of Intel."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache
def has_float64(device: torch.device) -> bool:
    """Whether a device has numbers of double precision; it is asked once."""
    try:
        torch.empty(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return False
    return True


def widest(device: torch.device) -> torch.dtype:
    """The widest type of real numbers of a device."""
    return torch.float64 if has_float64(device) else torch.float32


def wide(tensor: Tensor) -> Tensor:
    """A tensor in the widest type of its device: for sums, and for differences of what is alike."""
    return tensor.to(widest(tensor.device))


def in_float64(tensor: Tensor) -> Tensor:
    """A tensor in float64, on the CPU where its device has none: for what needs the digits."""
    if has_float64(tensor.device):
        return tensor.double()
    return tensor.cpu().double()
