"""Owners: the sample that every row of a tensor belongs to, and how to split and join tensors by it.

`BatchAxis` is the cheap form: one axis, whose size is N or a multiple of it. `RowOwners` is the
general one: rows in any order and of any number per sample, each with the number of its sample.
`ChosenOwners` are either for some of the samples.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

GOLDEN = 0.6180339887498949


class Owners(ABC):
    """Which sample owns each row of a tensor.

    Attributes:
        count: The number of samples N.
    """

    count: int

    @abstractmethod
    def owner(self, shape: Sequence[int]) -> Tensor:
        """The sample that every entry of a tensor belongs to; broadcasts against it."""

    @abstractmethod
    def split(self, tensor: Tensor, trailing: int = 0) -> Tensor:
        """The entries of every sample, ``[N, E, *trailing]``, filled up with zeros where samples have fewer rows."""

    @abstractmethod
    def join(self, entries: Tensor, shape: Sequence[int]) -> Tensor:
        """The tensor of this shape whose `split` are ``entries [N, E]``."""

    @abstractmethod
    def without(self, axis: int) -> Owners:
        """The same for a tensor whose axis ``axis``, which does not carry samples, was moved to the end."""

    def only(self, chosen: Tensor) -> ChosenOwners:
        """The same for some of the samples, ``chosen [S]`` in ascending order."""
        return ChosenOwners(len(chosen), self, chosen)

    def weights(self, like: Tensor, values: Tensor | None = None) -> Tensor:
        """A number per entry, the same for all entries of a sample.

        Args:
            like: A tensor whose shape, type and device the numbers get.
            values: One number per sample, ``[N]``; by default different ones in [1, 2).
        """
        if values is None:
            values = golden(self.count)
        owner = self.owner(like.shape)
        return values[owner.clamp(min=0)].to(like.device, like.dtype)


def golden(count: int) -> Tensor:
    """Different numbers in [1, 2), ``[N]``."""
    return 1 + (torch.arange(count, dtype=torch.float64) * GOLDEN).frac()


@dataclass(frozen=True)
class BatchAxis(Owners):
    """One axis that carries the samples.

    Attributes:
        count: The number of samples N.
        axis: The axis; its size is N or a multiple of it (rows of several positions per sample).
        minor: Whether the sample is the inner index of the rows, as in ``[T·N, ...]``.
    """

    count: int
    axis: int = 0
    minor: bool = False

    def owner(self, shape: Sequence[int]) -> Tensor:
        if not len(shape):
            return torch.zeros((), dtype=torch.long)
        rows = torch.arange(shape[self.axis])
        positions = max(1, shape[self.axis] // max(1, self.count))
        index = rows % max(1, self.count) if self.minor else rows // positions
        return index.reshape(-1, *[1] * (len(shape) - self.axis - 1))

    def without(self, axis: int) -> Owners:
        return replace(self, axis=self.axis - 1) if self.axis > axis else self

    def split(self, tensor: Tensor, trailing: int = 0) -> Tensor:
        if not tensor.ndim:
            tensor = tensor[None]
        rows = tensor.movedim(self.axis, 0) if self.axis else tensor
        if self.minor:
            rows = rows.unflatten(0, (-1, self.count)).transpose(0, 1)
        elif len(rows) != self.count and self.count:
            rows = rows.unflatten(0, (self.count, -1))
        kept = rows.shape[rows.ndim - trailing :]
        entries = math.prod(rows.shape[1 : rows.ndim - trailing])
        return rows.reshape(self.count, entries, *kept)

    def join(self, entries: Tensor, shape: Sequence[int]) -> Tensor:
        if not len(shape):
            return entries.reshape(())
        if not self.axis and not self.minor:
            return entries.reshape(torch.Size(shape))
        rest = [size for axis, size in enumerate(shape) if axis != self.axis]
        rows = entries.reshape(len(entries), shape[self.axis] // max(1, len(entries)), *rest)
        rows = (rows.transpose(0, 1) if self.minor else rows).reshape(shape[self.axis], *rest)
        return rows.movedim(0, self.axis)


@dataclass(frozen=True, eq=False)
class RowOwners(Owners):
    """Rows in any order and of any number per sample.

    Attributes:
        count: The number of samples N.
        index: The sample of every row, ``[R]``; -1: a row that no sample depends on.
        axes: The axes of the tensor that make up its rows, in this order.
    """

    count: int
    index: Tensor
    axes: tuple[int, ...] = (0,)

    @cached_property
    def lengths(self) -> Tensor:
        """The number of rows of every sample, ``[N]``."""
        return self.index[self.index >= 0].bincount(minlength=self.count)

    @cached_property
    def table(self) -> Tensor:
        """The rows of every sample, ``[N, longest]``; R behind the last one."""
        rows, longest = len(self.index), int(self.lengths.max()) if self.count else 0
        table = self.index.new_full((self.count, longest), rows)
        owned = (self.index >= 0).nonzero().squeeze(1)
        table[self.index[owned], self.position[owned]] = owned
        return table

    @cached_property
    def position(self) -> Tensor:
        """The place of every row among those of its sample, ``[R]``; 0 for those of no sample."""
        order = self.index.argsort(stable=True)
        ordered = self.index[order]
        starts = torch.searchsorted(ordered, ordered)  # where the rows of the same sample begin
        position = torch.empty_like(order)
        position[order] = torch.arange(len(order), device=order.device) - starts
        return position.masked_fill_(self.index < 0, 0)

    def to(self, device: torch.device) -> RowOwners:
        """The same on a device."""
        return (
            self
            if self.index.device == device
            else RowOwners(self.count, self.index.to(device), self.axes)
        )

    def owner(self, shape: Sequence[int]) -> Tensor:
        sizes = [shape[axis] for axis in self.axes]
        rest = [axis for axis in range(len(shape)) if axis not in self.axes]
        index = self.index.reshape(*sizes, *[1] * len(rest))
        places = [*self.axes, *rest]
        return index.permute([places.index(axis) for axis in range(len(shape))])

    def without(self, axis: int) -> Owners:
        axes = tuple(own - 1 if own > axis else own for own in self.axes)
        return RowOwners(self.count, self.index, axes)

    def rows(self, tensor: Tensor) -> Tensor:
        """The rows of a tensor in front, ``[R, *]``."""
        moved = tensor.movedim(self.axes, tuple(range(len(self.axes))))
        return moved.flatten(0, len(self.axes) - 1) if len(self.axes) > 1 else moved

    def padded(self, rows: Tensor, axis: int = 0, fill: float = 0) -> Tensor:
        """Rows on one axis as ``[..., N, longest, ...]``, filled up."""
        table = self.table.to(rows.device)
        shape = [*rows.shape[:axis], 1, *rows.shape[axis + 1 :]]
        extended = torch.cat([rows, rows.new_full(shape, fill)], axis)
        return extended.index_select(axis, table.flatten()).unflatten(axis, table.shape)

    def split(self, tensor: Tensor, trailing: int = 0) -> Tensor:
        padded = self.padded(self.rows(tensor))
        kept = padded.shape[padded.ndim - trailing :]
        return padded.reshape(
            self.count, math.prod(padded.shape[1 : padded.ndim - trailing]), *kept
        )

    def join(self, entries: Tensor, shape: Sequence[int]) -> Tensor:
        rest = [size for axis, size in enumerate(shape) if axis not in self.axes]
        here = self.to(entries.device)
        rows = entries.reshape(self.count, self.table.shape[1], *rest)[
            here.index.clamp(min=0), here.position
        ]
        rows = rows.masked_fill((here.index < 0).reshape(-1, *[1] * len(rest)), 0)
        moved = rows.reshape(*(shape[axis] for axis in self.axes), *rest)
        return moved.movedim(tuple(range(len(self.axes))), self.axes)


@dataclass(frozen=True, eq=False)
class ChosenOwners(Owners):
    """Some of the samples; rows of the others belong to none.

    Attributes:
        count: Their number S.
        whole: Which of all samples owns each row.
        chosen: The samples, ``[S]``, ascending.
    """

    count: int
    whole: Owners
    chosen: Tensor

    @cached_property
    def _places(self) -> Tensor:
        """The place of every sample among those that were chosen, ``[N]``; -1: it was not."""
        places = torch.full((self.whole.count,), -1)
        places[self.chosen] = torch.arange(self.count)
        return places

    def _places_of(self, owner: Tensor) -> Tensor:
        places = self._places.to(owner.device)
        return places[owner.clamp(min=0)].masked_fill(owner < 0, -1)

    def owner(self, shape: Sequence[int]) -> Tensor:
        return self._places_of(self.whole.owner(shape))

    def without(self, axis: int) -> Owners:
        return self.whole.without(axis).only(self.chosen)

    def split(self, tensor: Tensor, trailing: int = 0) -> Tensor:
        return self.whole.split(tensor, trailing)[self.chosen.to(tensor.device)]

    def join(self, entries: Tensor, shape: Sequence[int]) -> Tensor:
        every = entries.new_zeros(self.whole.count, *entries.shape[1:])
        every[self.chosen.to(entries.device)] = entries
        return self.whole.join(every, shape)

    def rows(self, count: int) -> Tensor:
        """Which of ``count`` rows belong to the chosen samples, ascending but for those of a minor `BatchAxis`."""
        whole = self.whole
        if isinstance(whole, RowOwners):
            return (self._places_of(whole.index) >= 0).nonzero().squeeze(1)
        assert isinstance(whole, BatchAxis)
        position = torch.arange(count // whole.count)
        if whole.minor:
            return (position[:, None] * whole.count + self.chosen).flatten()
        return (self.chosen[:, None] * len(position) + position).flatten()

    @cached_property
    def within(self) -> Owners:
        """Which of the chosen samples owns each of the rows that `rows` has left."""
        whole = self.whole
        if isinstance(whole, RowOwners):
            return RowOwners(
                self.count, self._places_of(whole.index[self.rows(len(whole.index))]), whole.axes
            )
        assert isinstance(whole, BatchAxis)
        return replace(whole, count=self.count)


def batch_axes(
    shape: Sequence[int], axes: Iterable[int], count: int, rows: bool = True
) -> list[BatchAxis]:
    """The axes that may carry N samples, axes of exactly N entries first, then rows of several positions per sample.

    Args:
        shape: The tensor's shape.
        axes: The axes that come into question, the likeliest first.
        count: N.
        rows: Whether rows of several positions come into question on every axis, instead of on the
            first only.
    """
    axes = list(axes)
    exact = [BatchAxis(count, axis) for axis in axes if shape[axis] == count]
    several = [axis for axis in (axes if rows else axes[:1]) if count and shape[axis] != count]
    several = [axis for axis in several if shape[axis] % count == 0 and shape[axis]]
    flat = [
        BatchAxis(count, axis, minor)
        for axis in several
        for minor in (False, True)[: 2 if count > 1 else 1]
    ]
    return exact + flat


def owners_of(numbers: Tensor, shape: Sequence[int], count: int) -> BatchAxis | RowOwners:
    """The owners of the rows of a tensor, the cheap form where there is one.

    Args:
        numbers: The sample of every entry; broadcasts against the tensor.
        shape: The tensor's shape.
        count: N.
    """
    aligned = numbers.long().cpu().reshape([1] * (len(shape) - numbers.ndim) + list(numbers.shape))
    axes = tuple(axis for axis, size in enumerate(aligned.shape) if size > 1) or (
        (0,) if shape else ()
    )
    index = aligned.expand(
        [shape[axis] if axis in axes else 1 for axis in range(len(shape))]
    ).flatten()
    if len(axes) == 1:
        for choice in batch_axes(shape, axes, count):
            if torch.equal(choice.owner(shape).flatten(), index):
                return choice
    return RowOwners(count, index, axes)


def largest_entry(tensors: Iterable[Tensor | None]) -> float:
    """The largest finite absolute value in all tensors."""
    found = (t.abs().nan_to_num(0.0, 0.0, 0.0) for t in tensors if t is not None and t.numel())
    return max((float(t.max()) for t in found), default=0.0)
