"""What was found of a graph's samples, and for how long that is believed of others like it."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from torch.autograd.graph import GradientEdge, Node

from lightning_curv.graph.joins import Join, node_of
from lightning_curv.graph.tape import Tape
from lightning_curv.passes.owned import Samples
from lightning_curv.recording.provenance import Root
from lightning_curv.recording.records import Use
from lightning_curv.recording.row_numbers import fingerprint
from lightning_curv.terms.owners import Owners


@dataclass(frozen=True)
class Found:
    """Samples, and the joins that they need."""

    samples: Samples
    joins: Mapping[Join, Owners]
    dropped: Sequence[Node]
    apart: bool = False  # in every graph of this structure, whatever the numbers are


def structure_of(tape: Tape) -> tuple[Hashable, ...]:
    """What graphs must have in common for a verification of one to be believed of the other."""
    uses = tape.uses.values()
    losses = tape.losses.values()
    read = [roots for use in uses for roots in use.roots.values()] + [call.roots for call in losses]
    return (
        tuple(fingerprint(roots.numbers) for roots in read if roots.numbers is not None),
        tuple(tape.structure),
        tuple((use.shape, use.dtype, use.couples, bool(use.operands)) for use in uses),
        tuple((roots.data, roots.routed) for use in uses for roots in use.roots.values()),
        tuple(root.shape for roots in tape.read.values() for root in roots.tensors),
        tuple((call.roots.data, call.roots.routed) for call in losses),
        tuple(root.shape for use in uses for roots in use.roots.values() for root in roots.tensors),
        tuple(call.arguments["input"].shape for call in losses),
        tuple(root.shape for call in losses for root in call.roots.tensors),
    )


@dataclass
class Memory:
    """Structures of graphs that were verified, and for how long that is believed.

    A structure is remembered only if every op was reached by the weights, and only as long as
    tables that are the same for all samples are the very same tensors. If its ops keep samples
    apart whatever the numbers are (`Found.apart`), it is remembered for good. Any other is not
    remembered where ops move rows by values (`Tape.routes`) or take what a mask says
    (`Tape.gates`), nor where nothing arrives at some sample; else factors can still open a gate
    that was closed, so it is verified again at its 10th, 100th, ... use.
    """

    size: int = 256
    entries: OrderedDict[Hashable, _Entry] = field(default_factory=OrderedDict)

    def recall(self, key: Hashable, tape: Tape) -> Found | None:
        """Recall what was found for a graph of this structure; ``None``: it is to be verified."""
        entry = self.entries.get(key)
        if entry is None:
            return None
        entry.seen += 1
        if entry.seen >= entry.due:
            entry.due *= 10
            return None
        keys = [node for node, use in tape.uses.items() if use.operands]
        uses: dict[Node | Join, Owners] = {keys[i]: owners for i, owners in entry.uses.items()}
        joins = {spot.join(tape): owners for spot, owners in entry.joins}
        losses = dict(zip(tape.losses, entry.losses, strict=True))
        dropped = [node_of(keys[i]) for i, _ in entry.dropped]
        if any(_constants(tape.uses[keys[i]]) != constants for i, constants in entry.dropped):
            return None
        uses.update(joins.items())
        return Found(Samples(entry.count, uses, losses), joins, dropped)

    def keep(self, key: Hashable, tape: Tape, found: Found) -> None:
        """Remember what was found."""
        samples = found.samples
        before = self.entries.pop(key, None)
        position = {
            node: i
            for i, node in enumerate(node for node, use in tape.uses.items() if use.operands)
        }
        entry = self.entries[key] = _Entry(
            samples.count,
            {position[node]: owners for node, owners in samples.uses.items() if node in position},
            list(samples.losses.values()),
            [(_Spot.of(join, tape), owners) for join, owners in found.joins.items()],
            [(position[node], _constants(tape.uses[node])) for node in found.dropped],
        )
        if found.apart:
            entry.due = math.inf
        elif before is not None:
            entry.seen, entry.due = before.seen, before.due
        while len(self.entries) > self.size:
            self.entries.popitem(last=False)


def _constants(use: Use) -> tuple[Root, ...]:
    """The tensors from outside that a use reads.

    All samples share those of one that is no use of its own.
    """
    return tuple(root for roots in use.roots.values() for root in roots.tensors)


@dataclass(frozen=True)
class _Spot:
    """Where a join is in every graph of one structure.

    Attributes:
        node: The position of its node in the walk.
        output_nr: The output.
        argument: The number of the input of the node, or the name of the argument of the recorded
            op.
    """

    node: int
    output_nr: int
    argument: int | str

    @classmethod
    def of(cls, join: Join, tape: Tape) -> _Spot:
        """The spot of a join."""
        position = next(i for i, node in enumerate(tape.nodes) if node is join.node)
        inputs = [after[:2] for after in join.node.next_functions]
        if join.recorded is None:
            return cls(position, join.output_nr, inputs.index(join.edge[:2]))
        use = tape.uses[join.node]
        edges = {name: operand.edge for name, operand in use.operands.items()} | use.inputs
        return cls(
            position,
            join.output_nr,
            next(name for name, e in edges.items() if e[:2] == join.edge[:2]),
        )

    def join(self, tape: Tape) -> Join:
        """The join at this spot of another graph."""
        node = tape.nodes[self.node]
        if isinstance(self.argument, int):
            after, number = node.next_functions[self.argument]
            return Join(node, self.output_nr, GradientEdge(cast("Node", after), number))
        use = tape.uses[node]
        if self.argument in use.operands:
            edge = use.operands[self.argument].edge
        else:
            edge = use.inputs[self.argument]
        return Join(node, self.output_nr, edge, use)


@dataclass
class _Entry:
    count: int
    uses: dict[int, Owners]
    losses: list[Owners]
    joins: list[tuple[_Spot, Owners]]
    dropped: list[tuple[int, tuple[Root, ...]]]
    seen: int = 1
    due: float = 10


MEMORY = Memory()
