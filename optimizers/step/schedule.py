"""When curvature is measured and when inverses are refreshed."""

from __future__ import annotations

from dataclasses import dataclass

# Inverses are refreshed so many times more rarely as curvature is kept for steps, over this.
KEPT_PER_INTERVAL = 2


@dataclass(frozen=True)
class Schedule:
    """Steps at which curvature is measured and inverted.

    In a burn-in, while the first estimates are poor, inverses are refreshed more often.

    Args:
        measure: measure curvature every so many steps.
        keeps: whether curvature is measured in every step at first, and then kept for as long as it
            holds, `measure` steps at most.
        invert: refresh each inverse every so many steps, spread over them so that no step has to
            pay for all.
        burn_in: number of first steps in which inverses are refreshed at least every 5 steps, all
            of them in each of the first three.
        settles: number of first steps that all measure, if curvature is kept behind them.
    """

    measure: int
    invert: int = 1
    burn_in: int = 20
    keeps: bool = False
    settles: int = 10

    def measure_due(self, step: int) -> bool:
        """Whether curvature is measured in this step; steps count from 0."""
        return step % self.measure == 0

    def next_interval(self, step: int, interval: int, holds: bool) -> int:
        """In how many steps curvature is measured again, after the measurement of a step.

        Args:
            step: of the measurement.
            interval: in how many steps it was to be after the one before.
            holds: whether what was kept since then may be kept as long again.
        """
        if not holds:
            return max(interval // 2, 1)
        # The first estimates are poor, and change with every step.
        if step + 1 < self.settles:
            return 1
        return min(2 * interval, self.measure)

    def invert_due(self, step: int, unit: int, units: int, kept: int = 1) -> bool:
        """Whether inverse number `unit` of `units` is refreshed in this step.

        Args:
            step: Counted from 0.
            unit: Number of the inverse.
            units: Number of all inverses.
            kept: For how many steps what was measured last is kept.
        """
        if step < min(3, self.burn_in):
            return True
        if step < self.burn_in:
            interval = min(5, self.invert)
        else:
            interval = self.invert
        # Each unit has its step within an interval, the units spread evenly over it.
        own_step = unit * interval // units
        # Of curvature that is measured rarely the inverse changes slowly. Whoever is due in every
        # fourth interval is so in every second one, too: none waits long where that changes.
        rarer = max(kept // KEPT_PER_INTERVAL, 1)
        return step % (rarer * interval) == own_step + unit % rarer * interval
