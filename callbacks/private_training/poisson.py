"""Poisson batches: every sample takes part with the same probability, independently."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Sampler


class PoissonBatchSampler(Sampler[list[int]]):
    """Batches of indices, each optimizer step's batch in a fixed number of parts.

    A step's batch is a function of the seed and the step's number alone: nothing needs to be saved
    to resume, all processes draw the same global batch, and each takes its share. The parts of a
    batch may be empty: then they hold `0`, a sample that stands in, and `part_size` says that it
    does not count.

    Args:
        dataset_size: Number of samples.
        sampling_rate: Probability that a sample takes part in a step.
        steps: Optimizer steps per epoch.
        parts: Parts of a batch (accumulated batches).
        seed: Secret: whoever knows it knows which samples took part. Default: from the system's
            entropy.
        rank: This process.
        world_size: Number of processes.
        max_batch_size: Of larger batches this many samples are kept, drawn uniformly.
        part_size: Samples of a part: each is filled before the next one begins, and the last one
            takes what is left. Default: parts of equal size.
        position: The number of the next step, asked when an epoch begins.
        slots: Places of a step's batch, over all processes and parts. Those that no sample takes,
            drawn at random, hold `0`, a sample that stands in: parts then have the same size in
            every step. A batch that has more samples is as large as it is. Default: no such places.

    Attributes:
        guests: Samples beyond the data set that are drawn as all others are, numbered from
            `dataset_size` on (the canaries of an audit): whether each is loaded, `[guests]`.

    Example:
        >>> sampler = PoissonBatchSampler(100, sampling_rate=0.05, steps=3, parts=2, seed=1)
        >>> len(sampler), [sampler.part_size(step, part) for step in range(3) for part in range(2)]
        (6, [3, 2, 3, 3, 3, 2])
    """

    def __init__(
        self,
        dataset_size: int,
        sampling_rate: float,
        steps: int,
        parts: int = 1,
        seed: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        max_batch_size: int | None = None,
        part_size: int | None = None,
        position: Callable[[], int] = int,
        slots: int | None = None,
    ) -> None:
        self.dataset_size, self.sampling_rate, self.steps, self.parts = (
            dataset_size,
            sampling_rate,
            steps,
            parts,
        )
        self.seed = secrets.randbits(128) if seed is None else seed
        self.rank, self.world_size, self.max_batch_size = rank, world_size, max_batch_size
        self.full_part, self.slots = part_size, slots
        self.position = position
        self.guests: np.ndarray = np.zeros(0, bool)
        self.first = 0  # the first step of the running epoch
        self._drawn: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self.steps * self.parts

    def __iter__(self) -> Iterator[list[int]]:
        self.first = self.position()
        for step in range(self.first, self.first + self.steps):
            for part in range(self.parts):
                yield self._part(step, part).clip(min=0).tolist()

    def part_size(self, step: int, part: int) -> int:
        """How many samples this process really has in a part of a step's batch."""
        return int(self.counted(step, part).sum())

    def counted(self, step: int, part: int) -> np.ndarray:
        """Which rows of a part hold a sample of this process; the others stand in."""
        return self._part(step, part) >= 0

    def batch(self, step: int) -> np.ndarray:
        """The global batch of a step, guests included."""
        if step not in self._drawn:
            if len(self._drawn) > 64:  # loaders read ahead
                self._drawn.pop(next(iter(self._drawn)))
            generator = np.random.Generator(
                np.random.PCG64(np.random.SeedSequence([self.seed, step]))
            )
            # A number for everyone, drawn or not: who takes part does not depend on others.
            chosen = np.flatnonzero(generator.random(self.population) < self.sampling_rate)
            if self.max_batch_size is not None and len(chosen) > self.max_batch_size:
                chosen = generator.choice(chosen, self.max_batch_size, replace=False)
            # Parts and processes take slices: sorted, a sample's part would follow its
            # index.
            self._drawn[step] = generator.permutation(chosen)
        return self._drawn[step]

    @property
    def population(self) -> int:
        """Number of samples and guests."""
        return self.dataset_size + len(self.guests)

    def drawn_guests(self, step: int) -> np.ndarray:
        """Numbers of the guests in the global batch of a step."""
        numbers = self.batch(step) - self.dataset_size
        return numbers[numbers >= 0]

    def _part(self, step: int, part: int) -> np.ndarray:
        """The samples of this process in a part of a step's batch; -1 where one stands in."""
        own = self._placed(step)[self.rank :: self.world_size]
        if self.full_part is None:
            rows = own[part :: self.parts]
        else:
            end = None if part == self.parts - 1 else (part + 1) * self.full_part
            rows = own[part * self.full_part : end]
        # The network runs in any case: one stands in where nobody was drawn.
        return rows if len(rows) else np.array([-1])

    def _placed(self, step: int) -> np.ndarray:
        """The loaded samples of the global batch in their places; -1 where none is."""
        batch = self.batch(step)
        if self.slots is not None:
            # All places are equally likely for a sample, whoever else was drawn: without it another
            # stands in at its place, and all others keep theirs.
            generator = np.random.Generator(
                np.random.PCG64(np.random.SeedSequence([self.seed, step, self.slots]))
            )
            placed = np.full(max(self.slots, len(batch)), -1)
            placed[generator.permutation(len(placed))[: len(batch)]] = batch
            batch = placed
        if not len(self.guests):
            return batch
        loaded = np.concatenate([np.ones(self.dataset_size, bool), self.guests, [True]])
        if self.slots is None:
            return batch[loaded[batch]]
        return np.where(loaded[batch], batch, -1)


def enough_parts(expected: float, part_size: int) -> int:
    """The number of parts that all but one in 10⁹ Poisson batches fit into.

    Chernoff's bound, P[B ≥ t] ≤ exp(t - B̄ - t log(t / B̄)).

    Args:
        expected: B̄.
        part_size: Samples of a part, over all processes.

    Example:
        >>> enough_parts(expected=1000.0, part_size=256)
        5
    """
    parts = math.ceil(expected / part_size)
    while True:
        largest = parts * part_size + 1
        if largest > expected and largest - expected - largest * math.log(
            largest / expected
        ) < math.log(1e-9):
            return parts
        parts += 1
