r"""Rounded Gaussian numbers from random bits, without an evaluation of a function for most of them.

The density is cut into bars of one width, a power of two. A table of 2¹⁶ entries names each bar in
proportion to its lowest point, so that an entry drawn by 16 random bits, and further bits for the
place within its bar, make a number from under the density: a share λ of all, about 0.99. What the
table leaves out, λ times its histogram below the density, is drawn by rejection (von Neumann,
1951), from boxes on the bars and exponential tails (Marsaglia, 1964); at which places such numbers
are is drawn by the gaps between them. The mixture of both is the Gaussian itself: composition as in
Marsaglia, MacLaren & Bray, *A Fast Procedure for Generating Normal Random Variables*, CACM 1964.

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

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Entropy = Callable[[int], bytes]
Floats = NDArray[np.float64]
Whole = NDArray[np.int64]

ENTRIES = 2**16  # of the table
FINENESS = 6  # a bar is between 2⁻⁷ and 2⁻⁶ standard deviations wide
REACH = 5  # standard deviations that bars cover; further out are the tails
BOXES = 4  # on a bar, a power of two, each as high as what is left there: fewer are in vain


class RoundedGaussian:
    r"""Whole numbers $\mathrm{round}(s z)$ with standard normal z.

    What is rare are arrays of a few thousand numbers, which NumPy handles with less ado than torch.

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
        # The masses of boxes that are as high as the density is at their edges. Between two edges
        # it is monotone: its lowest and highest points in a box, or a bar, are there.
        boxes_on_a_side = BOXES * self.side
        places = np.arange(-boxes_on_a_side, boxes_on_a_side + 1, dtype=np.float64)
        masses = self._masses(self.width / BOXES * places)
        highest = np.maximum(masses[:-1], masses[1:])
        of_bars = BOXES * masses[::BOXES]
        lowest = np.minimum(of_bars[:-1], of_bars[1:])

        # The table: under the density everywhere if an entry is worth the least mass per entry.
        counts = _at_most(lowest, ENTRIES)
        taking_part = counts > 0
        self.share = float((lowest[taking_part] / counts[taking_part]).min() * ENTRIES)
        # Middles of the bars, in halves of a width; 16 bits, so that the table stays in cache.
        middles = np.arange(1 - 2 * self.side, 2 * self.side, 2, dtype=np.int16)
        self._table = torch.from_numpy(middles.repeat(counts))
        # What the table takes of the mass of each box.
        self._taken = (counts * (self.share / ENTRIES / BOXES)).repeat(BOXES)

        # The rest, by rejection: boxes that what is left of every bar, and the tails, lie in.
        self._end = self.side * self.width / deviation
        tails = 2 * math.exp(-(self._end**2) / 2) / math.sqrt(2 * math.pi) / self._end
        rest = np.append(highest - self._taken, tails)
        proposed, unit = _at_least(rest, ENTRIES)
        self._proposals = np.arange(len(rest), dtype=np.int16).repeat(proposed)
        self._heights = proposed * unit
        self._acceptance = (1 - self.share) / (ENTRIES * unit)
        self._tail_acceptance = tails / float(self._heights[-1])

    def _masses(self, numbers: Floats) -> Floats:
        """The density at these numbers, times the width of a box."""
        scale = self.width / BOXES / self.deviation / math.sqrt(2 * math.pi)
        exponents = np.square(numbers / self.deviation) * -0.5
        masses: Floats = np.exp(exponents, out=exponents)
        masses *= scale
        return masses

    def draw(self, sizes: Sequence[int], entropy: Entropy) -> Iterator[Tensor]:
        """Independent numbers, a tensor of float64 for each of `sizes`.

        What is rare is drawn for all of them at once. The next tensor takes the memory of the last
        one: every operation of the loop writes to memory that stays in cache.
        """
        places = self._places_of_the_rest(sum(sizes), entropy)
        rest = self._rest(len(places), entropy)
        starts = [*accumulate(sizes, initial=0)]
        # Where the places of each tensor begin among those of all.
        firsts = places.searchsorted(starts).tolist()
        whole = memory = _Memory(max(sizes, default=0))
        for size, start, first, last in zip(sizes, starts, firsts, firsts[1:]):
            if size != memory.size:
                memory = _Memory(size, whole)
            self._from_table(memory, entropy)
            memory.array_of_numbers[places[first:last] - start] = rest[first:last]
            yield memory.numbers

    def _from_table(self, memory: _Memory, entropy: Entropy) -> None:
        """Numbers from under the bars: two bytes name an entry, four more the place in its bar."""
        size = memory.size
        bits = entropy(6 * size)
        memory.array_of_whole[:] = np.frombuffer(bits, np.uint16, size, offset=4 * size)
        torch.index_select(self._table, 0, memory.whole, out=memory.middles)
        memory.wide.copy_(memory.middles)
        # The places take the memory of the entries, which are not needed again.
        _beside(bits, size, self.bits, out=memory.array_of_whole)
        memory.numbers.copy_(memory.whole).add_(memory.wide, alpha=self.width / 2)

    def _places_of_the_rest(self, count: int, entropy: Entropy) -> Whole:
        """Which of `count` numbers are not from the table, each with probability 1 - λ.

        The gaps between them have a geometric distribution, whose inverse is a logarithm.
        """
        chunks, start = [np.zeros(0, np.int64)], 0
        while start < count:
            # Six standard deviations more than expected: hardly ever a second round.
            expected = (1 - self.share) * (count - start)
            gaps = _uniform(int(expected + 6 * math.sqrt(expected)) + 8, entropy)
            np.log(gaps, out=gaps)
            gaps /= math.log(self.share)
            np.floor(gaps, out=gaps)
            gaps += 1
            places = gaps.cumsum().astype(np.int64) + (start - 1)
            chunks.append(places[: places.searchsorted(count)])
            start = int(places[-1]) + 1
        return np.concatenate(chunks)

    def _rest(self, count: int, entropy: Entropy) -> Floats:
        """Numbers from what the table leaves out."""
        chunks, missing = [np.zeros(0)], count
        while missing:
            expected = missing / self._acceptance
            proposals = int(expected + 4 * math.sqrt(expected)) + 8
            accepted = self._accepted(proposals, entropy)[:missing]
            chunks.append(accepted)
            missing -= len(accepted)
        return np.concatenate(chunks)

    def _accepted(self, count: int, entropy: Entropy) -> Floats:
        """Those of `count` proposals that lie under the density and above the table."""
        bits = entropy(6 * count)
        boxes = self._proposals.take(np.frombuffer(bits, np.uint16, count, offset=4 * count))
        level = _uniform(count, entropy)
        level *= self._heights.take(boxes)
        # The last box is that of the tails; here any box stands for it, and is overwritten below.
        (tails,) = (boxes == len(self._taken)).nonzero()
        boxes[tails] = 0
        # Middles, in widths of a box.
        numbers = boxes.astype(np.float64) + (0.5 - BOXES * self.side)
        numbers *= self.width / BOXES
        numbers += _beside(bits, count, self.bits - BOXES.bit_length() + 1)
        accepted = level <= self._masses(numbers) - self._taken.take(boxes)
        if len(tails):
            numbers[tails], accepted[tails] = self._tails(len(tails), entropy)
        return numbers[accepted]

    def _tails(self, count: int, entropy: Entropy) -> tuple[Floats, NDArray[np.bool_]]:
        """Proposals beyond the bars, from an exponential distribution, and which are accepted."""
        distance, level, side = _uniform(3 * count, entropy).reshape(3, count)
        distance = np.log(distance) / -self._end
        numbers = np.floor(distance * self.deviation) + self.side * self.width
        accepted = level <= np.exp(-0.5 * np.square(distance)) * self._tail_acceptance
        # A whole number n stands for [n, n + 1): on the other side of zero that is -1 - n.
        return np.where(side <= 0.5, -1 - numbers, numbers), accepted


