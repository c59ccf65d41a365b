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
    r"""Whole numbers $\mathrm{round}(s z)$ with standard normal z.

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
        edges = self.width * torch.arange(
            -self.side, self.side + 1, dtype=torch.float64, device="cpu"
        )
        # The masses of bars that are as high as the density is at the edges. Between two edges it
        # is monotone: its lowest and highest points in a bar are there.
        masses = self._masses(edges)
        lowest = torch.minimum(masses[:-1], masses[1:])
        highest = torch.maximum(masses[:-1], masses[1:])

        # The table: under the density everywhere if an entry is worth the least mass per entry.
        counts = _at_most(lowest, ENTRIES)
        self.share = float((lowest / counts)[counts > 0].min() * ENTRIES)
        # Middles of the bars, in halves of a width; 16 bits, so that the table stays in cache.
        middles = torch.arange(1 - 2 * self.side, 2 * self.side, 2, dtype=torch.int16, device="cpu")
        self._table = middles.repeat_interleave(counts)
        # What the table takes of the mass of each bar.
        self._taken = counts.double() * (self.share / ENTRIES)

        # The rest, by rejection: boxes that what is left of every bar, and the tails, lie in.
        self._end = self.side * self.width / deviation
        tails = 2 * math.exp(-(self._end**2) / 2) / math.sqrt(2 * math.pi) / self._end
        rest = torch.cat([highest - self._taken, highest.new_tensor([tails])])
        proposed, unit = _at_least(rest, ENTRIES)
        numbers_of_boxes = torch.arange(len(rest), dtype=torch.int16, device="cpu")
        self._proposals = numbers_of_boxes.repeat_interleave(proposed)
        self._heights = proposed.double() * unit
        self._acceptance = (1 - self.share) / (ENTRIES * unit)
        self._tail_acceptance = tails / float(self._heights[-1])

    def _masses(self, numbers: Tensor) -> Tensor:
        """The density at these numbers, times the width of a bar."""
        scale = self.width / self.deviation / math.sqrt(2 * math.pi)
        z = numbers / self.deviation
        return z.square_().mul_(-0.5).exp_().mul_(scale)

    def draw(self, sizes: Sequence[int], entropy: Entropy) -> Iterator[Tensor]:
        """Independent numbers, a tensor of float64 for each of `sizes`.

        What is rare is drawn for all of them at once. The next tensor takes the memory of the last
        one: every operation of the loop writes to memory that stays in cache.
        """
        places = self._places_of_the_rest(sum(sizes), entropy)
        starts = torch.tensor(list(accumulate(sizes, initial=0)), device="cpu")
        rest = self._rest(len(places), entropy)
        # Where the places of each tensor begin among those of all.
        firsts = torch.searchsorted(places, starts).tolist()
        memory = _Memory(max(sizes, default=0))
        for size, start, first, last in zip(sizes, starts.tolist(), firsts, firsts[1:]):
            # Two bytes name an entry of the table, four more the place in its bar.
            memory.bytes[: 6 * size] = entropy(6 * size)
            bits = memory.bits[: 6 * size]
            bits_of_places, bits_of_entries = bits[: 4 * size], bits[4 * size :]
            indices = memory.indices[:size].copy_(bits_of_entries.view(torch.uint16))
            middles = torch.index_select(self._table, 0, indices, out=memory.middles[:size])
            wide_middles = memory.wide[:size].copy_(middles)
            numbers = memory.numbers[:size].copy_(self._beside(bits_of_places))
            numbers.add_(wide_middles, alpha=self.width / 2)
            yield numbers.index_copy_(0, places[first:last] - start, rest[first:last])

    def _beside(self, bits: Tensor) -> Tensor:
        """Places in a bar, counted from its middle, by 4 random bytes each: signed numbers."""
        return bits.view(torch.int32).bitwise_right_shift_(32 - self.bits)

    def _places_of_the_rest(self, count: int, entropy: Entropy) -> Tensor:
        """Which of `count` numbers are not from the table, each with probability 1 - λ.

        The gaps between them have a geometric distribution, whose inverse is a logarithm.
        """
        chunks, start = [torch.zeros(0, dtype=torch.long, device="cpu")], 0
        while start < count:
            # Six standard deviations more than expected: hardly ever a second round.
            expected = (1 - self.share) * (count - start)
            size = int(expected + 6 * math.sqrt(expected)) + 8
            gaps = _uniform(size, entropy).log_().div_(math.log(self.share)).floor_().add_(1)
            places = gaps.cumsum(0).long().add_(start - 1)
            inside = int(torch.searchsorted(places, count))
            chunks.append(places[:inside])
            start = int(places[-1]) + 1
        return torch.cat(chunks)

    def _rest(self, count: int, entropy: Entropy) -> Tensor:
        """Numbers from what the table leaves out."""
        chunks, missing = [self._taken[:0]], count
        while missing:
            expected = missing / self._acceptance
            proposals = int(expected + 4 * math.sqrt(expected)) + 8
            accepted = self._accepted(proposals, entropy)[:missing]
            chunks.append(accepted)
            missing -= len(accepted)
        return torch.cat(chunks)

    def _accepted(self, count: int, entropy: Entropy) -> Tensor:
        """Those of `count` proposals that lie under the density and above the table."""
        bits = _bits(6 * count, entropy)
        bits_of_places, bits_of_boxes = bits[: 4 * count], bits[4 * count :]
        bars = self._proposals.index_select(0, _indices(bits_of_boxes)).int()
        level = _uniform(count, entropy).mul_(self._heights.index_select(0, bars))
        # The last box is that of the tails; here any bar stands for it, and is overwritten below.
        tails = (bars == 2 * self.side).nonzero().squeeze(1)
        bars[tails] = 0
        middles = bars.double().add_(0.5 - self.side).mul_(self.width)
        numbers = middles.add_(self._beside(bits_of_places))
        left = self._masses(numbers).sub_(self._taken.index_select(0, bars))
        accepted = level <= left
        if len(tails):
            numbers[tails], accepted[tails] = self._tails(len(tails), entropy)
        return numbers.masked_select(accepted)

    def _tails(self, count: int, entropy: Entropy) -> tuple[Tensor, Tensor]:
        """Proposals beyond the bars, from an exponential distribution, and which are accepted."""
        distance, level, side = _uniform(3 * count, entropy).view(3, count).unbind()
        distance = distance.log_().div_(-self._end)
        numbers = distance.mul(self.deviation).floor_().add_(self.side * self.width)
        accepted = level <= distance.square().mul_(-0.5).exp_().mul_(self._tail_acceptance)
        # A whole number n stands for [n, n + 1): on the other side of zero that is -1 - n.
        return numbers.where(side <= 0.5, -1 - numbers), accepted


class _Memory:
    """What is written again and again while numbers are drawn, so that it stays in cache.

    Args:
        size: How many numbers at a time.
    """

    def __init__(self, size: int) -> None:
        self.bytes = bytearray(6 * size)
        # The same memory, as a tensor; torch makes none of an empty buffer.
        self.bits = torch.frombuffer(self.bytes, dtype=torch.uint8) if size else _bits(0, bytes)
        self.numbers = torch.empty(size, dtype=torch.float64, device="cpu")
        self.wide = torch.empty(size, dtype=torch.float64, device="cpu")
        self.indices = torch.empty(size, dtype=torch.int32, device="cpu")
        self.middles = torch.empty(size, dtype=torch.int16, device="cpu")


@lru_cache(maxsize=8)
def rounded_gaussian(deviation: float) -> RoundedGaussian:
    """The same object for the same deviation.

    σC seldom changes, and to make a table takes as long as to draw 10⁵ numbers.
    """
    return RoundedGaussian(deviation)


def _at_most(masses: Tensor, entries: int) -> Tensor:
    """How many entries each mass gets, such that the smallest mass per entry is largest.

    Jefferson's method of apportionment: each further entry goes to the largest quotient of mass and
    entries.
    """
    counts = (masses * (entries / masses.sum())).floor_()
    # A mass gets at most 16 further ones. A larger mass may miss some: the smallest mass per entry
    # is then a little smaller than it could be.
    most = 16
    quotients = masses[:, None] / (counts[:, None] + torch.arange(1, most + 1, device="cpu"))
    largest = quotients.flatten().topk(entries - int(counts.sum())).indices
    receivers = largest.div(most, rounding_mode="floor")
    return counts.long() + receivers.bincount(minlength=len(counts))


def _at_least(masses: Tensor, entries: int) -> tuple[Tensor, float]:
    """How many entries each mass gets, and what an entry is worth.

    No mass is worth more than its entries.
    """
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
    """Indices of entries of a table, from 2 random bytes each."""
    return bits.view(torch.uint16).int()


def _uniform(count: int, entropy: Entropy) -> Tensor:
    """Multiples of 2⁻⁵³ in (0, 1], all equally likely; never 0, whose logarithm is infinite."""
    whole_numbers = _bits(8 * count, entropy).view(torch.int64).bitwise_and_(2**53 - 1)
    return whole_numbers.double().add_(1).mul_(2.0**-53)
