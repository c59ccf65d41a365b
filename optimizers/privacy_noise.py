"""Gaussian noise that nothing else draws from."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor


class NoiseSource:
    """Standard normal numbers from a generator of its own, never the global one.

    Args:
        seed: Makes the noise repeatable, for tests; whoever knows it can take the noise away again. Default: a seed
            from the operating system's entropy.
        secure: Draw every number from the operating system's entropy instead of a generator; four draws are averaged,
            so that the bits of a float do not give the underlying numbers away (Holohan & Braghin, *Secure Random
            Sampling in Differential Privacy*, ESORICS 2021). About twenty times slower.

    Example:
        >>> NoiseSource(secure=True).like(torch.zeros(2, 3)).shape
        torch.Size([2, 3])
    """

    def __init__(self, seed: int | None = None, secure: bool = False) -> None:
        if secure and seed is not None:
            raise ValueError(f"`secure=True` has no seed, found `noise_seed={seed}`; leave one of them out.")
        self.seed, self.secure = seed, secure
        self._generator: torch.Generator | None = None
        self._state: Tensor | None = None

    def like(self, tensor: Tensor) -> Tensor:
        """Independent standard normal numbers of the shape and on the device of ``tensor``, in float32 or better."""
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        if self.secure:
            return _from_entropy(tensor.shape).to(tensor.device, dtype)
        generator = self._generator_on(tensor.device)
        return torch.randn(tensor.shape, generator=generator, dtype=dtype, device=generator.device).to(tensor.device)

    def _generator_on(self, device: torch.device) -> torch.Generator:
        if self._generator is None:
            self._generator = torch.Generator(device)
            self._generator.manual_seed(int.from_bytes(os.urandom(8), "little") if self.seed is None else self.seed)
            if self._state is not None:
                self._restore(self._generator, self._state)
                self._state = None
        return self._generator

    @staticmethod
    def _restore(generator: torch.Generator, state: Tensor) -> None:
        if state.numel() == generator.get_state().numel():  # else saved on another kind of device: go on with fresh
            generator.set_state(state.cpu())

    def state_dict(self) -> dict[str, Any]:
        """The generator's state."""
        state = self._state if self._generator is None else self._generator.get_state()
        return {} if state is None or self.secure else {"generator": state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a generator was, so that no noise is used twice."""
        saved = state.get("generator")
        if saved is not None and not self.secure:
            self._state, self._generator = saved, None


def _from_entropy(shape: torch.Size) -> Tensor:
    """Box and Muller's method on 53-bit uniform numbers, the mean of four draws scaled back to variance one."""
    count = math.prod(shape)
    bits = torch.frombuffer(bytearray(os.urandom(8 * 4 * 2 * max(count, 1))), dtype=torch.int64)
    uniform = ((bits & (2**53 - 1)).double() + 0.5) * 2.0**-53
    radius, angle = uniform.reshape(2, 4, -1)
    draws = (-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()
    return (draws.sum(0) / 2)[:count].reshape(shape)
