"""The same random numbers for a sample, whoever else is in its batch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class EqualRandomness(TorchDispatchMode):
    """Keeps the random tensors of a first run, and gives them out again in others.

    Every random op of torch is seen, inside of other functions too. The k-th one of a later run
    returns what the k-th one of the first run has drawn; where the first has rows of all samples,
    only those of the samples of the later run. An op that draws from values
    (`torch.bernoulli(p)`) returns what was drawn from the same values only, else it draws anew,
    so that values that depend on other samples are not hidden. `torch.randperm` always draws
    anew. Batches that are padded to different lengths share the entries that both have.

    Args:
        size: Number of samples of the first run.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size, self._rows = size, torch.arange(size)
        self._draws: list[tuple[Tensor, list[Tensor]]] = []
        self._position: int | None = None  # of the next draw of a later run

    def again(self, rows: Tensor | None = None) -> EqualRandomness:
        """Begin a later run, with these samples of the first; `None`: all in the same places."""
        self._rows, self._position = torch.arange(self._size) if rows is None else rows, 0
        return self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        random_op = torch.Tag.nondeterministic_seeded in func.tags and "randperm" not in str(func)
        if not random_op or not isinstance(result, Tensor):
            return result
        values = _drawn_from(func, args)
        if self._position is None:
            self._draws.append((result.clone(), [value.clone() for value in values]))
            return result
        position, self._position = self._position, self._position + 1
        if position < len(self._draws):
            self._give_out(*self._draws[position], result, values)
        return result

    def _give_out(
        self, drawn: Tensor, before: list[Tensor], result: Tensor, values: list[Tensor]
    ) -> None:
        """Overwrite what was drawn now by what was drawn in the first run, from the same values."""
        known = self._of_rows(drawn, result.shape)
        if known is None or known.dtype != result.dtype or len(values) != len(before):
            return
        shared = tuple(
            slice(0, min(sizes)) for sizes in zip(known.shape, result.shape, strict=True)
        )
        same = torch.ones_like(result[shared], dtype=torch.bool)
        for earlier, value in zip(before, values, strict=True):
            expected = self._of_rows(earlier, value.shape)
            if expected is None or value.shape != result.shape or expected.shape != known.shape:
                return
            # Not exactly equal: rounding depends on the shape of the batch.
            same &= torch.isclose(expected[shared], value[shared], rtol=1e-3)
        result[shared] = torch.where(same, known[shared], result[shared])

    def _of_rows(self, drawn: Tensor, shape: torch.Size) -> Tensor | None:
        """The entries of the samples of this run; padding may have changed lengths of axes."""
        count, rows = len(self._rows), self._rows.to(drawn.device)
        if drawn.ndim != len(shape):
            return None
        if count == self._size or drawn.shape == shape:
            return drawn
        for axis, length in enumerate(drawn.shape):
            each, left = divmod(length, self._size)  # entries of a sample beside each other
            if not left and shape[axis] == count * each:
                by_sample = drawn.unflatten(axis, (self._size, each))
                return by_sample.index_select(axis, rows).flatten(axis, axis + 1)
        return None


def _drawn_from(func: Any, args: Sequence[Any]) -> list[Tensor]:
    """The tensors whose values decide about what is drawn."""
    # These read a shape and no values.
    if "_like" in str(func):
        return []
    # What an op overwrites, as `x.normal_()` does, decides nothing.
    written = {
        i
        for i, a in enumerate(func._schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
    }
    return [a for i, a in enumerate(args) if isinstance(a, Tensor) and i not in written]


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed all generators that a user may draw from, and put them back."""
    states = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
