"""Order statistics of samples that are spread over processes, by one sum over them."""

from __future__ import annotations

import torch
from torch import Tensor

SIZE = 256  # samples per process up to which nothing is lost


def shared_sketch(values: Tensor, rank: int, world: int) -> Tensor:
    """Zeros but for this process' row, [world, 1 + `SIZE`]: the sum over processes has the row of each.

    A row is the number of values and the values in ascending order; of more than `SIZE` these are as many order
    statistics, equally spaced from the least to the largest.

    Args:
        values: of this process' samples, [N].
        rank: of this process.
        world: number of processes.
    """
    rows = values.new_zeros(world, 1 + SIZE)
    ordered, count = values.sort().values, len(values)
    if count > SIZE:
        position = torch.linspace(0, count - 1, SIZE, dtype=torch.float64, device=values.device)
        ordered = at(ordered, position)
    rows[rank, 0] = count
    rows[rank, 1 : 1 + len(ordered)] = ordered
    return rows


def pooled(rows: Tensor) -> tuple[Tensor, Tensor]:
    """All values in ascending order, and how many samples each stands for."""
    counts = rows[:, 0].nan_to_num().round()
    kept = counts.clamp(max=SIZE)
    weights = (counts / kept.clamp(min=1))[:, None].expand(-1, SIZE)
    inside = torch.arange(SIZE, device=rows.device) < kept[:, None]
    values, order = rows[:, 1:][inside].sort()
    return values, weights[inside][order]


def quantiles(values: Tensor, weights: Tensor, levels: Tensor) -> Tensor:
    """Quantiles by linear interpolation, those of `torch.quantile` if all weights are equal; NaN without values.

    Args:
        values: ascending, [K].
        weights: of the values, [K].
        levels: in [0, 1], [L].
    """
    if not len(values):
        return torch.full_like(levels, torch.nan)
    centers = weights.cumsum(0) - (weights + weights[0]) / 2
    targets = levels * centers[-1]
    upper = torch.searchsorted(centers, targets).clamp(max=len(values) - 1)
    lower = (upper - 1).clamp(min=0)
    gap = (centers[upper] - centers[lower]).clamp(min=torch.finfo(centers.dtype).tiny)
    return torch.lerp(values[lower], values[upper], ((targets - centers[lower]) / gap).clamp(0, 1))


def at(ordered: Tensor, position: Tensor) -> Tensor:
    """Values between the entries of a tensor, by linear interpolation."""
    return torch.lerp(ordered[position.floor().long()], ordered[position.ceil().long()], position.frac().to(ordered))
