"""What monitoring costs in the run itself, and how rarely it has to be for a share of its time."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from lightning_curv.callbacks.monitoring.quantities import DEFAULT, Quantity
from lightning_curv.callbacks.monitoring.reduction import reduced

if TYPE_CHECKING:
    from pytorch_lightning.strategies import Strategy

DEAR = 10  # a logged step that takes so many others is worth a warning
DEAREST = 6  # quantities that it names


def clock() -> float:
    """Seconds, once all devices are done."""
    # To wait for a device that nobody uses would initialise it.
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def by_quantity(quantities: Sequence[Quantity], seconds: Mapping[str, float]) -> dict[str, float]:
    """The price of every quantity alone, in seconds: what several share is counted for each.

    Args:
        quantities: that were computed.
        seconds: by savefield.
    """
    fields = {q.name: [f for f in (*q.fields, *q.instead) if f in seconds] for q in quantities}
    return {
        name: sum(seconds[field] for field in priced) for name, priced in fields.items() if priced
    }


def warning_of_price(
    quantities: Sequence[Quantity], seconds: Mapping[str, float], total: float, rest: float
) -> str:
    """What to say after the first logged step; empty: nothing.

    Args:
        quantities: that were computed.
        seconds: by savefield.
        total: of all of them, what they share counted once.
        rest: of the step.
    """
    if total < DEAR * rest or {quantity.name for quantity in quantities} <= {*DEFAULT}:
        return ""
    steps = {name: price / rest for name, price in by_quantity(quantities, seconds).items()}
    dear = sorted(steps, key=lambda name: -steps[name])[:DEAREST]
    return (
        f"The first step that CurvatureCallback logged took {total / rest:.0f} times as long for "
        f"it as for the rest of the step ({1e3 * rest:.3g} ms). In such steps: "
        f"{', '.join(f'{name} {steps[name]:.1f}' for name in dear)}. Choose fewer `quantities`, "
        "log more rarely (`every_n_steps`), or give it a share of the run's time (`budget`)."
    )


class Budget:
    """When to log next, so that logging takes at most a share of the time.

    With T seconds for a step and M more for a logged one, logging every n-th takes the share M / (n
    T + M), which is at most b for n ≥ M (1 - b) / (b T). Both are running averages over this run.

    Args:
        share: b; `None`: no limit.

    Example:
        >>> budget = Budget(0.1)
        >>> for step, seconds in enumerate([2.0, 1.0], start=1):
        ...     budget.add(step, seconds, logged=step == 1)
        >>> [step for step in range(2, 12) if budget.allows(step)]
        [10, 11]
    """

    def __init__(self, share: float | None) -> None:
        self.share = share
        self._plain = self._logged = math.nan
        self._last, self._count = 0, 0
        self._due = 0.0

    def allows(self, step: int) -> bool:
        """Whether a step may be logged; the same for all batches that it accumulates."""
        return self.share is None or step == self._last or step >= self._due

    def add(
        self, step: int, seconds: float, logged: bool, strategy: Strategy | None = None
    ) -> None:
        """Take notice of a batch.

        Args:
            step: that it belonged to, from 1.
            seconds: that it took.
            logged: whether for logging, too.
            strategy: where several processes have to agree.
        """
        if self.share is None:
            return
        if logged:
            self._last, self._count = step, self._count + 1
            self._logged = (
                seconds if self._count <= 2 else _average(self._logged, seconds)
            )  # the first one warms up
        else:
            self._plain = _average(self._plain, seconds)
        # All processes come here at the same steps: whether both prices are known follows from
        # how many batches of either kind there were.
        if logged or not math.isfinite(self._interval):
            self._agree(strategy)
        # Two at first: a plain step has to be timed between two logged ones.
        self._due = self._last + (2 if not math.isfinite(self._interval) else self._interval)

    def _agree(self, strategy: Strategy | None) -> None:
        if strategy is None or getattr(strategy, "world_size", 1) == 1:
            return
        both = torch.tensor([self._plain, self._logged], device=strategy.root_device)
        plain, logged = reduced(both, strategy, "mean").tolist()
        self._plain, self._logged = plain, logged

    @property
    def _interval(self) -> float:
        more = max(self._logged - self._plain, 0.0)
        if self.share is None or not math.isfinite(more) or self._plain <= 0:
            return math.nan
        return max(1, math.ceil(more * (1 - self.share) / (self.share * self._plain)))


def _average(before: float, value: float) -> float:
    return value if math.isnan(before) else 0.7 * before + 0.3 * value
