r"""The one moment where processes meet: clipped sums are added up, and noise is added once.

Floating-point numbers are no real numbers: which of them :math:`S + \sigma C z` can be, and which not, tells of S
(Mironov, *On Significance of the Least Significant Bits For Differential Privacy*, CCS 2012; for Gaussian noise Jin et
al., *Are We There Yet? Timing and Floating-Point Attacks on Differential Privacy Systems*, S&P 2022, and Holohan &
Braghin, ESORICS 2021). So sums and noise are rounded to multiples of one power of two, and added as integers, without
any further rounding. For S on that grid, :math:`S + \mathrm{round}(z) = \mathrm{round}(S + z)`: a function of what the
Gaussian mechanism would release, which costs no privacy. The grid is 2⁻³⁴ σC or finer; round(z) is drawn as such
(`privacy_gaussian`), so that no multiple is preferred. Rounding d entries of S adds no more than √d 2⁻³⁴ σC to a
sample's share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from lightning_curv.optimizers.privacy_noise import NoiseSource

GRID = 34  # bits of the noise's standard deviation
BLOCK = 2**18  # entries that are worked on at once, in cache


def summed_over_ranks(totals: Sequence[Tensor], stds: Sequence[float], noise: NoiseSource) -> list[Tensor]:
    """Sum tensors over all processes, plus Gaussian noise.

    Process 0 draws the noise before the sum, so that all processes end with the same numbers.

    Args:
        totals: This process' sums, the same shapes everywhere; they are overwritten.
        stds: Standard deviation of the noise of each; 0: neither noise nor rounding.
        noise: Draws it.

    Returns:
        The noisy sums. Cost: one collective of a flat copy in float64; the noise is drawn on the CPU.
    """
    distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if not distributed:
        for total, std in zip(totals, stds, strict=True):
            if std:
                _add_noise(total, std, noise)
        return list(totals)
    draws = dist.get_rank() == 0
    wide = [_wide(total, std, noise if draws else None) for total, std in zip(totals, stds, strict=True)]
    flat = torch.cat([part.flatten() for part in wide])
    dist.all_reduce(flat)
    parts = flat.split([total.numel() for total in totals])
    return [
        (part * (grid(std) if std else 1)).to(total.dtype).view_as(total)
        for part, total, std in zip(parts, totals, stds, strict=True)
    ]


def grid(std: float) -> float:
    """The power of two that sums and noise of this standard deviation are multiples of."""
    return 2.0 ** (math.floor(math.log2(std)) - GRID)


def _add_noise(total: Tensor, std: float, noise: NoiseSource) -> None:
    """Round a sum and add noise, in place and in cache."""
    flat, step = total.view(-1), grid(std)
    size = BLOCK if total.device.type == "cpu" else max(1, flat.numel())
    for part in flat.split(size):
        part.copy_(_units(part, std, noise).mul_(step))


def _wide(total: Tensor, std: float, noise: NoiseSource | None) -> Tensor:
    return _units(total.flatten(), std, noise) if std else total.double()


def _units(values: Tensor, std: float, noise: NoiseSource | None) -> Tensor:
    """Values, with noise if there is a source, in multiples of the grid: whole numbers of float64."""
    step = grid(std)
    found = values.to(torch.float64, copy=True).div_(step).round_()
    if noise is not None:
        found += noise.rounded(values.numel(), std / step).to(found.device)
    return found
