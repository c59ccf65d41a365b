"""The loss of a backward pass, and what Lightning and a gradient scaler multiplied it with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_curv.callbacks.recorded_step import returned_loss

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


@dataclass(frozen=True)
class ScaledLoss:
    """The start of a backward pass.

    Args:
        root: of the graph as the user made it.
        seed: gradient of the user's loss there.
        factor: of the loss that is differentiated.
        value: with the factor, []; `None`: it is no scalar.
    """

    root: Tensor
    seed: Tensor
    factor: Tensor | float
    value: Tensor | None


def held_factor(trainer: Trainer, optimizer: Optimizer) -> float:
    """The scaler's factor that gradients have before a step.

    1 unless the optimizer's own kernel divides by it.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    return float(scaler.get_scale())


def scaled_loss(trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> ScaledLoss:
    """Read it in `on_before_backward`.

    Args:
        trainer: of the run.
        pl_module: its `training_step` may be recorded.
        loss: that Lightning differentiates.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    factor: Tensor | float = (
        # as a tensor: `get_scale` would wait for the device
        1.0 if scaler is None else scaler.scale(torch.ones((), device=loss.device))
    )
    if pl_module.automatic_optimization:
        factor = factor / trainer.accumulate_grad_batches
    value = loss.detach() if loss.ndim == 0 else None
    # In manual optimization a step may differentiate something else than it returns.
    returned = returned_loss(pl_module) if pl_module.automatic_optimization else None
    if returned is None:
        # This root carries the factor: its seed takes it back.
        return ScaledLoss(loss, torch.ones_like(loss) / factor, factor, value)
    return ScaledLoss(returned, torch.ones_like(returned), factor, value)
