"""Owners: the sample that every row of a tensor belongs to; tensors split and joined by it.

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

    @property
    @abstractmethod
    def axes(self) -> tuple[int, ...]:
        """The axes that carry the samples, together."""

    @abstractmethod
    def owner(self, shape: Sequence[int]) -> Tensor:
        """The sample that every entry of a tensor belongs to; broadcasts against it."""

    @abstractmethod
    def split(self, tensor: Tensor, trailing: int = 0) -> Tensor:
        """The entries of every sample, `[N, E, *trailing]`; zeros where one has fewer rows.

        Args:
            tensor: The tensor.
            trailing: The number of trailing axes that stay as they are.
        """

    @abstractmethod
    def join(self, entries: Tensor, shape: Sequence[int]) -> Tensor:
        """The tensor of this shape whose `split` are `entries [N, E]`."""

    @abstractmethod
    def without(self, axis: int) -> Owners:
        """The same for a tensor one of whose axes, which carries no samples, moved to the end.

        Args:
            axis: The axis that moved.
        """

    def only(self, chosen: Tensor) -> ChosenOwners:
        """The same for some of the samples, `chosen [S]` in ascending order."""
        return ChosenOwners(len(chosen), self, chosen)

    def weights(self, like: Tensor, values: Tensor | None = None) -> Tensor:
        """A number per entry, the same for all entries of a sample.

        Args:
            like: A tensor whose shape, type and device the numbers get.
            values: One number per sample, `[N]`; by default different ones in [1, 2).
        """
        if values is None:
            values = golden(self.count)
        owner = self.owner(like.shape)
        # Rows of no sample get some number: callers do not read them.
        by_row = values[owner.clamp(min=0)]
        return by_row.to(like.device, like.dtype)


def golden(count: int) -> Tensor:
    """Different numbers in [1, 2), `[N]`."""
    # Multiples of the golden ratio, modulo one, are as far apart as so many numbers can be.
    multiples = torch.arange(count, dtype=torch.float64) * GOLDEN
    return 1 + multiples.frac()


@dataclass(frozen=True)
class BatchAxis(Owners):
    """One axis that carries the samples.

    Attributes:
        count: The number of samples N.
        axis: The axis; its size is N or a multiple of it (rows of several positions per sample).
        inner: Whether the sample is the inner index of the rows, as in `[T·N, ...]`.
    """

    count: int
    axis: int = 0
    inner: bool = False

    @property
    def axes(self) -> tuple[int, ...]:
        return (self.axis,)

    def owner(self, shape: Sequence[int]) -> Tensor:
        if not len(shape):
            return torch.zeros((), dtype=torch.long)
        rows = torch.arange(shape[self.axis])
        samples = max(1, self.count)
        positions = max(1, shape[self.axis] // samples)
        index = rows % samples if self.inner else rows // positions
        following = [1] * (len(shape) - self.axis - 1)
        return index.reshape(-1, *following)

    def without(self, axis: int) -> Owners:
        if self.axis > axis:
            return replace(self, axis=self.axis - 1)
        return self

    def split(self, tensor: Tensor, trailing: int = 0) -> Tensor:
        if not tensor.ndim:
            tensor = tensor[None]
        # The axis of the samples in front; a view.
        rows = tensor.movedim(self.axis, 0) if self.axis else tensor
        if self.inner:
            rows = rows.unflatten(0, (-1, self.count)).transpose(0, 1)
        elif len(rows) != self.count and self.count:
            rows = rows.unflatten(0, (self.count, -1))
        first_kept = rows.ndim - trailing
        kept = rows.shape[first_kept:]
        entries = math.prod(rows.shape[1:first_kept])
        return rows.reshape(self.count, entries, *kept)

    def join(self, entries: Tensor, shape: Sequence[int]) -> Tensor:
        if not len(shape):
            return entries.reshape(())
        if not self.axis and not self.inner:
            return entries.reshape(torch.Size(shape))
        rest = [size for axis, size in enumerate(shape) if axis != self.axis]
        # Rows per sample on the axis.
        positions = shape[self.axis] // max(1, len(entries))
        rows = entries.reshape(len(entries), positions, *rest)
        if self.inner:
            rows = rows.transpose(0, 1)
        joined = rows.reshape(shape[self.axis], *rest)
        return joined.movedim(0, self.axis)


@dataclass(frozen=True, eq=False)
class RowOwners(Owners):
    """Rows in any order and of any number per sample.

    Attributes:
        count: The number of samples N.
        index: The sample of every row, `[R]`; -1: a row that no sample depends on.
        axes: The axes of the tensor that make up its rows, in this order.
    """

    count: int
    index: Tensor
    axes: tuple[int, ...] = (0,)

    @cached_property
    def lengths(self) -> Tensor:
        """The number of rows of every sample, `[N]`."""
        owned = self.index[self.index >= 0]
        return owned.bincount(minlength=self.count)

    @cached_property
    def table(self) -> Tensor:
        """The rows of every sample, `[N, longest]`; R behind the last one."""
        longest = int(self.lengths.max()) if self.count else 0
        no_row = len(self.index)
        table = self.index.new_full((self.count, longest), no_row)
        owned = (self.index >= 0).nonzero().squeeze(1)
        owner = self.index[owned]
        table[owner, self.position[owned]] = owned
        return table

    @cached_property
    def position(self) -> Tensor:
        """The place of every row among those of its sample, `[R]`; 0 for those of no sample."""
        order = self.index.argsort(stable=True)  # rows of a sample stay in their order
        ordered = self.index[order]
        starts = torch.searchsorted(ordered, ordered)  # where the rows of the same sample begin
        place_in_order = torch.arange(len(order), device=order.device)
        position = torch.empty_like(order)
        position[order] = place_in_order - starts
        return position.masked_fill_(self.index < 0, 0)

    def to(self, device: torch.device) -> RowOwners:
        """The same on a device."""
        if self.index.device == device:
            return self
        return RowOwners(self.count, self.index.to(device), self.axes)

    def owner(self, shape: Sequence[int]) -> Tensor:
        sizes = [shape[axis] for axis in self.axes]
        rest = [axis for axis in range(len(shape)) if axis not in self.axes]
        index = self.index.reshape(*sizes, *[1] * len(rest))
        # The axes of the rows are in front: bring every axis back to its place.
        places = [*self.axes, *rest]
        order = [places.index(axis) for axis in range(len(shape))]
        return index.permute(order)

    def without(self, axis: int) -> Owners:
        axes = tuple(own - 1 if own > axis else own for own in self.axes)
        return RowOwners(self.count, self.index, axes)

    def rows(self, tensor: Tensor) -> Tensor:
        """The rows of a tensor in front, `[R, *]`."""
        front = tuple(range(len(self.axes)))
        moved = tensor.movedim(self.axes, front)
        if len(front) > 1:
            return moved.flatten(0, len(front) - 1)
        return moved

    def padded(self, rows: Tensor, axis: int = 0, fill: float = 0) -> Tensor:
        """Rows on one axis as `[..., N, longest, ...]`, filled up.

        Args:
            rows: A tensor with R entries along one axis.
            axis: That axis.
            fill: What stands where samples have fewer rows than the longest.
        """
        table = self.table.to(rows.device)
        # The number R in the table is that of one more row, which holds the filling.
        filling_shape = list(rows.shape)
        filling_shape[axis] = 1
        filling = rows.new_full(filling_shape, fill)
        extended = torch.cat([rows, filling], axis)
        by_sample = extended.index_select(axis, table.flatten())
        return by_sample.unflatten(axis, table.shape)

    def split(self, tensor: Tensor, trailing: int = 0) -> Tensor:
        padded = self.padded(self.rows(tensor))
        last = padded.ndim - trailing
        entries = math.prod(padded.shape[1:last])
        return padded.reshape(self.count, entries, *padded.shape[last:])

    def join(self, entries: Tensor, shape: Sequence[int]) -> Tensor:
        rest = [size for axis, size in enumerate(shape) if axis not in self.axes]
        here = self.to(entries.device)
        longest = self.table.shape[1]
        by_sample = entries.reshape(self.count, longest, *rest)
        some_owner = here.index.clamp(min=0)
        rows = by_sample[some_owner, here.position]
        unowned = (here.index < 0).reshape(-1, *[1] * len(rest))
        rows = rows.masked_fill(unowned, 0)
        row_sizes = [shape[axis] for axis in self.axes]
        front = tuple(range(len(self.axes)))
        return rows.reshape(*row_sizes, *rest).movedim(front, self.axes)


@dataclass(frozen=True, eq=False)
class ChosenOwners(Owners):
    """Some of the samples; rows of the others belong to none.

    Attributes:
        count: Their number S.
        whole: Which of all samples owns each row.
        chosen: The samples, `[S]`, ascending.
    """

    count: int
    whole: Owners
    chosen: Tensor

    @property
    def axes(self) -> tuple[int, ...]:
        return self.whole.axes

    @cached_property
    def _places(self) -> Tensor:
        """The place of every sample among those that were chosen, `[N]`; -1: it was not."""
        places = torch.full((self.whole.count,), -1)
        places[self.chosen] = torch.arange(self.count)
        return places

    def _places_of(self, owner: Tensor) -> Tensor:
        places = self._places.to(owner.device)
        # An index of -1 would read the last sample's place: those rows are filled in afterwards.
        by_row = places[owner.clamp(min=0)]
        return by_row.masked_fill(owner < 0, -1)

    def owner(self, shape: Sequence[int]) -> Tensor:
        return self._places_of(self.whole.owner(shape))

    def without(self, axis: int) -> Owners:
        return self.whole.without(axis).only(self.chosen)

    def split(self, tensor: Tensor, trailing: int = 0) -> Tensor:
        return self.whole.split(tensor, trailing)[self.chosen.to(tensor.device)]

    def join(self, entries: Tensor, shape: Sequence[int]) -> Tensor:
        every = entries.new_zeros(self.whole.count, *entries.shape[1:])
        chosen = self.chosen.to(entries.device)
        every[chosen] = entries
        return self.whole.join(every, shape)

    def rows(self, count: int) -> Tensor:
        """Which of `count` rows belong to the chosen samples.

        They ascend, but for those of an inner `BatchAxis`.
        """
        whole = self.whole
        if isinstance(whole, RowOwners):
            places = self._places_of(whole.index)
            return (places >= 0).nonzero().squeeze(1)
        assert isinstance(whole, BatchAxis)
        position = torch.arange(count // whole.count)
        if whole.inner:  # row = position · N + sample
            rows = position[:, None] * whole.count + self.chosen
        else:  # row = sample · positions + position
            rows = self.chosen[:, None] * len(position) + position
        return rows.flatten()

    @cached_property
    def within(self) -> Owners:
        """Which of the chosen samples owns each of the rows that `rows` has left."""
        whole = self.whole
        if isinstance(whole, RowOwners):
            left = self.rows(len(whole.index))
            owner = whole.index[left]
            return RowOwners(self.count, self._places_of(owner), whole.axes)
        assert isinstance(whole, BatchAxis)
        return replace(whole, count=self.count)


def batch_axes(
    shape: Sequence[int],
    axes: Iterable[int],
    count: int,
    rows: bool = True,
) -> list[BatchAxis]:
    """The axes that may carry N samples.

    Axes of exactly N entries are first, then come rows of several positions per sample.

    Args:
        shape: The tensor's shape.
        axes: The axes that come into question, the likeliest first.
        count: N.
        rows: Whether rows of several positions come into question on every axis, instead of on the
            first only.
    """
    axes = list(axes)
    exact = [BatchAxis(count, axis) for axis in axes if shape[axis] == count]
    flat = []
    for axis in axes if rows else axes[:1]:
        size = shape[axis]
        if not count or not size or size == count:
            continue
        multiple = size % count == 0
        if multiple:
            flat.append(BatchAxis(count, axis, inner=False))
        if multiple and count > 1:  # with one sample both orders are the same
            flat.append(BatchAxis(count, axis, inner=True))
    return exact + flat


def owners_of(
    numbers: Tensor,
    shape: Sequence[int],
    count: int,
) -> BatchAxis | RowOwners:
    """The owners of the rows of a tensor, the cheap form where there is one.

    Args:
        numbers: The sample of every entry; broadcasts against the tensor.
        shape: The tensor's shape.
        count: N.
    """
    leading_ones = [1] * (len(shape) - numbers.ndim)
    aligned = numbers.long().cpu()
    aligned = aligned.reshape(leading_ones + list(numbers.shape))
    axes = tuple(axis for axis, size in enumerate(aligned.shape) if size > 1)
    if not axes and shape:  # all entries belong to one sample: any axis tells so
        axes = (0,)
    row_sizes = [shape[axis] if axis in axes else 1 for axis in range(len(shape))]
    index = aligned.expand(row_sizes).flatten()
    if len(axes) == 1:
        # Rows that are in order need no table: views instead of copies, from here to the sums.
        for choice in batch_axes(shape, axes, count):
            in_order = choice.owner(shape).flatten()
            if torch.equal(in_order, index):
                return choice
    return RowOwners(count, index, axes)


def largest_entry(tensors: Iterable[Tensor | None]) -> float:
    """The largest finite absolute value in all tensors."""
    largest = 0.0
    for tensor in tensors:
        if tensor is not None and tensor.numel():
            finite = tensor.abs().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            largest = max(largest, float(finite.max()))
    return largest
