"""When curvature is measured and when inverses are refreshed."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Steps at which curvature is measured and inverted, with a burn-in while the first estimates are poor.

    Args:
        measure: measure curvature every so many steps.
        invert: refresh inverses every so many steps.
        burn_in: number of first steps in which inverses are refreshed at least every 5 steps, in the first three
            at every step.
    """

    measure: int
    invert: int = 1
    burn_in: int = 20

    def measure_due(self, step: int) -> bool:
        return step % self.measure == 0

    def invert_due(self, step: int) -> bool:
        early = step < min(3, self.burn_in) or (step < self.burn_in and step % 5 == 0)
        return early or step % self.invert == 0
