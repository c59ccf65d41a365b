r"""How far to go along a direction that another optimizer chose.

Along a direction $d$ the loss is modelled by $q(\alpha) = -\alpha s + \tfrac12 \alpha^2 c$ with the
slope $s = -g^\top d$ and the curvature $c = d^\top G d$; its minimum is at $\alpha = s / c$. One
batch's model is mostly noise, so that slopes and curvatures are averaged over steps, each per
squared length of its direction, and the ratio of the means is taken.

Of which batch? The one that $d$ was made of promises too much: its noise is in the direction, in
the slope and, where the network has more parameters than the batch has samples, in the curvature.
The next batch knows nothing of that. It meets the last update $u = \alpha d$ at its end, where it
finds the slope $f = -g^\top u$ and the curvature $u^\top G u$; at the start, the model says, it
would have found $f + u^\top G u$. This held-out model says how far the last step should have gone.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

# The share of the values so far that a mean spans, and how many it spans at least.
WINDOW = 0.5
LEAST = 20
# The weight of the model of a direction's own batch; the held-out one has the rest.
OWN = 0.1
# What the minimum of the model is multiplied by: its decrease is flat there, and a longer step
# leaves sharp valleys that a shorter one stays in.
BEYOND = 1.3
# The first step, in which nothing is held out, as a share of its own batch's minimum.
START = 0.3
# A step is at most so many times as long as the one before, and at least so many times.
GROWTH = 1.1
FALL = 0.5
# The next batch's slope uphill that condemns a step, in slopes downhill of the batches before.
OVERSHOT = 5.0
# A loss that lies so many mean deviations above the mean condemns the step before it.
DEVIATIONS = 10.0
# The deviation of the first loss from the next ones, of which nothing is known, as a share of it.
UNKNOWN = 0.25


@dataclass
class WindowMean:
    """The mean over the last half of all values so far, of the first few over all of them.

    A window that grows with the run forgets the start, and averages ever more noise away.

    Attributes:
        value: The mean.
        count: How many values there were.

    Example:
        >>> mean = WindowMean()
        >>> [mean.add(value) for value in (1.0, 3.0, 5.0)]
        [1.0, 2.0, 3.0]
    """

    value: float = 0.0
    count: int = 0

    def add(self, value: float) -> float:
        """Add a value; the mean with it."""
        self.count += 1
        # While there are few values the window has all of them: the mean is the plain one.
        window = min(self.count, max(LEAST, WINDOW * self.count))
        self.value += (value - self.value) / window
        return self.value


@dataclass
class LineModel:
    """The mean quadratic model along directions, everything per squared length of the direction.

    Attributes:
        slope: Mean slope.
        curvature: Mean curvature.
        latest: The curvature that was measured last; it stands for those that were not measured.
    """

    slope: WindowMean = field(default_factory=WindowMean)
    curvature: WindowMean = field(default_factory=WindowMean)
    latest: float = 0.0

    def measure(self, curvature: float, square: float) -> None:
        """Take in a curvature along a direction and the direction's squared length.

        What is zero or not finite says nothing of how far to go.
        """
        if square > 0 and 0 < curvature / square < math.inf:
            self.latest = curvature / square

    def add(self, slope: float) -> None:
        """Take in the slope of a step, whose curvature is the latest one."""
        if self.latest:
            self.slope.add(slope)
            self.curvature.add(self.latest)

    @property
    def minimum(self) -> float:
        """The rate at which the mean model is least; 0 before anything is known."""
        return self.slope.value / self.curvature.value if self.curvature.count else 0.0


def falls_by(worth: float, slope: float, curvature: float) -> float:
    r"""The first rate at which $q(\alpha) = -\alpha s + \tfrac12 \alpha^2 c$ has fallen by a worth.

    Along a straight line it is $w / s$, and $2 w / s$ where the minimum is as deep as that.

    Args:
        worth: $w \ge 0$.
        slope: $s$; uphill, below zero, nothing falls, and every rate will do.
        curvature: $c \ge 0$. Where the minimum is not as deep, it is taken to be.

    Returns:
        The rate, infinite where nothing falls.

    Example:
        >>> falls_by(3.0, 1.0, 0.0), falls_by(0.5, 1.0, 1.0), falls_by(0.5, -1.0, 1.0)
        (3.0, 1.0, inf)
    """
    if slope <= 0:
        return math.inf
    root = math.sqrt(max(slope**2 - 2 * curvature * worth, 0.0))
    return 2 * worth / (slope + root)


@dataclass
class StepLength:
    """The rate of every step, from what its batch and the next one find along it.

    Attributes:
        own: The model of the batches that the directions were made of.
        held_out: The model of the next batches.
        length: Of the last step, before a schedule.
        loss: Mean loss.
        deviation: Mean distance of a loss from the mean.
    """

    own: LineModel = field(default_factory=LineModel)
    held_out: LineModel = field(default_factory=LineModel)
    length: float = 0.0
    loss: WindowMean = field(default_factory=WindowMean)
    deviation: WindowMean = field(default_factory=WindowMean)

    def overshot(self, slope: float, square: float, rate: float) -> bool:
        """Whether the loss rises at the end of the last step much more steeply than it fell before.

        Args:
            slope: Of the next batch along the update, at its end.
            square: Squared length of the update.
            rate: The update is so many times its direction.
        """
        # Slopes are kept per squared length of the direction; that of the update is rate² times it,
        # and its slope rate times.
        downhill = self.own.slope.value * square / rate
        return downhill > 0 and -slope > OVERSHOT * downhill

    def exploded(self, loss: float) -> bool:
        """Whether a loss is not finite, or far above the last ones."""
        if not math.isfinite(loss):
            return True
        rise = loss - self.loss.value
        return self.loss.count > 0 and rise > DEVIATIONS * self.deviation.value

    def add_loss(self, loss: float) -> None:
        """Take in a loss, up to the one that condemns a step."""
        if not self.loss.count:
            self.deviation.add(UNKNOWN * abs(loss))
            self.loss.add(loss)
            return
        # Of batches with rare samples of large losses some are always far above the others: what
        # condemned a step counts too, so that such a loss is not far above the last ones for ever.
        most = DEVIATIONS * self.deviation.value
        rise = min(loss - self.loss.value, most)
        # Compared with the mean before this loss, which would pull the mean towards itself.
        self.deviation.add(abs(rise))
        self.loss.add(self.loss.value + rise)

    def look_back(self, slope: float, square: float, rate: float) -> None:
        """Take in what the next batch says of the last step; arguments as for `overshot`."""
        # Of the update, at its start; then of the direction.
        slope_at_start = rate * (slope / square + self.held_out.latest)
        # A batch counts as far uphill as what condemns a step: one alone must not decide for many.
        least = -OVERSHOT * max(self.own.slope.value, 0.0)
        self.held_out.add(max(slope_at_start, least))

    def next(self, slope: float, square: float, loss: float | None = None) -> float:
        """The rate of the next step.

        Args:
            slope: Along the direction, of its own batch.
            square: Squared length of the direction.
            loss: Of this batch, if it is known. Neither this batch nor the mean of all promises
                more than it is worth, or the ones before were: a confident classifier has no
                curvature to say how far is too far.

        Returns:
            The rate; 0 as long as no curvature is known, and along no direction.
        """
        if not (self.own.latest and square > 0):
            return 0.0
        self.own.add(slope / square)
        size = math.sqrt(square)
        # A mean slope uphill, as of a direction that momentum carries on, promises nothing.
        most = max(self.own.minimum, 0.0)
        if loss is not None:
            worth = max(abs(loss), abs(self.loss.value))
            mean_slope = self.own.slope.value * square
            mean_curvature = self.own.curvature.value * square
            most = min(
                most,
                falls_by(worth, slope, self.own.latest * square),
                falls_by(worth, mean_slope, mean_curvature),
            )
        if self.length:
            # More than its own batch promises a step never holds.
            held_out = min(max(self.held_out.minimum, 0.0), most)
            rate = BEYOND * (OWN * most + (1 - OWN) * held_out)
            # The length and not the rate: directions of one optimizer differ in their lengths.
            self.length = min(max(rate * size, FALL * self.length), GROWTH * self.length)
        else:
            self.length = START * most * size
        return self.length / size

    def back_off(self) -> None:
        """Go on with steps half as long."""
        self.length *= FALL

    def state_dict(self) -> dict[str, Any]:
        """All numbers, in plain types."""
        return asdict(self)

    @classmethod
    def restored(cls, state: dict[str, Any]) -> StepLength:
        """What `state_dict` described.

        Args:
            state: What it returned.
        """
        return cls(
            own=_line_model(state["own"]),
            held_out=_line_model(state["held_out"]),
            length=state["length"],
            loss=WindowMean(**state["loss"]),
            deviation=WindowMean(**state["deviation"]),
        )


def _line_model(state: dict[str, Any]) -> LineModel:
    slope = WindowMean(**state["slope"])
    curvature = WindowMean(**state["curvature"])
    return LineModel(slope, curvature, state["latest"])
