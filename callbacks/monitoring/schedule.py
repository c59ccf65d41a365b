"""Which steps are logged.

Every n-th, more where something watches a series, fewer where time is short.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from lightning_curv.callbacks.monitoring.prices import Budget
from lightning_curv.callbacks.settings import longest_interval

if TYPE_CHECKING:
    from pytorch_lightning import Trainer


def step_of(trainer: Trainer) -> int:
    """The optimizer step that a batch belongs to, from 1; the batches it accumulates share it."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped + 1


class Schedule:
    """Which steps of a run are logged.

    Decided from what is equal on all ranks and constant while gradients accumulate.

    Args:
        budget: as `Budget` takes it.

    Attributes:
        seconds: that the last batch took.
    """

    def __init__(self, budget: float | None) -> None:
        self._budget = Budget(budget)
        self._longest = 0  # interval that is short enough for what watches a series
        self._started, self._step = 0.0, 0  # the batch
        self.seconds = 0.0

    def watch(self, trainer: Trainer) -> None:
        """Take notice of the callbacks and schedulers that need a series once in a while."""
        self._longest = longest_interval(trainer)

    def interval(self, trainer: Trainer, every_n_steps: int | None) -> int:
        """Steps between two logged ones; 0: none is.

        Args:
            trainer: of the run.
            every_n_steps: as `CurvatureCallback` takes it.
        """
        given = (
            # an attribute that Lightning's logger connector sets, which no class declares
            trainer.log_every_n_steps  # type: ignore[attr-defined]
            if every_n_steps is None
            else every_n_steps
        )
        # It has fewer batches than `log_every_n_steps` by default: nothing would be tried.
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return 1 if every_n_steps is None else min(given, 1)
        return min(given, self._longest) if self._longest else given

    def is_logged(self, trainer: Trainer, every_n_steps: int | None, ahead: int = 0) -> bool:
        """Whether the step of the current batch is logged, or one that comes later.

        Args:
            trainer: of the run.
            every_n_steps: as `CurvatureCallback` takes it.
            ahead: how many steps later.
        """
        step, interval = step_of(trainer) + ahead, self.interval(trainer, every_n_steps)
        return interval > 0 and step % interval == 0 and self._budget.allows(step)

    def begin_batch(self, trainer: Trainer) -> None:
        """Start the clock."""
        self._started, self._step = time.perf_counter(), step_of(trainer)

    def stop_clock(self) -> float:
        """Seconds that the batch took."""
        self.seconds = time.perf_counter() - self._started
        return self.seconds

    def reckon(self, trainer: Trainer, logged: bool) -> None:
        """Hold what the batch has cost against the budget.

        Args:
            trainer: of the run.
            logged: whether the batch was measured.
        """
        self._budget.add(self._step, self.seconds, logged, trainer.strategy)
