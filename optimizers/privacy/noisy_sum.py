r"""The one moment where processes meet: clipped sums are added up, and noise is added once.

Floating-point numbers are no real numbers: which of them :math:`S + \sigma C z` can be, and which
not, tells of S (Mironov, *On Significance of the Least Significant Bits For Differential Privacy*,
CCS 2012; for Gaussian noise Jin et al., *Are We There Yet? Timing and Floating-Point Attacks on
Differential Privacy Systems*, S&P 2022, and Holohan & Braghin, ESORICS 2021). So sums and noise are
rounded to multiples of one power of two, and added as integers, without any further rounding. For S
on that grid, :math:`S + \mathrm{round}(z) = \mathrm{round}(S + z)`: a function of what the Gaussian
mechanism would release, which costs no privacy. The grid is 2⁻³⁴ σC or finer; round(z) is drawn as
such (`privacy_gaussian`), so that no multiple is preferred. Rounding d entries of S adds no more
than √d 2⁻³⁴ σC to a sample's share.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from operator import attrgetter

import torch
from torch import Tensor
from torch import distributed as dist

from lightning_curv.optimizers.privacy.noise import NoiseSource

GRID = 34  # bits of the noise's standard deviation
PIECE = 2**16  # entries that are worked on at once, in cache
PIECES = 32  # that share what is rare in the noise


def summed_over_ranks(
    totals: Sequence[Tensor], stds: Sequence[float], noise: NoiseSource
) -> list[Tensor]:
    """Sum tensors over all processes, plus Gaussian noise.

    Process 0 draws the noise before the sum, so that all processes end with the same numbers.

    Args:
        totals: This process' sums, the same shapes everywhere; they are overwritten.
        stds: Standard deviation of the noise of each; 0: neither noise nor rounding.
        noise: Draws it.

    Returns:
        The noisy sums. Cost: one collective of a flat copy in float64; the noise is drawn on the
        CPU.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        for piece, units in _units(totals, stds, noise):
            piece.set(units.mul_(piece.step))
        return list(totals)
    flat = torch.cat(
        [
            units.clone()
            for _, units in _units(totals, stds, noise if dist.get_rank() == 0 else None)
        ]
    )
    dist.all_reduce(flat)
    pieces = _pieces(totals, stds)
    for piece, units in zip(pieces, flat.split([piece.size for piece in pieces]), strict=True):
        piece.set(units.mul_(piece.step))
    return list(totals)


def grid(std: float) -> float:
    """The power of two that sums and noise of this standard deviation are multiples of."""
    return 2.0 ** (math.floor(math.log2(std)) - GRID)


@dataclass
class _Piece:
    """Parts of tensors that are worked on together.

    Attributes:
        parts: Their entries, flat views.
        std: Standard deviation of the noise.
        size: The number of entries.
    """

    parts: list[Tensor]
    std: float
    size: int

    @property
    def step(self) -> float:
        """The unit of what is added up."""
        return grid(self.std) if self.std else 1.0

    def get(self, memory: Tensor) -> Tensor:
        """The entries in units, whole numbers if there is noise, in some memory of float64."""
        values = memory[: self.size].copy_(
            self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)
        )
        return values.div_(self.step).round_() if self.std else values

    def set(self, values: Tensor) -> None:
        """Overwrite the entries."""
        torch._foreach_copy_(self.parts, values.split([part.numel() for part in self.parts]))


def _pieces(tensors: Sequence[Tensor], stds: Sequence[float]) -> list[_Piece]:
    """All entries, small tensors together and large ones apart."""
    found: list[_Piece] = []
    for tensor, std in zip(tensors, stds, strict=True):
        flat = tensor.view(-1)
        for part in flat.split(PIECE) if flat.numel() > PIECE else [flat]:
            last, size = found[-1] if found else None, part.numel()
            if (
                last is not None
                and last.std == std
                and last.size + size <= PIECE
                and _alike(last.parts[0], part)
            ):
                last.parts.append(part)
                last.size += size
            else:
                found.append(_Piece([part], std, size))
    return found


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device


def _units(
    totals: Sequence[Tensor], stds: Sequence[float], noise: NoiseSource | None
) -> Iterator[tuple[_Piece, Tensor]]:
    """The pieces with their entries in units, with noise if there is a source; the next takes the last one's memory."""
    pieces = _pieces(totals, stds)
    size = max((piece.size for piece in pieces), default=0)
    memory = {
        device: torch.empty(size, dtype=torch.float64, device=device)
        for device in {t.device for t in totals}
    }
    for std, run in groupby(pieces, key=attrgetter("std")):
        while some := [*islice(run, PIECES)]:
            drawn: Iterable[Tensor | None] = len(some) * [None]
            if std and noise is not None:
                drawn = noise.rounded([piece.size for piece in some], std / grid(std))
            for piece, numbers in zip(some, drawn, strict=True):
                units = piece.get(memory[piece.parts[0].device])
                yield piece, units if numbers is None else units.add_(numbers.to(units.device))
