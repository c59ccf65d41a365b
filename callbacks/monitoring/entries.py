"""What the entries of gradients are like: mean, spread, largest magnitude, zeros."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_curv.callbacks.monitoring.quantiles import Numbers
from lightning_curv.devices import on_one_device
from lightning_curv.precision import wide

COLUMNS = 4  # mean, mean squared deviation from it, largest magnitude, number that are not zero


def stored(gradient: Tensor) -> Tensor:
    """The entries that are in memory, real and of at least single precision; a complex one is two.

    Of a sparse gradient the others are zero.
    """
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    values = torch.view_as_real(values.resolve_conj()) if values.is_complex() else values
    # Sums in half precision overflow, or lose the small entries.
    return values.float() if values.dtype.itemsize < 4 else values


def entry_rows(
    values: Sequence[Tensor], spread: bool = True, largest: bool = True, zeros: bool = True
) -> Tensor:
    """Numbers of several gradients, [P, `COLUMNS`], on their device; zeros for one without entries.

    Args:
        values: entries of each, as `stored` gives them.
        spread: whether mean and deviation are wanted; columns that are not are zero.
        largest: whether the largest magnitude is.
        zeros: whether the number that are not zero is.
    """
    full = [tensor for tensor in values if tensor.numel()]
    if not full:
        return torch.zeros(len(values), COLUMNS, dtype=torch.float64)
    # Rows have all columns whatever is wanted: readers need not know what was.
    nothing = [full[0].new_zeros(())] * len(full)
    means = [tensor.mean() for tensor in full] if spread else nothing
    columns = [
        means,
        [_mean_square(t - mean) for t, mean in zip(full, means)] if spread else nothing,
        [_largest(tensor) for tensor in full] if largest else nothing,
        [tensor.count_nonzero() for tensor in full] if zeros else nothing,
    ]
    found = torch.stack(
        [torch.stack(on_one_device(map(wide, column))) for column in columns], dim=1
    )
    if len(full) == len(values):
        return found
    rows = found.new_zeros(len(values), COLUMNS)
    rows[[index for index, tensor in enumerate(values) if tensor.numel()]] = found
    return rows


# `torch.var_mean` and the norm of order infinity take ten times as long on a CPU.
def _mean_square(deviations: Tensor) -> Tensor:
    return wide(torch.linalg.vector_norm(deviations)) ** 2 / deviations.numel()


def _largest(tensor: Tensor) -> Tensor:
    low, high = torch.aminmax(tensor)
    return torch.maximum(-low, high)


@dataclass(frozen=True)
class Entries:
    """All entries of several gradients together.

    Args:
        mean: of them.
        std: standard deviation, unbiased.
        largest: magnitude.
        zeros: the share of them that is zero.
    """

    mean: float
    std: float
    largest: float
    zeros: float


def pooled_entries(rows: Numbers, stored: Sequence[int], sizes: Sequence[int]) -> Entries:
    """Put gradients together.

    Squared deviations from the common mean are those from each gradient's own mean and those of the
    means, which does not cancel as a difference of moments does. Chan, Golub & LeVeque, *Updating
    formulae and a pairwise algorithm for computing sample variances*, COMPSTAT 1982.

    Args:
        rows: of `entry_rows`, [P, `COLUMNS`].
        stored: numbers of entries that the rows are of, [P].
        sizes: numbers of all entries, the others being zero, [P].
    """
    total = sum(sizes)
    if not total:
        return Entries(np.nan, np.nan, np.nan, np.nan)
    # The last group are the zeros that sparse gradients do not store: mean and deviation 0.
    counts = np.array([*stored, total - sum(stored)], dtype=np.float64)
    means, variances = (np.append(rows[:, column], 0.0) for column in (0, 1))
    mean = float(counts @ means / total)
    squares = float(counts @ (variances + (means - mean) ** 2))
    std = float(np.sqrt(squares / (total - 1))) if total > 1 else np.nan
    return Entries(mean, std, float(rows[:, 2].max()), 1 - float(rows[:, 3].sum()) / total)
