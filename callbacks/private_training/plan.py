"""The batches of one `fit`: how they are drawn, how many steps they make, and what a step costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import DataLoader

from lightning_curv.callbacks.import_names import MisconfigurationException
from lightning_curv.callbacks.private_training.loader import (
    dataset_size,
    require_each_sample_once,
    require_plain_loader,
    with_batches,
)
from lightning_curv.callbacks.private_training.poisson import PoissonBatchSampler, enough_parts
from lightning_curv.optimizers.privacy.accounting import (
    EpochSampling,
    PoissonSampling,
    Sampling,
    TruncatedPoissonSampling,
)

if TYPE_CHECKING:
    from pytorch_lightning import Trainer


class PlannedBatches(PoissonBatchSampler):
    """Poisson batches of a data set whose size is read again whenever an epoch begins.

    Args:
        loader: The user's loader.
        expected: B̄, over all processes: the rate follows the size of the data set.
        settings: Arguments of `PoissonBatchSampler`.
    """

    def __init__(self, loader: DataLoader, expected: float, **settings: Any) -> None:
        self._loader, self._expected = loader, expected
        size = dataset_size(loader)
        super().__init__(
            size, _rate(expected, size), steps=max(1, round(size / expected)), **settings
        )

    def __iter__(self) -> Iterator[list[int]]:
        size = dataset_size(self._loader)
        if size != self.dataset_size:
            self.dataset_size, self.sampling_rate = size, _rate(self._expected, size)
            # They were drawn from another number of samples.
            self._drawn.clear()
        return super().__iter__()


def _rate(expected: float, size: int) -> float:
    if expected > size:
        raise MisconfigurationException(
            f"Expected no more samples per step than the data set has, {size}, found {expected:g} "
            "(batch size × accumulated batches × processes). Use a smaller `batch_size`."
        )
    return expected / size


class Plan:
    """How a Trainer draws and counts private batches.

    One release is what the accountant counts: a step of Poisson batches, or a whole epoch of the
    user's own batches. Whatever depends on the loader or on the length of the run is read when it
    is asked for: both may change.

    Args:
        trainer: The Trainer.
        poisson: Whether batches are drawn anew; else the loader stays as it is.
        max_batch_size: Of larger Poisson batches this many samples are kept.
        seed: Gives the seed of the batches, once it is needed: a checkpoint may bring it.
        position: The number of the next step to be drawn, which no other step under this seed has.
        max_physical_batch_size: The samples that a process has in memory at once: batches come in
            as many parts as that takes, and the Trainer accumulates them. Default: as many as the
            Trainer accumulates.
        same_shapes: Whether parts have the same size in every step, whoever was drawn.
    """

    def __init__(
        self,
        trainer: Trainer,
        poisson: bool,
        max_batch_size: int | None,
        seed: Callable[[], int],
        position: Callable[[], int],
        max_physical_batch_size: int | None = None,
        same_shapes: bool = False,
    ) -> None:
        self.max_physical_batch_size, self.same_shapes = max_physical_batch_size, same_shapes
        self._accumulate: int | None = (
            None  # what the Trainer accumulated before it was given our parts
        )
        self.trainer, self.poisson, self.max_batch_size = trainer, poisson, max_batch_size
        self._seed, self._position = seed, position
        self.sampler: PlannedBatches | None = None
        self.loader: DataLoader | None = None
        self._batch_size: int | None = None
        self.adapt: Callable[[DataLoader], DataLoader] = lambda loader: (
            loader
        )  # what an audit adds to Poisson batches

    def convert(self, loader: Any) -> Any:
        """From the user's training loader to the one that is used."""
        loader, trainer = require_plain_loader(loader), self.trainer
        self.loader, self._batch_size = loader, loader.batch_size
        if not self.poisson:
            require_each_sample_once(loader, trainer)
            return loader
        if self.max_physical_batch_size is not None:
            # When loaders are reloaded, the Trainer has our number already.
            self._accumulate = self._accumulate or trainer.accumulate_grad_batches
            trainer.accumulate_grad_batches = self._parts(self.max_physical_batch_size)
        self.sampler = PlannedBatches(
            loader,
            self.expected_batch_size,
            parts=trainer.accumulate_grad_batches,
            seed=self._seed(),
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            max_batch_size=self.max_batch_size,
            part_size=self.max_physical_batch_size,
            position=self._position,
            slots=self._slots if self.same_shapes else None,
        )
        return self.adapt(with_batches(loader, self.sampler))

    @property
    def expected_batch_size(self) -> float:
        """B̄, over all processes."""
        assert self._batch_size is not None
        accumulated = self._accumulate or self.trainer.accumulate_grad_batches
        return float(self._batch_size * accumulated * self.trainer.world_size)

    @property
    def _slots(self) -> int:
        """Places of a step's batch that all but one in 10⁹ batches fit into, in equal parts."""
        parts = self.trainer.world_size * self.trainer.accumulate_grad_batches
        if self.max_physical_batch_size is not None:
            return parts * self.max_physical_batch_size
        if self.max_batch_size is not None:
            return parts * math.ceil(self.max_batch_size / parts)
        return parts * enough_parts(self.expected_batch_size, parts)

    def _parts(self, size: int) -> int:
        parts = enough_parts(self.expected_batch_size, size * self.trainer.world_size)
        if self.max_batch_size is None:
            return parts
        return min(parts, math.ceil(self.max_batch_size / (size * self.trainer.world_size)))

    def restore(self) -> None:
        """Give the Trainer back what the user set."""
        if self._accumulate is not None:
            self.trainer.accumulate_grad_batches, self._accumulate = self._accumulate, None

    def align(self) -> None:
        """Training begins: the loader must stand where the run does."""
        if self.sampler is not None and self.sampler.first != self._position():
            # The iterator was made before the position was known.
            iter(self.trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]

    def refuse_parts_of_steps(self) -> None:
        """Raise if an epoch would end in the middle of a step's batch."""
        trainer = self.trainer
        if self.sampler is not None and self.sampler.parts != trainer.accumulate_grad_batches:
            raise MisconfigurationException(
                "PrivacyCallback needs a constant `accumulate_grad_batches`, found "
                f"{self.sampler.parts} and then {trainer.accumulate_grad_batches}; leave it as it "
                "was when the loader was made."
            )
        if (
            self.sampler is not None
            and trainer.num_training_batches % trainer.accumulate_grad_batches
        ):
            raise MisconfigurationException(
                "`limit_train_batches` must leave whole steps of "
                f"{trainer.accumulate_grad_batches} accumulated batches, found "
                f"{trainer.num_training_batches} batches: dropping a part of a Poisson batch is "
                "not private."
            )

    def counted(self, step: int, part: int) -> np.ndarray | None:
        """Which rows of a part of a step's batch are samples of this process, and do not stand in.

        `None`: all of the batch that is there.
        """
        return None if self.sampler is None else self.sampler.counted(step, part)

    def drawn_guests(self, step: int) -> np.ndarray:
        """Guests in a step's batch: canaries of an audit."""
        assert self.sampler is not None
        return self.sampler.drawn_guests(step)

    @property
    def sampling(self) -> Sampling:
        """What the accountant is told."""
        if self.sampler is None:
            return EpochSampling(self._steps_per_epoch)
        if self.max_batch_size is None:
            return PoissonSampling(self.sampler.sampling_rate)
        return TruncatedPoissonSampling(
            self.sampler.sampling_rate, self.sampler.population, self.max_batch_size
        )

    @property
    def releases(self) -> float:
        """Releases until training ends by itself; may be infinite."""
        trainer, steps = self.trainer, self._steps_per_epoch
        by_steps = trainer.max_steps if trainer.max_steps and trainer.max_steps > 0 else math.inf
        epochs = (
            trainer.max_epochs
            if trainer.max_epochs is not None and trainer.max_epochs > 0
            else math.inf
        )
        planned = min(by_steps, epochs * steps)
        if math.isinf(planned):
            return planned
        return math.ceil(planned / steps) if self.sampler is None else int(planned)

    @property
    def left(self) -> float:
        """Releases until training ends by itself, at least one."""
        done = self.trainer.current_epoch if self.sampler is None else self.trainer.global_step
        return max(self.releases - done, 1)

    @property
    def _steps_per_epoch(self) -> int:
        return math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
