r"""Histograms of all entries of the per-sample gradients, alone and with the parameters' values.

Their bins do not depend on the data, so that counts of chunks, parameters, micro-batches and
processes add up exactly: they are equally wide on a logarithmic scale for either sign, with one bin
around zero.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_curv.callbacks.monitoring.quantiles import Numbers
from lightning_curv.extensions import Extension
from lightning_curv.precision import wide
from lightning_curv.terms.jacobian import Jacobian

LEAST, MOST = -12, 4  # decades
FINE, COARSE = 10, 3  # bins per decade, in one and in two dimensions
ONE, TWO = "grad_hist_1d", "grad_hist_2d"  # the savefields
CHUNK = 2**20  # entries that are counted at a time


def limits(per_decade: int, like: Tensor | None = None) -> Tensor:
    """Upper limits of all bins but the last one, which has none; a bin holds its upper limit.

    Args:
        per_decade: number of bins.
        like: gives type and device.
    """
    decades = torch.arange(LEAST * per_decade, MOST * per_decade + 1, dtype=torch.float64)
    magnitudes = 10 ** (decades / per_decade)
    both = torch.cat([-magnitudes.flip(0), magnitudes])
    return both if like is None else both.to(like)


class GradientHistogram(Extension):
    r"""Counts of the entries of all $g_n$, of a parameter, in `grad_hist_1d` or `grad_hist_2d`.

    Args:
        joint: count pairs of a gradient's entry and the parameter's value there: rows are bins of
            the gradient, columns of the value.

    Attributes:
        factor: that the loss of the coming backward pass carries.
    """

    totals = False

    def __init__(self, joint: bool) -> None:
        self.joint = joint
        self.savefield = TWO if joint else ONE
        self.factor: Tensor | float = 1.0

    def evaluate(self, jacobian: Jacobian) -> Tensor:
        """Count, a few samples at a time."""
        like = jacobian.terms[0].g
        bounds = limits(COARSE if self.joint else FINE, like)
        bins = len(bounds) + 1
        counts = torch.zeros(bins**2 if self.joint else bins, dtype=torch.int64, device=like.device)
        # From shares in the mean over the samples, as it was scaled, to gradients of single losses.
        scale = jacobian.samples / self.factor
        column = None
        if self.joint:
            # All samples have the same parameters: their bins are found once.
            column = torch.bucketize(jacobian.parameter.detach().to(bounds), bounds)
        for chunk in jacobian.chunks():
            for entries in (chunk[0] * scale).split(max(1, CHUNK // chunk[0, 0].numel())):
                index = torch.bucketize(entries.to(bounds), bounds)
                if column is not None:
                    # A pair as one number, which `bincount` can count.
                    index = index * bins + column
                counts += torch.bincount(index.flatten(), minlength=len(counts))
        # No integers: processes average them.
        return wide(counts)


def histogram_1d(counts: Numbers, scale: float) -> dict[str, Any]:
    """For TensorBoard, without empty bins at the ends; empty if nothing was counted.

    Args:
        counts: of all bins.
        scale: of the entries, of the unit that the bins are in.
    """
    if not counts.any() or not np.isfinite([*counts, scale]).all():
        return {}
    # The outer bins have no limit; the largest number stands for it.
    upper = np.append(scale * limits(FINE).numpy(), sys.float_info.max)
    lower = np.append(-sys.float_info.max, upper[:-1])
    used = np.flatnonzero(counts)
    first, last = used[0], used[-1] + 1
    # Halved before they are added, and clipped: sums and squares of the outer limits overflow.
    centers = np.clip((lower / 2 + upper / 2)[first:last], -1e150, 1e150)
    kept = counts[first:last]
    return {
        "min": float(lower[first]),
        "max": float(upper[last - 1]),
        "num": int(kept.sum()),
        "sum": float(kept @ centers),
        "sum_squares": float(kept @ centers**2),
        "bucket_limits": [float(limit) for limit in upper[first:last]],
        "bucket_counts": [int(count) for count in kept],
    }


def image_2d(counts: Numbers, pixels: int = 8) -> Tensor | None:
    """Counts as an image [3, H, W]: gradients upwards, values of parameters to the right.

    Both from - to +. Black: none; dark blue to yellow: few to many, on a logarithmic scale. Empty
    rows and columns around are left out; grey lines are where gradient and value are zero.
    """
    bins = round(len(counts) ** 0.5)
    if not counts.any() or not np.isfinite(counts).all():
        return None
    table = torch.from_numpy(counts.reshape(bins, bins).copy())
    rows, columns = (table.sum(axis).nonzero().flatten() for axis in (1, 0))
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    left, right = int(columns[0]), int(columns[-1]) + 1
    shade = (table.log1p() / table.max().log1p()).float()
    colors = torch.tensor([[0.15, 0.15, 0.45], [1.0, 0.9, 0.2]], dtype=torch.float32)
    image = torch.lerp(colors[0, :, None, None], colors[1, :, None, None], shade[None])
    zero = torch.zeros_like(table, dtype=torch.bool)
    # As many limits above zero as below: the number of bins is odd, that in the middle holds zero.
    zero[bins // 2], zero[:, bins // 2] = True, True
    background = 0.35 * zero.float()
    # Rows of an image go down, the axis of the gradients goes up.
    image = torch.where(table == 0, background, image)[:, top:bottom, left:right].flip(1)
    return image.repeat_interleave(pixels, 1).repeat_interleave(pixels, 2)
