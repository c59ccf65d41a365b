"""Where a tensor carries the samples, and how the graph itself tells."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_curv.errors import UnsupportedError

GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Place:
    """The position of the samples in a tensor.

    Attributes:
        axis: The axis; its size is N or a multiple of it (rows of several positions per sample).
        minor: Whether the sample is the inner index of the rows.
    """

    axis: int = 0
    minor: bool = False

    def owner(self, shape: Sequence[int], samples: int) -> Tensor:
        """The sample that every entry of a tensor belongs to; broadcasts against it."""
        if not len(shape):
            return torch.zeros(())
        rows = torch.arange(shape[self.axis])
        index = rows % samples if self.minor else rows // max(1, shape[self.axis] // max(1, samples))
        return index.reshape(-1, *[1] * (len(shape) - self.axis - 1))

    def split(self, tensor: Tensor, samples: int) -> Tensor:
        """The entries of every sample, ``[N, E]``."""
        rows = tensor.movedim(self.axis, 0) if tensor.ndim else tensor[None]
        if self.minor:
            rows = rows.unflatten(0, (-1, samples)).transpose(0, 1)
        return rows.reshape(samples, -1)

    def join(self, entries: Tensor, shape: Sequence[int]) -> Tensor:
        """The tensor of this shape whose `split` are ``entries``."""
        if not len(shape):
            return entries.reshape(())
        rest = [size for axis, size in enumerate(shape) if axis != self.axis]
        rows = entries.reshape(len(entries), -1, *rest)
        rows = (rows.transpose(0, 1) if self.minor else rows).reshape(shape[self.axis], *rest)
        return rows.movedim(0, self.axis)

    def weights(self, like: Tensor, samples: int) -> Tensor:
        """A number in [1, 2) per entry, the same for all entries of a sample and different for different samples."""
        owner = self.owner(like.shape, samples).to(like.device)
        return 1 + (owner * GOLDEN).frac().to(like.dtype)


def consistent(
    first: Tensor, second: Tensor, scale: float, eps: float, choices: Iterable[Place], samples: int
) -> list[Place]:
    """The places that two cotangents agree with, where the second started as the first times `Place.weights`.

    Backpropagation is linear: as long as samples do not mix, every entry keeps the weight of its sample. Entries that
    are not finite tell nothing.

    Args:
        first: Cotangent of any shape.
        second: The other one.
        scale: The largest entry of all cotangents of the pass, whose rounding errors may remain where they cancel.
        eps: The rounding of the coarsest type of number that the pass may have gone through.
        choices: Possible places.
        samples: N.
    """
    own = torch.finfo(first.dtype).eps
    eps = max(eps, own)
    unknown = ~(first.isfinite() & second.isfinite())
    largest = largest_entry([first])
    tolerance = eps * ((1e3 if eps < 1e-6 else 32) * largest + 8 * scale)

    def deviation(place: Place) -> Tensor:
        return (second - first * place.weights(first, samples)).masked_fill(unknown, 0)

    norms = {p: float(d.norm()) for p in choices if bool(((d := deviation(p)).abs() <= tolerance).all())}
    # Where the rounding is coarse, more than one place may agree, but the right one by far the best.
    most = 8 * min(norms.values(), default=0.0) + 4 * own * float(first.masked_fill(unknown, 0).norm())
    return [place for place, norm in norms.items() if norm <= most]


def largest_entry(tensors: Iterable[Tensor | None]) -> float:
    """The largest finite absolute value in all tensors."""
    found = (t.abs().nan_to_num(0.0, 0.0) for t in tensors if t is not None and t.numel())
    return max((float(t.max()) for t in found), default=0.0)


def places_of(first: Tensor, second: Tensor, scale: float, eps: float, samples: int) -> list[Place]:
    """The places of the samples that a tensor of the graph may have, from two cotangents as in `consistent`.

    Raises:
        UnsupportedError: There is none: samples mix.
    """
    exact = [Place(axis) for axis, size in enumerate(first.shape) if size == samples]
    rows = [axis for axis, size in enumerate(first.shape) if size != samples and size % max(1, samples) == 0]
    choices = [*exact, *(Place(axis, minor) for axis in rows for minor in (False, True))] if first.ndim else [Place()]
    found = consistent(first, second, scale, eps, choices[:1] if samples <= 1 else choices, samples)
    if not found:
        raise UnsupportedError(
            f"Expected one axis with {samples} samples in a tensor of shape {tuple(first.shape)}, found none that "
            "keeps them apart: an op mixes samples."
        )
    return found


def places(shape: Sequence[int], axes: Sequence[int], samples: int) -> list[Place]:
    """All places that N samples may have in a tensor, axes of exactly N entries first, then flattened ones."""
    exact = [Place(axis) for axis in axes if shape[axis] == samples]
    if shape[axes[0]] == samples or shape[axes[0]] % max(samples, 1):
        return exact
    return exact + [Place(axes[0], minor) for minor in (False, True)[: 2 if samples > 1 else 1]]
