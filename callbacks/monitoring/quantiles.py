"""Order statistics of samples that are spread over processes, by one sum over them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_curv.precision import widest

Numbers = NDArray[np.float64]
SIZE = 256  # samples per process up to which nothing is lost


def shared_sketch(values: Tensor, rank: int, world: int) -> Tensor:
    """Zeros but for this process' row, [world, 1 + `SIZE`]: the sum over processes has all rows.

    A row is the number of values and the values in ascending order; of more than `SIZE` these are
    as many order statistics, equally spaced from the least to the largest.

    Args:
        values: of this process' samples, [N].
        rank: of this process.
        world: number of processes.
    """
    rows = values.new_zeros(world, 1 + SIZE)
    ordered, count = values.sort().values, len(values)
    if count > SIZE:
        # Single precision does not tell positions beyond 2²⁴ apart.
        position = torch.linspace(
            0, count - 1, SIZE, dtype=widest(values.device), device=values.device
        )
        ordered = at(ordered, position)
    rows[rank, 0] = count
    rows[rank, 1 : 1 + len(ordered)] = ordered
    return rows


def pooled(rows: Tensor) -> tuple[Tensor, Tensor]:
    """All values in ascending order, and how many samples each stands for."""
    # NaN: a process that could not compute its norms. Rounded: a mean over processes, times W.
    counts = rows[:, 0].nan_to_num().round()
    kept = counts.clamp(max=SIZE)
    weights = (counts / kept.clamp(min=1))[:, None].expand(-1, SIZE)
    inside = torch.arange(SIZE, device=rows.device) < kept[:, None]
    values, order = rows[:, 1:][inside].sort()
    return values, weights[inside][order]


def quantiles(values: Numbers, weights: Numbers | None, levels: Sequence[float]) -> list[float]:
    """Quantiles by linear interpolation; NaN without values.

    They are those of `torch.quantile` if all weights are equal.

    Args:
        values: ascending, [K].
        weights: of the values, [K]; None: equal.
        levels: in [0, 1], [L].
    """
    if not len(values):
        return [math.nan] * len(levels)
    if weights is None:
        return [_between(values, level * (len(values) - 1)) for level in levels]
    # A value is in the middle of the samples that it stands for: 0, 1, 2, ... if all weights are 1.
    centers = weights.cumsum() - (weights + weights[0]) / 2
    return np.interp(np.asarray(levels) * centers[-1], centers, values).tolist()


def _between(values: Numbers, position: float) -> float:
    """A value between two neighbours, by linear interpolation."""
    low = int(position)
    value, part = float(values[low]), position - low
    return value + part * (float(values[low + 1]) - value) if part else value


def at(ordered: Tensor, position: Tensor) -> Tensor:
    """Values between the entries of a tensor, by linear interpolation."""
    return torch.lerp(
        ordered[position.floor().long()],
        ordered[position.ceil().long()],
        position.frac().to(ordered),
    )