class _Memory:
    """What is written again and again while numbers are drawn, so that it stays in cache.

    Args:
        size: The number of numbers.
        whole: Memory whose beginning it is; `None`: new memory.
    """

    def __init__(self, size: int, whole: _Memory | None = None) -> None:
        self.size = size
        self.numbers: Tensor = _new(size, torch.float64) if whole is None else whole.numbers[:size]
        # The middles of their bars, and the same as the table has them.
        self.wide: Tensor = _new(size, torch.float64) if whole is None else whole.wide[:size]
        self.middles: Tensor = _new(size, torch.int16) if whole is None else whole.middles[:size]
        # Entries of the table, and then places in a bar.
        self.whole: Tensor = _new(size, torch.int32) if whole is None else whole.whole[:size]
        # The same memory as arrays.
        self.array_of_numbers: Floats = self.numbers.numpy()
        self.array_of_whole: NDArray[np.int32] = self.whole.numpy()


def _new(size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype, device="cpu")


def _beside(
    bits: bytes, count: int, digits: int, out: NDArray[np.int32] | None = None
) -> NDArray[np.int32]:
    """Places in what is 2^`digits` wide, counted from its middle, by 4 random bytes each."""
    return np.right_shift(np.frombuffer(bits, np.int32, count), 32 - digits, out=out)


@lru_cache(maxsize=8)
def rounded_gaussian(deviation: float) -> RoundedGaussian:
    """The same object for the same deviation.

    σC seldom changes, and to make a table takes as long as to draw 10⁵ numbers.
    """
    return RoundedGaussian(deviation)


def _at_most(masses: Floats, entries: int) -> Whole:
    """How many entries each mass gets, such that the smallest mass per entry is largest.

    Jefferson's method of apportionment: each further entry goes to the largest quotient of mass and
    entries.
    """
    counts = np.floor(masses * (entries / masses.sum())).astype(np.int64)
    # A mass gets at most 16 further ones. A larger mass may miss some: the smallest mass per entry
    # is then a little smaller than it could be.
    most = 16
    quotients = masses[:, None] / (counts[:, None] + np.arange(1, most + 1))
    largest = quotients.ravel().argsort()[quotients.size - (entries - counts.sum()) :]
    return counts + np.bincount(largest // most, minlength=len(counts))


def _at_least(masses: Floats, entries: int) -> tuple[Whole, float]:
    """How many entries each mass gets, and what an entry is worth.

    No mass is worth more than its entries.
    """
    unit = float(masses.sum()) / (entries - len(masses))
    counts = np.ceil(masses / unit).astype(np.int64)
    counts[0] += entries - counts.sum()
    return counts, unit


def _uniform(count: int, entropy: Entropy) -> Floats:
    """Multiples of 2⁻⁵³ in (0, 1], all equally likely; never 0, whose logarithm is infinite."""
    whole_numbers = np.frombuffer(entropy(8 * count), np.int64) & (2**53 - 1)
    uniform: Floats = (whole_numbers + 1).astype(np.float64)
    uniform *= 2.0**-53
    return uniform
