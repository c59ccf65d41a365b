"""The clipped sum of a batch, and how much a sample changes it."""

import torch

from lightning_curv import curvature
from lightning_curv.optimizers import DPSGD


def clipped_sum(model, compute_loss, batch, C, **settings):
    """Σ(S), flat, in float64."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = DPSGD(
        parameters, lr=0.0, clip_norm=C, noise_multiplier=0.0, expected_batch_size=1.0, **settings
    )
    with curvature(*optimizer.extensions, batch_size=len(batch[0])):
        compute_loss(model, *batch).backward()
    return torch.cat([total.flatten().double() for total in optimizer.statistics.totals()])


def change(model, compute_loss, batch, C):
    """‖Σ(S ∪ {x}) - Σ(S)‖ / C for the last sample x."""
    rest = [t[:-1] for t in batch]
    sums = [clipped_sum(model, compute_loss, b, C) for b in (batch, rest)]
    return float((sums[0] - sums[1]).norm()) / C
