"""The steps of sequences: all of one length, or packed, then those of shorter ones end earlier.

Packed rows are those of the first step of all sequences, then those of the second step of all that
have one, …; the sequences are sorted, the longest one first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor


class Steps:
    """Sequences of one length."""

    def __init__(self, count: int) -> None:
        self.count = count

    @property
    def ends(self) -> Mapping[int, slice]:
        """The sequences whose last step is a certain one, by that step."""
        return {self.count - 1: slice(None)}

    def last(self, steps: Sequence[Tensor]) -> Tensor:
        """The last step of every sequence, `[N, *]`, of `T` tensors of this shape."""
        return steps[-1]

    def backwards(self, tensor: Tensor, axis: int = 1) -> Tensor:
        """`[T, *]` with the steps of every sequence in reverse order; `axis`: of sequences."""
        return tensor.flip(0)

    def padded(self, rows: Tensor) -> Tensor:
        """The tensor `[T, N, *]` of rows."""
        return rows

    def rows(self, padded: Tensor) -> Tensor:
        """The rows of `[T, N, *]`."""
        return padded

    def masked(self, padded: Tensor) -> Tensor:
        """`[T, N, *]` with zeros where sequences have no step."""
        return padded


class PackedSteps(Steps):
    """Packed sequences.

    Args:
        batch_sizes: The number of sequences that have a certain step, `[T]`.
        device: Of the tensors.
    """

    def __init__(self, batch_sizes: Tensor, device: torch.device) -> None:
        # One by one: torch 2.6 has no `tolist` within `torch.func`.
        self.sizes = [int(size) for size in batch_sizes]
        super().__init__(len(self.sizes))
        self._device = device

    @property
    def ends(self) -> Mapping[int, slice]:
        ended = {}
        for step, size in enumerate(self.sizes):
            # The longest sequences are first, so those that go on are in front of those that end.
            if step + 1 < len(self.sizes):
                following = self.sizes[step + 1]
            else:
                following = 0
            if following < size:
                ended[step] = slice(following, size)
        return ended

    @cached_property
    def sample(self) -> Tensor:
        """The sequence of every row."""
        return self._exists.nonzero(as_tuple=True)[1]

    @cached_property
    def _exists(self) -> Tensor:
        """Whether a sequence has a step, `[T, N]`."""
        sizes = torch.tensor(self.sizes, device=self._device)
        sequences = torch.arange(self.sizes[0], device=self._device)
        return sequences < sizes[:, None]

    @cached_property
    def _lengths(self) -> Tensor:
        return self._exists.sum(0)

    def last(self, steps: Sequence[Tensor]) -> Tensor:
        sequences = torch.arange(len(self._lengths), device=self._device)
        return torch.stack([*steps])[self._lengths - 1, sequences]

    def backwards(self, tensor: Tensor, axis: int = 1) -> Tensor:
        step = torch.arange(self.count, device=self._device)[:, None]
        # What is behind the end of a sequence stays where it is.
        source = torch.where(self._exists, self._lengths - 1 - step, step)
        sequences = torch.arange(len(self._lengths), device=self._device)
        reversed_steps = tensor.transpose(1, axis)[source, sequences]
        return reversed_steps.transpose(1, axis).contiguous()

    def padded(self, rows: Tensor) -> Tensor:
        zeros = rows.new_zeros(*self._exists.shape, *rows.shape[1:])
        return zeros.masked_scatter(self._mask(rows.ndim + 1), rows)

    def rows(self, padded: Tensor) -> Tensor:
        return padded[self._exists]

    def masked(self, padded: Tensor) -> Tensor:
        return padded.masked_fill(~self._mask(padded.ndim), 0)

    def _mask(self, dims: int) -> Tensor:
        return self._exists.reshape(*self._exists.shape, *[1] * (dims - 2))
