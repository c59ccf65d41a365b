"""The samples that are wanted of a quantity with one entry per sample."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_curv.terms.jacobian import Jacobian


def wanted_rows(gradients: Tensor, subsampling: Sequence[int] | None) -> Tensor:
    """The rows of some samples, in the wanted order."""
    return gradients if subsampling is None else gradients[_checked(subsampling, len(gradients))]


def wanted_samples(jacobian: Jacobian, subsampling: Sequence[int] | None) -> Jacobian:
    """The Jacobian of some samples, in the wanted order."""
    if subsampling is None:
        return jacobian
    return jacobian[_checked(subsampling, jacobian.samples)]


def _checked(subsampling: Sequence[int], samples: int) -> list[int]:
    """The indices as they are.

    Raises:
        IndexError: Some sample is not there.
        TypeError: An index is no integer; a mask is no list of indices.
    """
    indices = subsampling.tolist() if isinstance(subsampling, Tensor) else list(subsampling)
    wrong = [index for index in indices if isinstance(index, bool) or int(index) != index]
    if wrong:
        raise TypeError(
            f"`subsampling` must hold indices of samples, found {wrong[0]!r}; of a mask pass "
            "`mask.nonzero().flatten().tolist()`."
        )
    missing = [index for index in indices if not -samples <= index < samples]
    if missing:
        raise IndexError(
            f"`subsampling` must hold indices of the {samples} samples of the batch, from "
            f"{-samples} to {samples - 1}, found {missing[0]}; leave out those that a smaller "
            "batch (the last one of an epoch?) does not have."
        )
    return [int(index) for index in indices]
