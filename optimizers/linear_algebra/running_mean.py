"""Exponential moving average whose weights sum to one from the first value on."""

from __future__ import annotations

from torch import Tensor


def next_weight(weight: float, decay: float) -> float:
    """The sum of the weights of all values, that of the newest being 1."""
    return decay * weight + 1.0


def updated_mean(mean: Tensor, value: Tensor, weight: float) -> Tensor:
    r"""A running mean moved towards a value, in place on a processor.

    $$m \leftarrow m + (x - m) / w, \qquad w \leftarrow \beta w + 1.$$

    Starting from $w = 0$ this equals $\sum_k \beta^{K-k} x_k / \sum_k \beta^{K-k}$, the
    bias-corrected exponential moving average; the first value replaces whatever `mean` holds.

    Args:
        mean: running mean.
        value: new value, any dtype, same shape.
        weight: $w$ after the update.
    """
    value = value.detach().to(mean)
    if mean.device.type == "cpu":
        return mean.lerp_(value, 1.0 / weight)
    # Whether a step is to be taken back is known there when it has been made: see `Readings`.
    return mean.lerp(value, 1.0 / weight)
