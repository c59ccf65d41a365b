"""Who may own the rows of the heads of a loss: what is then verified, the likeliest first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_curv.graph.heads import Head, frontier
from lightning_curv.graph.joins import node_of
from lightning_curv.recording.records import Use
from lightning_curv.samples.anchors import (
    agrees_with_target,
    anchor_of,
    told_by_map,
    told_by_target,
)
from lightning_curv.samples.coupling import separable
from lightning_curv.samples.custom_functions import Undecided
from lightning_curv.samples.forward import forward_owners
from lightning_curv.samples.search import Search
from lightning_curv.terms.owners import BatchAxis, Owners, batch_axes


def assignments(search: Search, count: int) -> Iterator[list[tuple[Head, Owners]]]:
    """Who may own the rows of the heads, the likeliest first."""
    # One sample owns everything.
    if count <= 1:
        yield [(head, BatchAxis(count)) for head in search.heads]
        return
    told = []
    for head in search.heads:
        owners = told_by_target(head, count)
        if owners is not None:
            told.append((head, owners))
    if len(told) == len(search.heads):
        yield told
    options = [batch_axes(head.like.shape, head.axes, count) for head in search.heads]
    if all(options):
        # The first choice of all heads, then the second of all: the heads of one loss are alike,
        # and all combinations would be too many. A head with fewer choices stays at its last one.
        for i in range(max(map(len, options), default=0)):
            picked = [choices[min(i, len(choices) - 1)] for choices in options]
            yield list(zip(search.heads, picked, strict=True))
    yield from _from_inputs(search, count)
    yield from _from_outputs(search, count)


def _from_inputs(search: Search, count: int) -> Iterator[list[tuple[Head, Owners]]]:
    """Rows of the heads in any order, as the network's inputs tell."""
    sources: list[tuple[Head, Owners]] = []
    for node, use in search.uses.items():
        anchor = anchor_of(search, node, use, count)
        if anchor:
            edge = GradientEdge(node_of(node), use.output_nr)
            sources.append((Head(edge, _like(search, use)), anchor))
    for op in search.tape.mapped:
        told = told_by_map(search, op, count)
        if told is not None:
            sources.append((Head(op.edge, op.like), told))
    # A head that is a number has no rows whose owners could be asked for.
    heads = [head for head in search.heads if head.like.ndim]
    if not sources or len(heads) < len(search.heads):
        return
    owners = forward_owners(search.passes, heads, sources, count)
    if owners is not None and all(map(agrees_with_target, heads, owners)):
        yield list(zip(heads, owners, strict=True))


def _like(search: Search, use: Use) -> Tensor:
    """A tensor like the output of a use, of the memory of one number."""
    zero = torch.zeros((), dtype=use.dtype, device=search.passes.loss.device)
    return zero.expand(use.shape)


def _from_outputs(search: Search, count: int) -> Iterator[list[tuple[Head, Owners]]]:
    """The network's outputs instead of the heads.

    For losses that are no sum of anything with N rows.

    Heads that are inputs of known loss functions stay, if that does not agree all that have N
    rows.
    """
    rows = []
    for head in search.heads:
        if head.like.ndim and batch_axes(head.like.shape, head.axes, count):
            rows.append(head)
    calls = [head for head in rows if head.call is not None]
    yield from _beside(search, calls, count)
    if len(calls) < len(rows) < len(search.heads):
        yield from _beside(search, rows, count)


def _beside(
    search: Search,
    kept: Sequence[Head],
    count: int,
) -> Iterator[list[tuple[Head, Owners]]]:
    """Some heads as they are, and outputs of the network instead of the others."""
    # What the outputs take the place of.
    unknown = [head for head in search.heads if head not in kept]
    if not unknown:
        return
    frontier_heads = frontier(search.tape, unknown, search.passes.loss)
    below = [head for head in frontier_heads if head.like.ndim]
    options = [batch_axes(head.like.shape, _axes_of(search, head), count) for head in below]
    calls = [batch_axes(head.like.shape, head.axes, count) for head in kept]
    # Something has no axis of N rows: no assignment of this kind.
    if not below or not all(options) or not all(calls):
        return
    for i in range(max(map(len, options))):
        picked = [choices[min(i, len(choices) - 1)] for choices in options]
        outputs: list[tuple[Head, Owners]] = list(zip(below, picked, strict=True))
        try:
            apart = separable(search.passes, unknown, outputs)
        except Undecided as error:
            search.reason = f"or not, in the loss, which cannot be looked into: {error}"
            return
        if apart:
            likeliest = [choices[0] for choices in calls]
            yield [*zip(kept, likeliest, strict=True), *outputs]
        else:
            search.reason = "in the loss, above the outputs of the network"


def _axes_of(search: Search, output: Head) -> list[int]:
    return search.axes.get(output.edge.node) or list(range(output.like.ndim))
