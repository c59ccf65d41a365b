"""The one moment where processes meet: clipped sums are added up, and noise is added once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from lightning_curv.optimizers.privacy_noise import NoiseSource


def summed_over_ranks(totals: Sequence[Tensor], stds: Sequence[float], noise: NoiseSource) -> list[Tensor]:
    """Sum tensors over all processes, plus Gaussian noise.

    Rank 0 draws the noise before the sum, so that all processes end with the same numbers.

    Args:
        totals: This process' sums, the same shapes everywhere; they are overwritten.
        stds: Standard deviation of the noise of each.
        noise: Draws it.

    Returns:
        The noisy sums. Cost: one collective of a flat copy per dtype.
    """
    distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if not distributed or dist.get_rank() == 0:
        for total, std in zip(totals, stds, strict=True):
            if std:
                total.add_(noise.like(total).to(total), alpha=std)
    if not distributed:
        return list(totals)
    reduced: list[Tensor] = list(totals)
    for dtype in dict.fromkeys(total.dtype for total in totals):
        chosen = [i for i, total in enumerate(totals) if total.dtype == dtype]
        flat = torch.cat([totals[i].flatten() for i in chosen])
        dist.all_reduce(flat)
        for i, piece in zip(chosen, flat.split([totals[i].numel() for i in chosen]), strict=True):
            reduced[i] = piece.view_as(totals[i])
    return reduced
