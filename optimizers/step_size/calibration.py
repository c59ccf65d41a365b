"""What is kept from step to step: the curvature along the directions, and how far steps went."""

from __future__ import annotations

import math
from typing import Any

from lightning_curv.optimizers.step_size.quadratic_model import Matrix

# A batch of so many samples counts as much as all before it.
SAMPLES = 16
# Curvature is kept if between two measurements it has grown by less than this factor.
HELD = 4.0
DECAY = 0.5  # of the running means of the weights and of the length of measured steps
# The bound on half the squared length of the steps between, as a share of that of measured ones.
# Each of those is as long as its own batch allows; of these the batch is not asked.
SHARE = 0.25


def averaged_curvature(
    memory: dict[str, Any],
    curvature: Matrix,
    lengths: list[float],
    samples: float,
) -> Matrix:
    r"""The curvature along the directions, per length a running mean over batches.

    Among the few samples of a small batch there is easily a direction that has next to no
    curvature, and a step that minimizes the model of this batch alone goes far along it. The fewer
    samples a batch has the longer is the mean: its decay is $1 / (1 + N / 16)$.

    Args:
        memory: Of the step rule, updated; "holds" says whether the curvature along each direction
            is below four times what was kept. That it falls, as that of a classifier does that
            becomes confident, makes steps too short, which the next measurement mends.
        curvature: $M$ of this batch, [K, K].
        lengths: Of the directions, [K].
        samples: $N$; inf: only this batch counts.
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
    memory["holds"] = False
    if len(former) == count:
        memory["holds"] = all(unit[i][i] < HELD * former[i][i] for i in range(count))
        decay = 1 / (1 + samples / SAMPLES)
        weight += decay * memory["unit_weight"]
        unit = [
            [old + (new - old) / weight for old, new in zip(old_row, new_row, strict=True)]
            for old_row, new_row in zip(former, unit, strict=True)
        ]
    memory["unit"], memory["unit_weight"] = unit, weight
    return _scaled(unit, lengths)


def kept_curvature(memory: dict[str, Any], lengths: list[float]) -> Matrix | None:
    """The curvature along the directions, where that per length is what it was last.

    Args:
        memory: Of the step rule.
        lengths: Of the directions, [K].

    Returns:
        The matrix, [K, K]; None if it was never measured of as many directions.
    """
    unit = memory.get("unit", [])
    return _scaled(unit, lengths) if len(unit) >= len(lengths) else None


def keep_step(memory: dict[str, Any], w: list[float], quadratic: float) -> None:
    """Take a measured step into the running means of its weights and of its length.

    Args:
        memory: Of the step rule, updated.
        w: Weights of the directions that minimize the model, [K].
        quadratic: Half of its squared length in the metric of the curvature.
    """
    if not all(map(math.isfinite, [*w, quadratic])):
        return
    former = memory.get("weights", [])
    if len(former) == len(w):
        memory["weights"] = [
            DECAY * old + (1 - DECAY) * new for old, new in zip(former, w, strict=True)
        ]
        memory["quadratic"] += (1 - DECAY) * (quadratic - memory["quadratic"])
    else:
        memory["weights"], memory["quadratic"] = list(w), quadratic


def kept_weights(memory: dict[str, Any], slope: list[float]) -> list[float]:
    r"""The weights of the directions in a step between measurements, [K].

    They are running means of those that minimized the models of the measured batches: the curvature
    per length of another direction is too far from that of this one to minimize a model with it.

    Args:
        memory: Of the step rule.
        slope: Along the directions, [K].

    >>> kept_weights({"weights": [-0.5, 0.25]}, slope=[1.0, -1.0])
    [-0.5, 0.25]
    >>> kept_weights({"weights": [-0.5, 1.5]}, slope=[1.0, 1.0])  # momentum leads uphill
    [-0.5, 0.0]
    """
    rate, *momenta = memory["weights"][: len(slope)]
    # Single models give any numbers; what is kept has to be a rate and a momentum. The weight of a
    # direction downhill is negative, and no step goes uphill.
    kept = [min(rate, 0.0) if slope[0] > 0 else 0.0, *(min(max(m, 0.0), 1.0) for m in momenta)]
    rises = sum(b * weight for b, weight in zip(slope, kept, strict=True)) >= 0
    return [kept[0], *(0.0 for _ in momenta)] if rises else kept


def shrink_of_kept(memory: dict[str, Any], quadratic: float) -> float:
    """What a step between measurements is multiplied by.

    Args:
        memory: Of the step rule.
        quadratic: Half of the squared length of the step by the kept curvature.

    >>> shrink_of_kept({"quadratic": 4.0}, 4.0)
    0.5
    """
    most = SHARE * memory["quadratic"]
    return math.sqrt(most / quadratic) if quadratic > most else 1.0


def _scaled(unit: Matrix, lengths: list[float]) -> Matrix:
    count = len(lengths)
    return [[unit[i][j] * lengths[i] * lengths[j] for j in range(count)] for i in range(count)]
