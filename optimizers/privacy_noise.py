"""Gaussian noise that nothing else draws from, from a cryptographic generator."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_curv.optimizers.warn import warn

try:
    from ssl import RAND_bytes as _library_bytes
except ImportError:  # a Python without OpenSSL
    _library_bytes = os.urandom  # type: ignore[assignment]

_MANTISSA, _ONE = 2**52 - 1, 1023 << 52  # of float64: the bits behind the point, and those of 1.0
_RARE = 2.0**-12  # uniform numbers below it get further digits


class NoiseSource:
    """Standard normal numbers from a generator of its own, never torch's.

    By default the bits come from the generator of OpenSSL, AES-256 in counter mode (NIST SP 800-90A), which the
    operating system seeds and which is seeded anew in the course of time and after a fork. Nothing of it can be saved:
    a run that is resumed draws other noise, and so do two that are resumed from one checkpoint. torch's own generator
    for CPUs has 32 bits of seed, which can be found by trying.

    Args:
        seed: Makes the noise repeatable, for tests: **not secure**. Whoever finds or knows it takes the noise away
            again. The state is saved.
        secure: Draw from the operating system's entropy directly, and average four draws as Holohan & Braghin (*Secure
            Random Sampling in Differential Privacy*, ESORICS 2021) recommend where results are not rounded; here they
            are (`summed_over_ranks`), so that this is for those who trust no library. Ten times slower.

    Example:
        >>> NoiseSource().normal(6).dtype
        torch.float64
    """

    def __init__(self, seed: int | None = None, secure: bool = False) -> None:
        if secure and seed is not None:
            raise ValueError(f"`secure=True` has no seed, found `noise_seed={seed}`; leave one of them out.")
        self.seed, self.secure = seed, secure
        self._generator: torch.Generator | None = None
        if seed is not None:
            self._generator = torch.Generator().manual_seed(seed)
            warn(f"draws repeatable noise, found `noise_seed={seed}`: not secure, for tests only. Leave it out.")

    def normal(self, count: int) -> Tensor:
        """Independent standard normal numbers, ``[count]`` of float64 on the CPU."""
        if self._generator is not None:
            return torch.randn(count, generator=self._generator, dtype=torch.float64)
        if self.secure:
            return _normal(4 * count, os.urandom).view(4, count).sum(0).div_(2)
        return _normal(count, _library_bytes)

    def like(self, tensor: Tensor) -> Tensor:
        """Independent standard normal numbers of the shape and on the device of ``tensor``, in float32 or better."""
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        return self.normal(tensor.numel()).view(tensor.shape).to(tensor.device, dtype)

    def state_dict(self) -> dict[str, Any]:
        """The state of a seeded generator."""
        return {} if self._generator is None else {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a seeded generator was; without a seed nothing is drawn twice anyway."""
        saved = state.get("generator")
        if saved is not None and self._generator is not None:
            self._generator.set_state(saved.cpu())


def _normal(count: int, entropy: Callable[[int], bytes]) -> Tensor:
    """Box and Muller's method: a pair of normal numbers from 104 random bits and more in the tails."""
    pairs = (count + 1) // 2
    radius, angle = _uniform(2 * pairs, entropy).view(2, pairs).unbind()
    if pairs and float(radius.min()) < _RARE:  # without them no number would be larger than 8.5
        rare = (radius < _RARE).nonzero().squeeze(1)
        radius[rare] += 2.0**-52 * (_uniform(len(rare), entropy) - 1)
    radius.log_().mul_(-2).sqrt_()
    angle.mul_(2 * math.pi)
    found = torch.empty(2, pairs, dtype=torch.float64)
    torch.cos(angle, out=found[0])
    torch.sin(angle, out=found[1])
    return found.mul_(radius).view(-1)[:count]


def _uniform(count: int, entropy: Callable[[int], bytes]) -> Tensor:
    """Multiples of 2⁻⁵² in (0, 1], all alike: random mantissas in front of the exponent of 1."""
    if not count:
        return torch.zeros(0, dtype=torch.float64)
    bits = torch.frombuffer(bytearray(entropy(8 * count)), dtype=torch.int64)
    return bits.bitwise_and_(_MANTISSA).bitwise_or_(_ONE).view(torch.float64).neg_().add_(2)
