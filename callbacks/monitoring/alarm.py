"""What an alarm is: a series, a bound, and what happens beyond it."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch.optim import Optimizer

from lightning_curv.callbacks.import_names import MisconfigurationException
from lightning_curv.callbacks.settings import near
from lightning_curv.optimizers import DPOptimizer

Action = Literal["warn", "skip", "stop"]
# Before every step; before a step that is logged; after a step that is logged.
Moment = Literal["gradient", "measured", "updated"]
OF_GRADIENTS = ("grad_norm", "grad_mean", "grad_std", "grad_max", "sparsity")  # known at every step
AFTER_UPDATES = ("update_size", "distance")  # known too late to skip a step
SMALLEST = 1e-8  # Adam's ε: what is smaller is lost in it


@dataclass(frozen=True)
class Alarm:
    """A bound on a series of `CurvatureCallback`, and what happens when it is crossed.

    Series of the gradient alone (`grad_norm`, `grad_mean`, `grad_std`, `grad_max`,
    `sparsity`) are watched at every optimizer step, logged or not, which takes their norms and
    one wait for the device; all others where they are logged, so `quantities` must have them.
    Values are those before clipping, without a scaler's factor. Under a gradient scaler a gradient
    with inf or NaN is no alarm: the scaler itself skips that step and lowers its factor.

    Args:
        series: Its name, as it is logged.
        above: The alarm goes off beyond this value, and for NaN.
        below: The alarm goes off beneath this value.
        relative: The bounds are multiples of the running average of the series, which the alarm
            waits ten values for; values that set it off are not averaged.
        layers: Watch every layer by itself; for series of the gradient.
        action: "warn"; "skip": warn, and do not take this optimizer step: its gradients, all that
            were accumulated for it, are dropped, and parameters, momentum and weight decay stay as
            they are, while step counts and schedulers go on; "stop": skip, and end the run by
            `trainer.should_stop`.
        cooldown: Optimizer steps until the next warning of this alarm. The action is taken at every
            step.

    Raises:
        ValueError: There is no bound, or the action is unknown or comes too late.

    Example:
        >>> Alarm("grad_norm", above=1e3, action="skip").exceeded(2e3)
        True
        >>> Alarm("grad_norm", above=10, relative=True).exceeded(20.0, average=4.0)
        False
    """

    series: str
    above: float | None = None
    below: float | None = None
    relative: bool = False
    layers: bool = False
    action: Action = "warn"
    cooldown: int = 100

    def __post_init__(self) -> None:
        if self.above is None and self.below is None:
            raise ValueError("An alarm must have a bound `above` or `below`, found none.")
        if self.action not in get_args(Action):
            raise ValueError(
                f"`action` must be 'warn', 'skip' or 'stop', found {self.action!r}; did you mean "
                f"{near(str(self.action), get_args(Action))}?"
            )
        if self.cooldown < 1:
            raise ValueError(f"`cooldown` must be a positive number, found {self.cooldown}.")
        if self.action == "skip" and self.series in AFTER_UPDATES:
            raise ValueError(
                f"`action` must be 'warn' or 'stop' for {self.series!r}, which is known after the "
                "step, found 'skip'."
            )
        if self.layers and self.series not in OF_GRADIENTS:
            raise ValueError(
                f"`layers` must be False for {self.series!r}, found True; it is for "
                f"{', '.join(OF_GRADIENTS)}."
            )

    @property
    def moment(self) -> Moment:
        """When its series is known."""
        if self.series in OF_GRADIENTS:
            return "gradient"
        return "updated" if self.series in AFTER_UPDATES else "measured"

    def exceeded(self, value: float, average: float = 1.0) -> bool:
        """Whether a value sets it off.

        Args:
            value: A value of the series.
            average: Its running average, for relative bounds.

        Returns:
            True beyond a bound, and for NaN if there is one above.
        """
        unit = average if self.relative else 1.0
        # `not <=` instead of `>`: no comparison with NaN is true.
        return (self.above is not None and not value <= self.above * unit) or (
            self.below is not None and value < self.below * unit
        )

    def __str__(self) -> str:
        unit = " times its average" if self.relative else ""
        bounds = [("above", self.above), ("below", self.below)]
        named = [f"{name} {bound:.3g}{unit}" for name, bound in bounds if bound is not None]
        return f"{self.series} {' or '.join(named)}"


PRESETS = {
    # ten times what was usual: a spike of the loss, or a learning rate that is too large
    "exploding": Alarm("grad_norm", above=10.0, relative=True),
    # a layer whose largest entry is lost in Adam's ε
    "vanishing": Alarm("grad_max", below=SMALLEST, layers=True),
    # inf is above the largest number, NaN above every bound
    "nonfinite": Alarm("grad_norm", above=sys.float_info.max),
}


def alarms_of(given: Sequence[str | Alarm], series: Collection[str]) -> list[Alarm]:
    """The alarms that `CurvatureCallback(alarms=)` means.

    Args:
        given: alarms, and names of `PRESETS`.
        series: that are logged.

    Raises:
        ValueError: a preset does not exist, or a series is not logged.
    """
    alarms = []
    for entry in [given] if isinstance(given, (str, Alarm)) else given:
        if isinstance(entry, str) and entry not in PRESETS:
            raise ValueError(
                f"`alarms` must be alarms or names of presets, found {entry!r}; did you mean "
                f"{near(entry, PRESETS)}?"
            )
        alarm = PRESETS[entry] if isinstance(entry, str) else entry
        # Series of the gradient are computed for the alarms themselves.
        if alarm.moment != "gradient" and alarm.series not in series:
            known = dict.fromkeys((*OF_GRADIENTS, *series))
            raise ValueError(
                f"`alarms` must watch a series that is logged, found {alarm.series!r}; add it to "
                f"`quantities`, or did you mean {near(alarm.series, known)}?"
            )
        alarms.append(alarm)
    return alarms


def refuse_alarms(alarms: Sequence[Alarm], optimizers: Sequence[Optimizer]) -> None:
    """Raise if a private step would be taken or not depending on private data."""
    private = any(isinstance(optimizer, DPOptimizer) for optimizer in optimizers)
    acting = [alarm for alarm in alarms if alarm.action != "warn"]
    if private and acting:
        raise MisconfigurationException(
            f"Alarms on private steps must warn, found `action={acting[0].action!r}`: whether a "
            "step is taken would reveal more than its noise hides."
        )
