r"""Rounded Gaussian numbers from random bits, without an evaluation of a function for most of them.

The density is cut into bars of one width, a power of two. A table of 2¹⁶ entries names each bar in
proportion to its lowest point, so that an entry drawn by 16 random bits, and further bits for the
place within its bar, make a number from under the density: a share λ of all, about 0.99. What the
table leaves out, λ times its histogram below the density, is drawn by rejection (von Neumann,
1951), from bars and exponential tails (Marsaglia, 1964); at which places such numbers are is drawn
by the gaps between them. The mixture of both is the Gaussian itself: composition as in Marsaglia,
MacLaren & Bray, *A Fast Procedure for Generating Normal Random Variables*, CACM 1964.

All places within a bar are whole numbers, drawn by their bits. So no whole number is skipped or
preferred by the rounding of an evaluation in floating point, as with methods that transform uniform
numbers: probabilities are right relatively, to about 2⁻⁴⁶, and beyond five standard deviations to
2⁻¹⁵. Numbers reach to twelve standard deviations, beyond which there is less than 2⁻¹¹⁰.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

Entropy = Callable[[int], bytes]

ENTRIES = 2**16  # of the table
FINENESS = 6  # a bar is between 2⁻⁷ and 2⁻⁶ standard deviations wide
REACH = 5  # standard deviations that bars cover; further out are the tails


class RoundedGaussian:
    r"""Whole numbers :math:`\mathrm{round}(s z)` with standard normal z.

    Args:
        deviation: s, between 2²⁰ and 2³⁶: densities are taken at whole numbers, in place of their
            mean over a unit.

    Attributes:
        share: λ, the share that comes from the table.

    Cost: 6 random bytes a number, and 24 more for the rest; 3 ns each on one core, where OpenSSL
        makes 8 bytes in 1 ns.
    """

    def __init__(self, deviation: float) -> None:
        self.deviation = deviation
        self.bits = math.floor(math.log2(deviation)) - FINENESS  # of the width of a bar
        self.width = 2.0**self.bits
        self.side = math.ceil(REACH * deviation / self.width)  # bars on either side of zero
        edges = (
            torch.arange(-self.side, self.side + 1, dtype=torch.float64, device="cpu") * self.width
        )
        masses = self._masses(edges)  # of bars as high as the density is at the edges
        lowest, highest = (
            torch.minimum(masses[:-1], masses[1:]),
            torch.maximum(masses[:-1], masses[1:]),
        )
        counts = _at_most(lowest, ENTRIES)
        self.share = float((lowest / counts)[counts > 0].min() * ENTRIES)
        bars = torch.arange(
            1 - 2 * self.side, 2 * self.side, 2, dtype=torch.int16, device="cpu"
        )  # small: in cache
        self._table = bars.repeat_interleave(counts)
        self._taken = counts.double() * (
            self.share / ENTRIES
        )  # of the mass of each bar by the table
        self._end = self.side * self.width / deviation
        tails = 2 * math.exp(-(self._end**2) / 2) / math.sqrt(2 * math.pi) / self._end
        rest = torch.cat([highest - self._taken, highest.new_tensor([tails])])
        proposed, unit = _at_least(rest, ENTRIES)
        self._proposals = torch.arange(
            len(rest), dtype=torch.int16, device="cpu"
        ).repeat_interleave(proposed)
        self._heights = (
            proposed.double() * unit
        )  # of the boxes that the rest of every bar, and of the tails, lies in
        self._acceptance = (1 - self.share) / (ENTRIES * unit)
        self._tail_acceptance = tails / float(self._heights[-1])

    def _masses(self, numbers: Tensor) -> Tensor:
        """The density at these numbers, times the width of a bar."""
        scale = self.width / self.deviation / math.sqrt(2 * math.pi)
        return (numbers / self.deviation).square_().mul_(-0.5).exp_().mul_(scale)

    def draw(self, sizes: Sequence[int], entropy: Entropy) -> Iterator[Tensor]:
        """Independent numbers, a tensor of float64 for each of ``sizes``; the next one takes the memory of the last.

        What is rare is drawn for all at once.
        """
        places = self._places_of_the_rest(sum(sizes), entropy)
        starts = torch.tensor([*accumulate(sizes, initial=0)], device="cpu")
        rest = self._rest(len(places), entropy)
        here = torch.searchsorted(places, starts).tolist()
        memory = _Memory(max(sizes, default=0))
        for size, start, first, last in zip(sizes, starts.tolist(), here, here[1:]):
            bits = memory.bits[: 6 * size]
            memory.bytes[: 6 * size] = entropy(6 * size)
            indices = memory.indices[:size].copy_(bits[4 * size :].view(torch.uint16))
            middles = torch.index_select(self._table, 0, indices, out=memory.middles[:size])
            numbers = memory.numbers[:size].copy_(self._beside(bits[: 4 * size]))
            numbers.add_(memory.wide[:size].copy_(middles), alpha=self.width / 2)
            yield numbers.index_copy_(0, places[first:last] - start, rest[first:last])

    def _beside(self, bits: Tensor) -> Tensor:
        """Places in a bar, counted from its middle, by 4 random bytes each."""
        return bits.view(torch.int32).bitwise_right_shift_(32 - self.bits)

    def _places_of_the_rest(self, count: int, entropy: Entropy) -> Tensor:
        """Which of ``count`` numbers are not from the table, each with probability 1 - λ: by geometric gaps."""
        found, start = [torch.zeros(0, dtype=torch.long, device="cpu")], 0
        while start < count:
            expected = (1 - self.share) * (count - start)
            size = int(expected + 6 * math.sqrt(expected)) + 8
            gaps = _uniform(size, entropy).log_().div_(math.log(self.share)).floor_().add_(1)
            places = gaps.cumsum(0).long().add_(start - 1)
            found.append(places[: int(torch.searchsorted(places, count))])
            start = int(places[-1]) + 1
        return torch.cat(found)

    def _rest(self, count: int, entropy: Entropy) -> Tensor:
        """Numbers from what the table leaves out."""
        found, missing = [self._taken[:0]], count
        while missing:
            proposals = missing / self._acceptance
            some = self._accepted(int(proposals + 4 * math.sqrt(proposals)) + 8, entropy)[:missing]
            found.append(some)
            missing -= len(some)
        return torch.cat(found)

    def _accepted(self, count: int, entropy: Entropy) -> Tensor:
        """Those of ``count`` proposals that lie under the density and above the table."""
        bits = _bits(6 * count, entropy)
        bars = self._proposals.index_select(0, _indices(bits[4 * count :])).int()
        level = _uniform(count, entropy).mul_(self._heights.index_select(0, bars))
        tails = (bars == 2 * self.side).nonzero().squeeze(1)
        bars[tails] = 0
        numbers = (
            bars.double()
            .add_(0.5 - self.side)
            .mul_(self.width)
            .add_(self._beside(bits[: 4 * count]))
        )
        accepted = level <= self._masses(numbers).sub_(self._taken.index_select(0, bars))
        if len(tails):
            numbers[tails], accepted[tails] = self._tails(len(tails), entropy)
        return numbers.masked_select(accepted)

    def _tails(self, count: int, entropy: Entropy) -> tuple[Tensor, Tensor]:
        """Proposals beyond the bars, as an exponential distribution has them, and which are accepted."""
        distance, level, side = _uniform(3 * count, entropy).view(3, count).unbind()
        distance = distance.log_().div_(-self._end)
        numbers = distance.mul(self.deviation).floor_().add_(self.side * self.width)
        accepted = level <= distance.square().mul_(-0.5).exp_().mul_(self._tail_acceptance)
        return numbers.where(side <= 0.5, -1 - numbers), accepted


class _Memory:
    """What is written again and again while numbers are drawn, so that it stays in cache.

    Args:
        size: How many numbers at a time.
    """

    def __init__(self, size: int) -> None:
        self.bytes = bytearray(6 * size)
        self.bits = torch.frombuffer(self.bytes, dtype=torch.uint8) if size else _bits(0, bytes)
        self.numbers, self.wide = torch.empty(2, size, dtype=torch.float64, device="cpu").unbind()
        self.indices = torch.empty(size, dtype=torch.int32, device="cpu")
        self.middles = torch.empty(size, dtype=torch.int16, device="cpu")


@lru_cache(maxsize=8)
def rounded_gaussian(deviation: float) -> RoundedGaussian:
    """The same for the same deviation: σC seldom changes, and a table takes as long as 10⁵ numbers."""
    return RoundedGaussian(deviation)


def _at_most(masses: Tensor, entries: int) -> Tensor:
    """How many entries each mass gets, such that the smallest mass per entry is largest (Jefferson's method)."""
    counts = (masses * (entries / masses.sum())).floor_()
    # a larger mass may miss: the smallest mass per entry is then a little smaller than it could be
    most = 16
    quotients = masses[:, None] / (counts[:, None] + torch.arange(1, most + 1, device="cpu"))
    given = (
        quotients.flatten()
        .topk(entries - int(counts.sum()))
        .indices.div(most, rounding_mode="floor")
    )
    return counts.long() + given.bincount(minlength=len(counts))


def _at_least(masses: Tensor, entries: int) -> tuple[Tensor, float]:
    """How many entries each mass gets, and what an entry is worth, such that no mass is worth more than its entries."""
    unit = float(masses.sum()) / (entries - len(masses))
    counts = (masses / unit).ceil_().long()
    counts[0] += entries - int(counts.sum())
    return counts, unit


def _bits(size: int, entropy: Entropy) -> Tensor:
    """Random bytes."""
    if not size:
        return torch.zeros(0, dtype=torch.uint8, device="cpu")
    return torch.frombuffer(bytearray(entropy(size)), dtype=torch.uint8)


def _indices(bits: Tensor) -> Tensor:
    """Of entries of a table, from 2 bytes each."""
    return bits.view(torch.uint16).int()


def _uniform(count: int, entropy: Entropy) -> Tensor:
    """Multiples of 2⁻⁵³ in (0, 1], all alike."""
    whole = _bits(8 * count, entropy).view(torch.int64).bitwise_and_(2**53 - 1)
    return whole.double().add_(1).mul_(2.0**-53)
