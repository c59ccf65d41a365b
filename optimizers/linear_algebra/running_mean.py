"""Exponential moving average whose weights sum to one from the first value on."""

from __future__ import annotations

from torch import Tensor


def next_weight(weight: float, decay: float) -> float:
    """The sum of the weights of all values, that of the newest being 1."""
    return decay * weight + 1.0


def update_mean(mean: Tensor, value: Tensor, weight: float) -> None:
    r"""Move a running mean towards a value in place.

    $$m \leftarrow m + (x - m) / w, \qquad w \leftarrow \beta w + 1.$$

    Starting from $w = 0$ this equals $\sum_k \beta^{K-k} x_k / \sum_k \beta^{K-k}$, the
    bias-corrected exponential moving average; the first value replaces whatever `mean` holds.

    Args:
        mean: running mean, overwritten.
        value: new value, any dtype, same shape.
        weight: $w$ after the update.
    """
    mean.lerp_(value.detach().to(mean), 1.0 / weight)
