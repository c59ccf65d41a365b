"""The loss of a batch before and after an update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Trial:
    """Evaluates a loss before and after an update.

    Both times it draws the same random numbers, and the state of the generators is left alone.

    Args:
        loss_fn: computes the loss without side effects.
        device: whose random numbers it may draw, besides the CPU's.
    """

    def __init__(self, loss_fn: Callable[[], Any], device: torch.device) -> None:
        self.loss_fn = loss_fn
        self.devices = [] if device.type == "cpu" else [device]
        self.kind = "cuda" if device.type == "cpu" else device.type
        self.before = self.loss()
        self.after: float | None = None

    def change(self) -> float:
        """The loss now minus the loss before; keeps the loss now as `after`."""
        self.after = self.loss()
        return self.after - self.before

    @torch.no_grad()
    def loss(self) -> float:
        """The loss now."""
        with torch.random.fork_rng(self.devices, device_type=self.kind):
            return float(self.loss_fn())
