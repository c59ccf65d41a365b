"""Exponential moving average whose weights sum to one from the first value on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
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
    return updated_means([mean], [value], weight)[0]


def updated_means(means: Sequence[Tensor], values: Sequence[Tensor], weight: float) -> list[Tensor]:
    """The same of several means with the same weights, all at once."""
    new = [value.detach().to(mean) for mean, value in zip(means, values, strict=True)]
    if not in_place(means):
        return list(torch._foreach_lerp(list(means), new, 1.0 / weight))
    torch._foreach_lerp_(list(means), new, 1.0 / weight)
    return list(means)


def in_place(means: Sequence[Tensor]) -> bool:
    """Whether running means are changed in place: that of all on a processor.

    On a device it is known only later whether a step is to be taken back: see `Readings`.
    """
    return all(mean.device.type == "cpu" for mean in means)
