"""Every op that torch's own tests know, on small inputs, and what brute force says of it.

A case is one call of an op. Its first tensor is a batch h; the other arguments stay as they are.
"""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from packages import needs
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

LARGEST = 8  # samples
MOST = 120  # entries of a batch


@dataclass
class Case:
    """One call of an op: a function of a batch, ``[N, ...]``, with the outputs that have N rows."""

    name: str
    input: Tensor
    call: Callable[[Tensor], Any]

    @property
    def samples(self) -> int:
        return len(self.input)

    def outputs(self, h: Tensor) -> list[Tensor]:
        """The differentiable outputs with a row per sample."""
        torch.manual_seed(0)
        found = [out for out in tree_flatten(self.call(h))[0] if isinstance(out, Tensor)]
        return [out for out in found if out.requires_grad and self._rows(out)]

    def _rows(self, out: Tensor) -> bool:
        dense = out.is_floating_point() and out.layout == torch.strided
        return dense and out.ndim > 0 and len(out) == self.samples


@dataclass
class Tally:
    """What became of all cases: a count of every outcome, and the cases of the bad ones."""

    counts: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)

    def add(self, outcome: str, case: str, bad: bool = False, why: str = "") -> None:
        self.counts[outcome] += 1
        if bad:
            self.bad.append(f"{outcome}: {case} {why}"[:400])


@cache
def all_ops() -> list[Any]:
    """The database, which takes seconds to import, and would freeze the flags of all backends."""
    needs("expecttest")  # which torch's own tests import
    with warnings.catch_warnings(), patch.object(torch.backends, "disable_global_flags"):
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    return list(op_db)


def calls(op: Any, dtype: torch.dtype, requires_grad: bool, most: int) -> list[Any]:
    """Sample inputs of an op."""
    if dtype not in op.dtypes:
        return []
    torch.manual_seed(0)
    try:
        return list(itertools.islice(op.sample_inputs("cpu", dtype, requires_grad), most))
    except Exception:  # a sample that this build of torch cannot make
        return []


def cases(part: int, parts: int, per_op: int) -> Iterator[Case]:
    """The cases of one part of all differentiable ops, at most so many of every op."""
    for op in all_ops()[part::parts]:
        if not op.supports_autograd:
            continue
        seen = set()
        for sample in calls(op, torch.float64, False, 12):
            batch = sample.input
            shapes = tree_map(_shape, (sample.args, sample.kwargs))
            key = str((_shape(batch), shapes))
            if not _is_batch(batch) or key in seen or len(seen) == per_op:
                continue
            seen.add(key)
            name = f"{op.name}.{op.variant_test_name} {key}"
            yield Case(name, batch.detach().clone(), _call(op, sample.args, sample.kwargs))


def _is_batch(batch: Any) -> bool:
    if not isinstance(batch, Tensor) or batch.layout != torch.strided:
        return False
    small = batch.ndim > 0 and 2 <= len(batch) <= LARGEST and 0 < batch.numel() <= MOST
    return small and batch.is_floating_point()


def _call(op: Any, args: Any, kwargs: Any) -> Callable[[Tensor], Any]:
    # Clones: some ops write into their arguments.
    return lambda h: op(h.clone(), *tree_map(_fresh, args), **tree_map(_fresh, kwargs))


def _fresh(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else value


def coupled(gradient: Callable[[Tensor], Tensor], h: Tensor, base: Tensor) -> bool:
    """Whether the gradient at some row depends on another row, found by changing one at a time."""
    generator = torch.Generator().manual_seed(2)
    for n in range(len(h)):
        other = h.detach().clone()
        other[n] += 0.003 * torch.randn(other[n].shape, generator=generator, dtype=h.dtype)
        change = (gradient(other) - base).abs()
        change[n] = 0
        if change.max() > 1e-9 * base.abs().max():
            return True
    return False
