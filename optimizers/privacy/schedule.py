"""Noise multipliers and clip norms that change from step to step, as was fixed beforehand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lightning_curv.optimizers.settings import require_count, require_non_negative, require_positive

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class ExponentialSchedule:
    r"""Decay or growth by a factor, down to a least value.

    $$v_t = \max(v_{\min}, v_0 \, \gamma^{\lfloor t / k \rfloor})$$

    Any function of the step's number will do in its place. It must not look at the data: a schedule
    is public.

    Args:
        initial: $v_0 > 0$, the value of step 0.
        factor: γ > 0.
        every: k; the value is held for so many steps. Each value is composed by the accountant on
            its own, which takes some hundredths of a second: hold a noise multiplier for a while.
        least: $v_{\min} \ge 0$; the value does not fall below.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> schedule = ExponentialSchedule(2.0, factor=0.5, every=10)
        >>> [schedule(step) for step in (0, 9, 10, 25)]
        [2.0, 2.0, 1.0, 0.5]
    """

    initial: float
    factor: float
    every: int = 1
    least: float = 0.0

    def __post_init__(self) -> None:
        require_positive("initial", self.initial)
        require_positive("factor", self.factor)
        require_count("every", self.every)
        require_non_negative("least", self.least)

    def __call__(self, step: int) -> float:
        """The value of a step; steps count from 0."""
        changes = step // self.every
        return max(self.least, self.initial * self.factor**changes)


def value_of(name: str, setting: float | Schedule, step: int) -> float:
    """The value of a setting, fixed or scheduled, at a step.

    Raises:
        ValueError: A schedule gives a number that is not positive, or negative noise.
    """
    # No noise is allowed, for tests; a clip norm of zero would leave nothing to learn from.
    require = require_non_negative if name == "noise_multiplier" else require_positive
    if not callable(setting):
        require(name, setting)
        return float(setting)
    value = float(setting(step))
    try:
        require(name, value)
    except ValueError as error:
        raise ValueError(f"{error} The schedule gave it for step {step}.") from None
    return value


def held_for(schedule: Schedule, step: int, at_most: float) -> int:
    """For how many steps from this one on a schedule keeps its value, at least one."""
    value, count = schedule(step), 1
    # A schedule is any function: its runs are found by asking for one step after the other.
    while count < at_most and schedule(step + count) == value:
        count += 1
    return count


def runs_of(schedule: Schedule, steps: int) -> list[tuple[float, int]]:
    """The values of the first steps, and how often each comes in a row."""
    runs: list[tuple[float, int]] = []
    step = 0
    while step < steps:
        count = held_for(schedule, step, steps - step)
        runs.append((float(schedule(step)), count))
        step += count
    return runs
