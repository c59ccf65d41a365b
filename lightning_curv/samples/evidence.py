"""Whether it is plain which rows are whose, where several answers agree with the graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.autograd.graph import GradientEdge, Node

from lightning_curv.graph.heads import Head
from lightning_curv.graph.joins import node_of
from lightning_curv.graph.tape import leaf_of, nodes_below
from lightning_curv.recording.provenance import Roots, roots_of
from lightning_curv.recording.records import shape_at
from lightning_curv.samples.anchors import anchor_of, in_order, told_by_map, told_by_target
from lightning_curv.samples.coupling import differ
from lightning_curv.samples.probing import Place, Probe
from lightning_curv.samples.rowwise import added_by_row
from lightning_curv.samples.search import Search
from lightning_curv.terms.owners import BatchAxis, Owners


def evident(
    search: Search,
    heads: Sequence[tuple[Head, Owners]] | None,
    count: int,
) -> bool:
    """Whether it is plain which rows belong to which sample.

    It is where all that the network reads keeps the order of the batch, where the targets of
    every loss call do, or where a head has one row per sample and all others depend on the same
    rows. `None`: wherever the heads are.
    """
    if heads is None:
        heads = [(head, BatchAxis(count)) for head in search.heads]
    else:
        heads = heads
    # Targets that were not moved: row n of a loss belongs to sample n.
    if all(head.call is not None and in_order(head.call.roots, count) for head, _ in heads):
        return True
    # Targets that were moved, and followed: their numbers say whose each row is.
    told = [(told_by_target(head, count), owners, head.like.shape) for head, owners in heads]
    if all(
        target is not None and not differ(target.owner(s), owners.owner(s))
        for target, owners, s in told
    ):
        return True
    # Heads with exactly one row per sample; one of several rows leaves a choice of order.
    single = [
        isinstance(o, BatchAxis) and head.like.shape[o.axis] == count
        for head, o in heads
        if head.like.ndim
    ]
    if (
        heads
        and search.tape.mapped
        and all(told_by_map(search, op, count) is not None for op in search.tape.mapped)
    ):
        return True
    # Nothing comes from outside: which sample a row is called is a matter of taste.
    if all(single) and not search.blind and _from_nothing(search):
        return True
    # One row per sample, and all that is read is in an order that is known.
    known = order_known(search, count)
    if known and any(single) and _linked(search, [head for head, _ in heads], count):
        return True
    outside = [  # last: to see whether a module holds a tensor takes long
        (node, use)
        for node, use in search.uses.items()
        if node not in search.silent
        and any(
            k not in use.operands and roots.tensors and search.batch.holds(roots)
            for k, roots in use.roots.items()
        )
    ]
    return (
        bool(outside)
        and not search.blind
        and all(anchor_of(search, n, use, count) is not None for n, use in outside)
    )


def order_inside(
    search: Search,
    heads: Sequence[tuple[Head, Owners]],
    count: int,
) -> bool | None:
    """Whether the weights arrive in order at rows of the batch that enter between frozen ops.

    Such as the inputs of a frozen network, beside a prompt. `None`: there are no such rows, or
    nothing arrives there.
    """
    read = [
        node
        for node, roots in search.tape.read.items()
        if search.batch.holds(roots) and in_order(_of_batch(search, roots), count)
    ]
    # Only places with one row per sample: there the weights must arrive one after the other.
    edges = [
        GradientEdge(node, 0) for node in read if shape_at(GradientEdge(node, 0))[:1] == (count,)
    ]
    # Under `vmap` the axes of a node are others than those of what it reads.
    if not edges or count <= 1 or search.tape.mapped:
        return None
    findings = Probe(search.passes, heads, count).findings(
        [Place.anywhere(edge, count) for edge in edges]
    )
    arrived = [finding.owners for finding in findings if not finding.silent]
    if not arrived:
        return None
    return all(owners == BatchAxis(count) for owners in arrived)


def _of_batch(search: Search, roots: Roots) -> Roots:
    """Roots without the weights of frozen ops, which have no rows of the batch."""
    own = tuple(root for root in roots.tensors if search.batch.holds(Roots((root,))))
    return replace(roots, tensors=own)


def _from_nothing(
    search: Search,
) -> bool:
    """Whether the loss depends on nothing from outside, but on points that recorded code made."""
    tape = search.tape
    read = [roots for use in search.uses.values() for roots in use.roots.values()] + [
        *tape.read.values()
    ]
    read += [call.roots for call in tape.losses.values()] + [op.roots for op in tape.mapped]
    return all(roots.constant for roots in (*read, *map(roots_of, tape.leaves)))


def order_known(search: Search, count: int) -> bool:
    """Whether no op with parameters reads rows of the batch in an order that is not known."""
    read = [
        [roots for name, roots in use.roots.items() if name not in use.operands]
        for use in search.uses.values()
    ]
    read += [[op.roots] for op in search.tape.mapped]
    return not any(_unknown_order(search, roots, count) for roots in read)


def _unknown_order(search: Search, read: Sequence[Roots], count: int) -> bool:
    """Whether all rows of the batch that an op reads were moved by something unknown."""
    # Numbers that lack this size were lost by a function that moves rows by values.
    unknown = [roots for roots in read if roots.numbers is not None and count not in roots.numbers]
    known = [roots for roots in read if roots.numbers is None or count in roots.numbers]
    told = unknown and any(map(search.batch.holds, known))
    return not told and any(map(search.batch.holds, unknown))


def _linked(search: Search, heads: Sequence[Head], count: int) -> bool:
    """Whether rows of all heads depend on rows of the same ops, and were so compared.

    Or are added up row by row, to a loss per sample.

    Heads that depend on no parameter, such as targets that are differentiated, do not count
    beside others.
    """
    keys = {node_of(node) for node in search.uses}
    groups: list[set[Node]] = []
    together = added_by_row(search.passes.loss, heads, count)
    for head in heads:
        nodes = [*nodes_below(head.edge.node)]
        if len(heads) > 1 and not any(
            isinstance(leaf_of(node), torch.nn.Parameter) for node in nodes
        ):
            continue
        below = {node for node in nodes if node in keys}
        below |= {sum_ for sum_, added in together.items() if head in added}
        # Heads that depend on a common op are one group; in the end there must be only one.
        apart = [group for group in groups if not group & below]
        groups = [*apart, below.union(*(group for group in groups if group & below))]
    return len(groups) == 1
