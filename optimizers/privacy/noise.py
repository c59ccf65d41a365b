"""Gaussian noise that nothing else draws from, from a cryptographic generator."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_curv.optimizers.privacy.gaussian import rounded_gaussian
from lightning_curv.optimizers.warn import warn

try:
    from ssl import RAND_bytes as _library_bytes
except ImportError:  # a Python without OpenSSL
    _library_bytes = os.urandom


class NoiseSource:
    """Gaussian numbers from a generator of its own, never torch's.

    By default the bits come from the generator of OpenSSL, AES-256 in counter mode (NIST SP
    800-90A), which the operating system seeds and which is seeded anew in the course of time and
    after a fork. Nothing of it can be saved: a run that is resumed draws other noise, and so do two
    that are resumed from one checkpoint. torch's own generator for CPUs has 32 bits of seed, which
    can be found by trying.

    Args:
        seed: Makes the noise repeatable, for tests: **not secure**. Whoever finds or knows it takes
            the noise away again. The state is saved.
        secure: Draw from the operating system's entropy directly, for those who trust no library.
            Four times slower.

    Example:
        >>> next(NoiseSource().rounded([6], deviation=2.0**34)).shape
        torch.Size([6])
    """

    def __init__(self, seed: int | None = None, secure: bool = False) -> None:
        if secure and seed is not None:
            raise ValueError(
                f"`secure=True` has no seed, found `noise_seed={seed}`; leave one of them out."
            )
        self.seed, self.secure = seed, secure
        self._generator: torch.Generator | None = None
        if seed is not None:
            self._generator = torch.Generator().manual_seed(seed)
            warn(
                f"draws repeatable noise, found `noise_seed={seed}`: not secure, for tests only. "
                "Leave it out."
            )

    def rounded(self, sizes: Sequence[int], deviation: float) -> Iterator[Tensor]:
        """Independent Gaussian numbers, rounded.

        Args:
            sizes: How many, for every tensor that is asked for.
            deviation: Standard deviation, before they are rounded; between 2²⁰ and 2³⁶.

        Returns:
            Tensors of float64 on the CPU.
        """
        if self._generator is None:
            entropy = os.urandom if self.secure else _library_bytes
            return rounded_gaussian(deviation).draw(sizes, entropy)
        draw = partial(torch.randn, generator=self._generator, dtype=torch.float64, device="cpu")
        return (draw(size).mul_(deviation).round_() for size in sizes)

    def state_dict(self) -> dict[str, Any]:
        """The state of a seeded generator."""
        return {} if self._generator is None else {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a seeded generator was; without a seed nothing is drawn twice anyway."""
        saved = state.get("generator")
        if saved is not None and self._generator is not None:
            self._generator.set_state(saved.cpu())
