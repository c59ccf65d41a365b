"""Owners from below: who owns the rows of heads, given those of what the network computes first.

The derivative of the heads in a direction that is weighted by the samples is found by
differentiating a backward pass by its seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_curv.differentiation.internal_pass import internal_pass
from lightning_curv.graph.heads import Head
from lightning_curv.passes.passes import Passes
from lightning_curv.samples.weights import Code, Tolerance, generic
from lightning_curv.terms.owners import Owners, RowOwners, largest_entry

Derivatives = Sequence[Tensor | None]


def forward_owners(
    passes: Passes,
    heads: Sequence[Head],
    sources: Sequence[tuple[Head, Owners]],
    count: int,
    by_entry: bool = False,
) -> list[RowOwners] | None:
    """Owners of the rows of heads, from those of tensors that the network computes from its inputs.

    Args:
        passes: The graph.
        heads: Whose rows are asked for.
        sources: Tensors with known owners.
        count: N.
        by_entry: Whether every entry is a row of its own, and some may depend on no sample.

    Returns:
        The owners; `None`: a row depends on several samples, or the graph cannot be
        differentiated twice.
    """
    with torch.enable_grad(), internal_pass():
        # The backward pass is linear in its seeds: any will do, zeros are the cheapest.
        seeds = [torch.zeros_like(head.like).contiguous().requires_grad_() for head in heads]
        try:
            pulled = torch.autograd.grad(
                [head.edge for head in heads],
                [source.edge for source, _ in sources],
                seeds,
                create_graph=True,
                allow_unused=True,
            )
            if by_entry and all(g is None for g in pulled):
                return [_nobodys(head, count) for head in heads]
            reached = _reached(pulled, sources)
            if not reached:
                return None
            eps = max(passes.tape.eps, torch.finfo(seeds[0].dtype).eps)
            code = Code.of(count, eps)
            pushed = _PushedForward(seeds, reached)
            plain = pushed.weighted(None)
            columns = [pushed.weighted(values) for values in code.values(count)]
        except RuntimeError:
            return None
    # To the last digits if possible: the coarser tolerance takes rounding errors for owners.
    tolerances = [Tolerance.exact(eps), Tolerance.rounded(eps, largest_entry(plain))]
    owners_of_heads = []
    for i, head in enumerate(heads):
        if plain[i] is None and not by_entry:
            return None
        of_head = [plain[i], *(column[i] for column in columns)]
        rows = _rows_of_head(head, of_head, code, count, tolerances, by_entry)
        if rows is None:
            return None
        owners_of_heads.append(rows)
    return owners_of_heads


@dataclass(frozen=True)
class _Reached:
    """A source that the heads depend on.

    Attributes:
        gradient: What the seeds of the heads give there, with a graph.
        source: The tensor.
        owners: Who owns its rows.
    """

    gradient: Tensor
    source: Head
    owners: Owners


def _reached(pulled: Derivatives, sources: Sequence[tuple[Head, Owners]]) -> list[_Reached]:
    """The sources whose gradient depends on the seeds.

    A gradient without a graph is the same for all seeds: the heads do not depend on the source.
    """
    reached = []
    for gradient, (source, owners) in zip(pulled, sources, strict=True):
        if gradient is not None and gradient.requires_grad:
            reached.append(_Reached(gradient, source, owners))
    return reached


@dataclass(frozen=True)
class _PushedForward:
    """The derivative of heads along a direction of the sources.

    Attributes:
        seeds: Of the backward pass that is differentiated.
        reached: The sources.
    """

    seeds: Sequence[Tensor]
    reached: Sequence[_Reached]

    @cached_property
    def directions(self) -> list[Tensor]:
        """One for every source, the same for every weighting."""
        return [generic(one.gradient.detach()) for one in self.reached]

    def weighted(self, values: Tensor | None) -> Derivatives:
        """The derivatives of the heads, where the direction has weights `[N]` of the samples."""
        vectors = self.directions
        if values is not None:
            pairs = zip(self.directions, self.reached, strict=True)
            vectors = [_times_weights(direction, one, values) for direction, one in pairs]
        return torch.autograd.grad(
            [one.gradient for one in self.reached],
            self.seeds,
            vectors,
            retain_graph=True,
            allow_unused=True,
        )


def _times_weights(direction: Tensor, reached: _Reached, values: Tensor) -> Tensor:
    like = reached.source.like
    weights = reached.owners.weights(like, values)
    weighted = direction.reshape(like.shape) * weights
    return weighted.reshape(direction.shape)


def _rows_of_head(
    head: Head,
    derivatives: Derivatives,
    code: Code,
    count: int,
    tolerances: Sequence[Tolerance],
    by_entry: bool,
) -> RowOwners | None:
    """The owners of the rows of one head; `None`: a row has several, or has none.

    Args:
        head: The head.
        derivatives: The one without weights, and those whose weights spell the samples' numbers.
        code: How they are spelled.
        count: N.
        tolerances: Tried in this order.
        by_entry: See `forward_owners`.
    """
    shape = head.like.shape
    if by_entry and not head.like.ndim:
        shape = torch.Size([1])
    if not shape:
        return None
    dense = []
    for derivative in derivatives:
        if derivative is None:
            dense.append(torch.zeros(shape, dtype=head.like.dtype, device=head.like.device))
        else:
            dense.append(derivative.reshape(shape))
    plain, *columns = dense
    axes = tuple(range(len(shape))) if by_entry else (0,)
    options = (code.read(plain, columns, axes, count, tolerance) for tolerance in tolerances)
    rows = next((rows for rows in options if rows is not None), None)
    if rows is None:
        return None
    some_unowned = bool((rows.index < 0).any())
    return rows if by_entry or not some_unowned else None


def _nobodys(head: Head, count: int) -> RowOwners:
    """The owners of entries that depend on no sample."""
    shape = head.like.shape or torch.Size((1,))
    nobody = torch.full((shape.numel(),), -1)
    return RowOwners(count, nobody, tuple(range(len(shape))))
