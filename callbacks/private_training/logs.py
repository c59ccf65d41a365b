"""What a private run logs: values that are private by construction, and apart from them others."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from lightning_curv.distributed.shards import whole
from lightning_curv.optimizers.privacy.optimizer import DPOptimizer

if TYPE_CHECKING:
    from pytorch_lightning import Trainer


def private_values(optimizer: DPOptimizer) -> dict[str, float]:
    """Settings, and the norm of the noised gradient."""
    # After its step the private optimizer leaves the noised mean there: its norm costs no privacy.
    grads = [
        whole(p.grad.norm()).float()
        for group in optimizer.param_groups
        for p in group["params"]
        if p.grad is not None
    ]
    return {
        "privacy/noise_multiplier": optimizer.noise_multiplier or 0.0,
        "privacy/clip_norm": optimizer.clip_norm,
        "privacy/noised_grad_norm": float(torch.stack(grads).norm()),
    }


def non_private_values(optimizer: DPOptimizer) -> dict[str, float]:
    """Statistics of the samples of the step that is about to be made; empty without samples."""
    statistics = optimizer.statistics
    if not statistics.norms:
        return {}
    norms = torch.cat(statistics.norms)
    finite = norms[norms.isfinite()]
    return {
        "non_private/sample_norm_median": float(finite.median()) if len(finite) else math.nan,
        "non_private/sample_norm_max": float(finite.max()) if len(finite) else math.nan,
        "non_private/clipped_fraction": float((norms > optimizer.clip_norm).float().mean()),
        "non_private/discarded": float(statistics.discarded),
    }


def write(trainer: Trainer, values: dict[str, float], step: int) -> None:
    """Send values to all loggers, named as each of them groups."""
    for logger in trainer.loggers:
        named = {name.replace("/", logger.group_separator): value for name, value in values.items()}
        logger.log_metrics(named, step=step)
