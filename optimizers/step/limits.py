"""What the loss demands of one step, on the device and, once it is read, as numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_curv.distributed.failures import processes
from lightning_curv.optimizers.linear_algebra.collectives import averaged
from lightning_curv.optimizers.linear_algebra.readings import Readings
from lightning_curv.optimizers.step_size.trust_region import TrustRegion


class StepLimits:
    """`LossLimits` for all micro-batches and processes together.

    Args:
        fields: Of every micro-batch: six numbers, or the loss alone where it is all that was read.
        scale: What the mean loss of the micro-batches is to be multiplied by.
        former: The limits of the last step that had all of them.
        readings: Of the step.
    """

    def __init__(
        self,
        fields: Sequence[Tensor],
        scale: float,
        former: list[float] | None,
        readings: Readings,
    ) -> None:
        self._count = len(fields)
        self._scale = scale
        self._former = former
        self._found = averaged(torch.stack(list(fields)).mean(0)) if fields else None
        self._answer = None if self._found is None else readings.ask(self._found)

    def numbers(self) -> list[float]:
        """The six limits, of the last reading; empty if nothing was left by a backward pass."""
        if self._answer is None:
            return []
        *means, last = self._answer.numbers
        if not means:
            return self._recalled(self._scale * last)
        floor, *others = (self._scale * mean for mean in means)
        # It falls with the number of predictions, of which all micro-batches together have more.
        return [floor / self._count, *others, last * self._count * processes()]

    def _recalled(self, loss: float) -> list[float]:
        """The limits of a loss of which the other numbers were known in the last measured step."""
        assert self._former is not None
        floor, bound, size, reach, _, samples = self._former
        return [
            floor,
            loss if math.isfinite(bound) else math.inf,
            abs(loss) if size else 0.0,
            reach,
            loss,
            samples,
        ]

    def floor(self, former: float) -> float | Tensor:
        """The least damping, [] on the device if it is new."""
        if self._found is None or len(self._found) == 1:
            return former
        return self._found[0] * (self._scale / self._count)

    def radius(self, region: TrustRegion, readings: Readings) -> float | Tensor:
        """The radius of the region in this step, [] on the device if the host cannot know it yet.

        That the loss does not say that the last step has failed is taken to hold.
        """
        if self._found is None or not region.enabled:
            return region.radius
        is_whole = len(self._found) > 1
        loss = self._found[4 if is_whole else 0] * self._scale
        if region.highest is not None:
            readings.hold((loss <= region.highest)[None])
        if is_whole:
            is_bounded = self._found[1].isfinite()
        else:
            assert self._former is not None
            is_bounded = torch.full_like(loss, math.isfinite(self._former[1]), dtype=torch.bool)
        return region.radius_on_device(loss, is_bounded)
