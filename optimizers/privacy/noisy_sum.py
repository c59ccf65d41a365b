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
from itertools import cycle, groupby, islice

import torch
from torch import Tensor
from torch import distributed as dist

from lightning_curv.distributed.failures import processes
from lightning_curv.optimizers.linear_algebra.collectives import summed
from lightning_curv.optimizers.privacy.noise import NoiseSource
from lightning_curv.precision import widest

GRID = 34  # bits of the noise's standard deviation
PIECE = 2**14  # entries that are worked on at once, in cache
PIECES = 128  # that share what is rare in the noise
UPLOADED = 2**10  # pieces whose noise goes to another device at once
USUAL = 2.0**-60, 2.0**60  # standard deviations whose units float32 has room for


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
        The noisy sums, or quotients; `totals` themselves, where the noise is neither tiny nor huge.

    Cost: one collective of a flat copy in float64; the noise is drawn on the CPU.
    """
    steps = [grid(std) if std else 1.0 for std in stds]
    totals = [_roomy(total, std) for total, std in zip(totals, stds, strict=True)]
    noisy = [(total, step) for total, std, step in zip(totals, stds, steps, strict=True) if std]
    if noisy:
        entries = [total for total, _ in noisy]
        # From here on in units, whole numbers: the product with a power of two is exact.
        torch._foreach_mul_(entries, [1 / step for _, step in noisy])
        torch._foreach_round_(entries)
    pieces = _pieces(totals, stds)
    if processes() == 1:
        for piece, units in _units(pieces, noise):
            piece.set(units)
    else:
        # Of every one of W processes, noise would add up to √W times σC.
        source = noise if dist.get_rank() == 0 else None
        # Copies: the next piece takes the memory of the last one. What is added up over the
        # processes are whole numbers, so that their order does not matter.
        shares = [units.clone() for _, units in _units(pieces, source)]
        for piece, units in zip(pieces, summed(shares), strict=True):
            piece.set(units)
    worth = [step / divisor for step, divisor in zip(steps, divisors or cycle([1.0]))]
    torch._foreach_mul_(totals, worth)
    return totals


def _roomy(total: Tensor, std: float) -> Tensor:
    """The tensor, or one of the widest type if units of this noise are none of its numbers."""
    # What is left to float32 has less than 2¹²⁸ units, unless the noise is 2⁹³ times smaller.
    usual = not std or USUAL[0] < std < USUAL[1]
    return total if usual else total.to(widest(total.device))


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
        size: The number of entries.
    """

    parts: list[Tensor]
    std: float
    size: int

    @property
    def device(self) -> torch.device:
        """Where the entries are."""
        return self.parts[0].device

    def get(self, memory: Tensor) -> Tensor:
        """The entries, in some memory of float64."""
        entries = self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)
        return (memory if memory.numel() == self.size else memory[: self.size]).copy_(entries)

    def set(self, units: Tensor) -> None:
        """Overwrite the entries."""
        if len(self.parts) == 1:
            self.parts[0].copy_(units)
        else:
            sizes = [part.numel() for part in self.parts]
            torch._foreach_copy_(self.parts, units.split_with_sizes(sizes))


def _pieces(tensors: Sequence[Tensor], stds: Sequence[float]) -> list[_Piece]:
    """All entries, small tensors together and large ones apart."""
    pieces: list[_Piece] = []
    for tensor, std in zip(tensors, stds, strict=True):
        # A view, so that what is written into a piece is written into the tensor.
        flat = tensor.view(-1)
        for part in flat.split(PIECE) if flat.numel() > PIECE else [flat]:
            if pieces and _fits(part, std, pieces[-1]):
                pieces[-1].parts.append(part)
                pieces[-1].size += part.numel()
            else:
                pieces.append(_Piece([part], std, part.numel()))
    return pieces


def _fits(part: Tensor, std: float, piece: _Piece) -> bool:
    """Whether the piece has room for the part, and noise of the same size."""
    has_room = piece.size + part.numel() <= PIECE
    return has_room and piece.std == std and _alike(piece.parts[0], part)


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device


def _units(pieces: Sequence[_Piece], noise: NoiseSource | None) -> Iterator[tuple[_Piece, Tensor]]:
    """The pieces with their entries, and with noise if there is a source.

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
