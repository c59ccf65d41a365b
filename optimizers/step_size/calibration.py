"""The curvature along the directions of a step, averaged over batches."""

from __future__ import annotations

import math
from typing import Any

from lightning_curv.optimizers.step_size.quadratic_model import Matrix

# A batch of so many samples counts as much as all before it.
SAMPLES = 16


def averaged_curvature(
    memory: dict[str, Any],
    curvature: Matrix,
    lengths: list[float],
    samples: int,
) -> Matrix:
    r"""The curvature along the directions, per length a running mean over batches.

    Among the few samples of a small batch there is easily a direction that has next to no
    curvature, and a step that minimizes the model of this batch alone goes far along it. The fewer
    samples a batch has the longer is the mean: its decay is $1 / (1 + N / 16)$.

    Args:
        memory: Of the step rule, updated.
        curvature: $M$ of this batch, [K, K].
        lengths: Of the directions, [K].
        samples: $N$.
    """
    count = len(lengths)
    scales = [1 / length if length > 0 else 0.0 for length in lengths]
    unit = [[curvature[i][j] * scales[i] * scales[j] for j in range(count)] for i in range(count)]
    former = memory.get("unit", [])
    # One undefined batch would spoil the mean for ever.
    if not all(math.isfinite(entry) for row in unit for entry in row):
        return curvature
    # Of another number of directions, as before the first momentum, nothing can be averaged.
    weight = 1.0
    if len(former) == count:
        decay = 1 / (1 + samples / SAMPLES)
        weight += decay * memory["unit_weight"]
        unit = [
            [old + (new - old) / weight for old, new in zip(old_row, new_row, strict=True)]
            for old_row, new_row in zip(former, unit, strict=True)
        ]
    memory["unit"], memory["unit_weight"] = unit, weight
    return [[unit[i][j] * lengths[i] * lengths[j] for j in range(count)] for i in range(count)]
