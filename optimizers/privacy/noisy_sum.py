r"""The one moment where processes meet: clipped sums are added up, and noise is added once.

Floating-point numbers are no real numbers: which of them $S + \sigma C z$ can be, and which
not, tells of S (Mironov, *On Significance of the Least Significant Bits For Differential Privacy*,
CCS 2012; for Gaussian noise Jin et al., *Are We There Yet? Timing and Floating-Point Attacks on
Differential Privacy Systems*, S&P 2022, and Holohan & Braghin, ESORICS 2021). So sums and noise are
rounded to multiples of one power of two, and added as integers, without any further rounding. For S
on that grid, $S + \mathrm{round}(z) = \mathrm{round}(S + z)$: a function of what the Gaussian
mechanism would release, which costs no privacy. The grid is 2⁻³⁴ σC or finer; round(z) is drawn as
such (`privacy_gaussian`), so that no multiple is preferred. Rounding d entries of S adds no more
than √d 2⁻³⁴ σC to a sample's share.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice

import torch
from torch import Tensor
from torch import distributed as dist

from lightning_curv.distributed.failures import processes
from lightning_curv.optimizers.linear_algebra.collectives import summed
from lightning_curv.optimizers.privacy.noise import NoiseSource
from lightning_curv.precision import widest

GRID = 34  # bits of the noise's standard deviation
PIECE = 2**16  # entries that are worked on at once, in cache
PIECES = 32  # that share what is rare in the noise
UPLOADED = 2**8  # pieces whose noise goes to another device at once


def summed_over_ranks(
    totals: Sequence[Tensor],
    stds: Sequence[float],
    noise: NoiseSource,
    divisors: Sequence[float] | None = None,
) -> list[Tensor]:
    """Sum tensors over all processes, plus Gaussian noise.

    Process 0 draws the noise before the sum, so that all processes end with the same numbers.

    Args:
        totals: The sums of this process, the same shapes everywhere; they are overwritten.
        stds: Standard deviation of the noise of each; 0: neither noise nor rounding.
        noise: Draws it.
        divisors: What each noisy sum is divided by in the end; default: nothing.

    Returns:
        The noisy sums, or quotients; `totals` themselves.

    Cost: one collective of a flat copy in float64; the noise is drawn on the CPU.
    """
    pieces = _pieces(totals, stds, divisors or len(totals) * [1.0])
    if processes() == 1:
        for piece, units in _units(pieces, noise):
            piece.set(units)
        return list(totals)
    # Of every one of W processes, noise would add up to √W times σC.
    source = noise if dist.get_rank() == 0 else None
    # Copies: the next piece takes the memory of the last one. What is added up over the processes
    # are whole numbers, so that their order does not matter.
    shares = [units.clone() for _, units in _units(pieces, source)]
    for piece, units in zip(pieces, summed(shares), strict=True):
        piece.set(units)
    return list(totals)


def grid(std: float) -> float:
    """The power of two that sums and noise of this standard deviation are multiples of."""
    # Of σC alone, which is public: a grid that followed the sums would tell of them.
    return 2.0 ** (math.floor(math.log2(std)) - GRID)


@dataclass
class _Piece:
    """Parts of tensors that are worked on together.

    Attributes:
        parts: Their entries, flat views.
        std: Standard deviation of the noise.
        divisor: What is divided by in the end.
        size: The number of entries.
    """

    parts: list[Tensor]
    std: float
    divisor: float
    size: int

    @property
    def device(self) -> torch.device:
        """Where the entries are."""
        return self.parts[0].device

    @property
    def step(self) -> float:
        """The unit of what is added up."""
        return grid(self.std) if self.std else 1.0

    def get(self, memory: Tensor) -> Tensor:
        """The entries in units, whole numbers if there is noise, in some memory of float64."""
        entries = self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)
        values = (memory if len(memory) == self.size else memory[: self.size]).copy_(entries)
        # The inverse of a power of two is one: the product is exact, and faster than a quotient.
        return values.mul_(1 / self.step).round_() if self.std else values

    def set(self, units: Tensor) -> None:
        """Overwrite the entries, and the units with what they are worth."""
        worth = units.mul_(self.step / self.divisor)
        if len(self.parts) == 1:
            self.parts[0].copy_(worth)
        else:
            torch._foreach_copy_(self.parts, worth.split([part.numel() for part in self.parts]))


def _pieces(
    tensors: Sequence[Tensor], stds: Sequence[float], divisors: Sequence[float]
) -> list[_Piece]:
    """All entries, small tensors together and large ones apart."""
    pieces: list[_Piece] = []
    for tensor, std, divisor in zip(tensors, stds, divisors, strict=True):
        # A view, so that what is written into a piece is written into the tensor.
        flat = tensor.view(-1)
        for part in flat.split(PIECE) if flat.numel() > PIECE else [flat]:
            if pieces and _fits(part, std, divisor, pieces[-1]):
                pieces[-1].parts.append(part)
                pieces[-1].size += part.numel()
            else:
                pieces.append(_Piece([part], std, divisor, part.numel()))
    return pieces


def _fits(part: Tensor, std: float, divisor: float, piece: _Piece) -> bool:
    """Whether the piece has room for the part, and noise of the same size."""
    has_room = piece.size + part.numel() <= PIECE
    same_noise = (piece.std, piece.divisor) == (std, divisor)
    return has_room and same_noise and _alike(piece.parts[0], part)


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device


def _units(pieces: Sequence[_Piece], noise: NoiseSource | None) -> Iterator[tuple[_Piece, Tensor]]:
    """The pieces with their entries in units, with noise if there is a source.

    The entries of the next piece take the memory of the last one's.
    """
    size = max((piece.size for piece in pieces), default=0)
    devices = {piece.device for piece in pieces}
    memory = {device: _memory(size, device) for device in devices}
    for (std, device), alike in groupby(pieces, key=lambda piece: (piece.std, piece.device)):
        place = memory[device].device
        # What is rare in the noise is drawn once for some pieces, whose numbers stay in cache.
        together = PIECES if place.type == "cpu" else UPLOADED
        while some := list(islice(alike, together)):
            drawn: Iterable[Tensor | None] = len(some) * [None]
            if std and noise is not None:
                drawn = _drawn([piece.size for piece in some], std / grid(std), noise, place)
            for piece, numbers in zip(some, drawn, strict=True):
                units = piece.get(memory[device])
                if numbers is not None:
                    units.add_(numbers)
                yield piece, units


def _drawn(
    sizes: Sequence[int], deviation: float, noise: NoiseSource, device: torch.device
) -> Iterable[Tensor]:
    """Rounded Gaussian numbers on a device: one copy takes all of them there."""
    numbers = noise.rounded(sizes, deviation)
    if device.type == "cpu":
        return numbers
    packed = torch.empty(sum(sizes), dtype=torch.float64, device="cpu")
    for part, drawn in zip(packed.split([*sizes]), numbers, strict=True):
        part.copy_(drawn)
    return packed.to(device).split([*sizes])


def _memory(size: int, device: torch.device) -> Tensor:
    """Numbers with the digits of the grid; a device without float64 leaves them on the CPU."""
    place = device if widest(device) == torch.float64 else torch.device("cpu")
    return torch.empty(size, dtype=torch.float64, device=place)
