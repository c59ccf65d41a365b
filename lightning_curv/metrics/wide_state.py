"""Sums in float64, and in float32 on devices that have no wider numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class WideState(Metric):
    """A metric whose state is in float64 until it is moved to a device without."""

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **named: Any) -> Any:
        try:
            return super()._apply(fn, *args, **named)
        except TypeError:  # what torch raises where a device has no such type
            self.set_dtype(torch.float32)
            return super()._apply(fn, *args, **named)
