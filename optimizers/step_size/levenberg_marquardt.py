"""Adaptation of the damping to how well the quadratic model predicted the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LevenbergMarquardt:
    r"""Adapts the relative damping $c$ by the reduction ratio $\rho$.

    Block $l$ is damped by $\lambda_l = c \cdot$ its mean eigenvalue.

    $$\rho = \frac{\ell(\theta + \delta) - \ell(\theta)}{q(\delta)}, \qquad
      c \leftarrow c / \omega^T \;\text{if}\; \rho < \tfrac14, \quad
      c \leftarrow c\, \omega^T \;\text{if}\; \rho > \tfrac34.$$

    The floor matters: on mini-batches $\rho$ stays near 1 however small the damping is, because the
    model knows the batch that it is tested on. Where every step has the same batch there is no such
    bias and the floor is far lower.

    Where nobody computes $\rho$, $c$ decays at the same rate to `rest`.

    Args:
        start: first $c$.
        floor: least $c$.
        full_batch_floor: least $c$ if all steps have the same batch.
        rest: least $c$ if $\rho$ is not computed.
        ceiling: greatest $c$.
        interval: $T$, number of steps between adaptations.
        decay: $\omega$.

    Source: J. Martens, R. Grosse, *Optimizing Neural Networks with Kronecker-factored Approximate
        Curvature*, ICML 2015, section 6.5.
    """

    start: float = 0.1
    floor: float = 1e-3
    full_batch_floor: float = 1e-6
    rest: float = 1e-2
    ceiling: float = 1e3
    interval: int = 5
    decay: float = 0.95

    def due(self, step: int) -> bool:
        """Whether the reduction ratio is wanted after this step."""
        return (step + 1) % self.interval == 0

    def adapted(self, damping: float, ratio: float, full_batch: bool = False) -> float:
        r"""The next $c$.

        Args:
            damping: $c$.
            ratio: $\rho$; one that is not a number counts as failure.
            full_batch: whether all steps have the same batch.
        """
        factor = self.decay**self.interval
        if not math.isfinite(ratio) or ratio < 0.25:
            damping /= factor
        elif ratio > 0.75:
            damping *= factor
        floor = self.full_batch_floor if full_batch else self.floor
        return min(max(damping, floor), self.ceiling)

    def annealed(self, damping: float) -> float:
        """The next $c$ after a step without a reduction ratio."""
        # A damping below `rest`, as a checkpoint may have it, stays what it is.
        return max(damping * self.decay, min(damping, self.rest))
