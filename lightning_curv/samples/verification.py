"""Owners of the heads' rows, followed through the graph: who owns the rows of every recorded op."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_curv.graph.heads import Head
from lightning_curv.graph.joins import Join, node_of
from lightning_curv.passes.owned import Samples
from lightning_curv.recording.records import Use
from lightning_curv.samples.anchors import anchor_of, told_by_map
from lightning_curv.samples.coupling import differ
from lightning_curv.samples.forward import forward_owners
from lightning_curv.samples.groups import by_group, groups_of
from lightning_curv.samples.meeting import Mixed
from lightning_curv.samples.probing import Finding, Place, Probe
from lightning_curv.samples.rowwise import samples_cannot_meet
from lightning_curv.samples.search import Search
from lightning_curv.samples.unowned import joins_of
from lightning_curv.samples.verified import Found
from lightning_curv.terms.owners import BatchAxis, Owners, RowOwners, batch_axes


def verified(search: Search, heads: Sequence[tuple[Head, Owners]], count: int) -> Found:
    """The owners everywhere.

    Raises:
        Mixed: The graph does not agree.
    """
    probe = Probe(search.passes, heads, count, search.strict)
    # In one order throughout: places, findings and uses are matched by position.
    nodes = list(search.uses)
    places = [_place(search, node, search.uses[node], count) for node in nodes]
    # Inputs of losses that are no heads, because something above them is: they are asked for too.
    own = {head.edge[:2] for head, _ in heads}
    calls = {node: call for node, call in search.tape.losses.items() if call.input[:2] not in own}
    for call in calls.values():
        head = Head(call.input, call.arguments["input"], call)
        axes = batch_axes(head.like.shape, head.axes, count)
        rows = [(axis,) for axis in head.axes]
        places.append(Place(call.input, head.like.shape, axes, rows))
    # Ops under `vmap` say which sample each of their rows is of.
    told = []
    for op in search.tape.mapped:
        said = told_by_map(search, op, count)
        if said is not None:
            told.append((op, said))
    own_places = len(places)
    places += [Place.anywhere(op.edge, count) for op, _ in told]
    # One probe for all places: two passes, however many there are.
    all_findings = probe.findings(places)
    findings = all_findings[:own_places]
    of_mapped = all_findings[own_places:]
    for (op, expected), finding in zip(told, of_mapped, strict=True):
        if not finding.silent:  # as what is above the heads
            _refuse_other_rows(op.name, expected, finding, op.like.shape)
    search.silent = {node for node, finding in zip(nodes, findings, strict=False) if finding.silent}
    uses = dict(zip(nodes, findings, strict=False))
    losses = dict(zip(calls, findings[len(nodes) :], strict=True))
    mixed = [node for node, finding in losses.items() if finding.mixed]
    if search.independent and mixed:
        raise Mixed(f"in the input of `{calls[mixed[0]].name}`")
    _refuse_undefined(search, uses)
    joins, dropped = joins_of(search, heads, uses, probe, count)
    # What was not reached, or not finite, is verified again with the next batch.
    search.conclusive = search.conclusive and probe.conclusive
    search.told_of_all = search.told_of_all and probe.told_of_all
    # Edges are compared by node and output: torch makes a new one every time.
    by_edge = {head.edge[:2]: owners for head, owners in heads}
    owners: dict[Node | Join, Owners] = {}
    for key, finding in uses.items():
        _refuse_other_order(search, key, finding, count)
        if key not in dropped:
            assert finding.owners is not None
            owners[key] = by_group(search.uses[key], finding.owners)
    of_losses: dict[Node, Owners | None] = {}
    for node, call in search.tape.losses.items():
        of_losses[node] = by_edge.get(call.input[:2]) or losses[node].owners
    # A loss that no head reaches lies above them: it is a function of the heads.
    unreached = [node for node, finding in losses.items() if not finding.reached]
    of_losses |= _above(search, heads, unreached, count)
    placed = {node: known or BatchAxis(count) for node, known in of_losses.items()}
    owners.update(joins.items())
    plain = not joins and not dropped
    apart = plain and samples_cannot_meet(search.tape, heads, owners)
    samples = Samples(count, owners, placed)
    return Found(samples, joins, dropped, apart)


def _place(search: Search, node: Node | Join, use: Use, count: int) -> Place:
    """What is asked of the output of a use."""
    edge = GradientEdge(node_of(node), use.output_nr)
    allowed = search.axes[node]
    if allowed:
        axes = batch_axes(use.shape, allowed, count, rows=False)
    else:
        axes = []
    anchor = anchor_of(search, node, use, count)
    if isinstance(anchor, BatchAxis):
        # 16 rows of 4 features may be 4 graphs, or 16 steps of 4 sequences: the weights tell.
        ambiguous = anchor.axis > 0 and use.shape[0] % count == 0
        others = [axis for axis in axes if ambiguous and axis != anchor]
        return Place(edge, use.shape, [anchor, *others], [])
    if groups_of(use) is not None:
        return Place(edge, use.shape, [], [(0,)])
    rows: list[tuple[int, ...]] = [(axis,) for axis in allowed]
    # Leading axes together, as far as all of them may carry samples, and a feature is left.
    lead = next((k for k, axis in enumerate(allowed) if axis != k), len(allowed))
    most = min(lead, len(use.shape) - 1)
    rows += [tuple(range(k)) for k in range(2, most + 1)]
    return Place(edge, use.shape, axes, rows)


def _above(
    search: Search,
    heads: Sequence[tuple[Head, Owners]],
    calls: Sequence[Node],
    count: int,
) -> dict[Node, Owners]:
    """Who owns the rows of loss calls that are functions of the heads.

    Raises:
        Mixed: A row of theirs has several owners.
    """
    if not calls or count <= 1:
        return {}
    records = [search.tape.losses[node] for node in calls]
    inputs = [Head(call.input, call.arguments["input"], call) for call in records]
    owners = forward_owners(search.passes, inputs, heads, count)
    if owners is not None:
        return dict(zip(calls, owners, strict=True))
    # Beside `output=`, whose leading axis holds the samples.
    chosen_output = search.passes.output is not None
    if chosen_output and all(len(head.like) == count for head in inputs):
        return {node: BatchAxis(count) for node in calls}
    raise Mixed(f"in the input of `{records[0].name}`")


def _refuse_undefined(search: Search, found: Mapping[Node | Join, Finding]) -> None:
    """Raise if it cannot be told whose numbers are not finite.

    Nothing arrives there that would tell the samples apart.

    Raises:
        Mixed: There are such.
    """
    for node, finding in found.items():
        read: Iterable[object] = ()
        if search.strict and finding.options:
            read = search.uses[node].arguments.values()
        if any(
            isinstance(v, Tensor) and v.is_floating_point() and not bool(v.isfinite().all())
            for v in read
        ):
            raise Mixed(
                f"or not: what `{search.uses[node].name}` reads is not finite, and whose it is "
                "cannot be told"
            )


def _refuse_other_order(
    search: Search,
    node: Node | Join,
    finding: Finding,
    count: int,
) -> None:
    """Raise if rows of a use belong to other samples than the rows of the batch that it reads.

    Raises:
        Mixed: They do.
    """
    use = search.uses[node]
    anchor = anchor_of(search, node, use, count)
    if isinstance(anchor, RowOwners):
        _refuse_other_rows(use.name, anchor, finding, use.shape)


def _refuse_other_rows(
    name: str,
    told: Owners,
    finding: Finding,
    shape: torch.Size,
) -> None:
    """Raise if rows of the output of an op belong to other samples than what it reads tells.

    Raises:
        Mixed: They do.
    """
    if finding.owners is not None and differ(told.owner(shape), finding.owners.owner(shape)):
        raise Mixed(
            f"in `{name}`, whose rows arrive at summands of the loss that belong to other samples"
        )
