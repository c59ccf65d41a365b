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
from lightning_curv.recording.provenance import Root, Roots, shapes
from lightning_curv.recording.records import Use
from lightning_curv.recording.row_numbers import fingerprint
from lightning_curv.terms.owners import Owners


# One is made in every step: a frozen one takes five times as long.
@dataclass(slots=True)
class Found:
    """Samples, and the joins that they need. Nobody changes it."""

    samples: Samples
    joins: Mapping[Join, Owners]
    dropped: Sequence[Node]
    apart: bool = False  # in every graph of this structure, whatever the numbers are
    assumed: bool = False  # by shapes alone, as samples were found to influence each other


def structure_of(tape: Tape) -> tuple[Hashable, ...]:
    """What graphs must have in common for a verification of one to be believed of the other."""
    # Asked in every step, and written for that: one loop over what was recorded.
    structure: list[Hashable] = [tuple(tape.structure)]
    for use in tape.uses.values():
        structure += (use.shape, use.dtype, use.mixes_samples, bool(use.operands), len(use.roots))
        for roots in use.roots.values():
            structure.append(_provenance(roots))
    for read in tape.read.values():
        structure.append(shapes(read))
    structure.append(None)  # from here on losses
    for call in tape.losses.values():
        structure += (call.arguments["input"].shape, _provenance(call.roots))
    return tuple(structure)


def _provenance(roots: Roots) -> Hashable:
    """What is known of the rows of something that is read, and the shapes of what it came from."""
    # Numbers of rows are values, on which the owners of a gather depend: they are part of it.
    numbers = None if roots.numbers is None else fingerprint(roots.numbers)
    return (roots.data, roots.routed, numbers, shapes(roots))


@dataclass
class Memory:
    """Structures of graphs that were verified, and for how long that is believed.

    A structure is remembered only if every op was reached by the weights, and only as long as
    tables that are the same for all samples are the very same tensors. If its ops keep samples
    apart whatever the numbers are (`Found.apart`), it is remembered for good. So it is where
    samples influence each other and owners are those of shapes (`Found.assumed`): other numbers do
    not part them. Any other is not remembered where ops move rows by values (`Tape.routes`) or take
    what a mask says (`Tape.gates`), nor where nothing arrives at some sample; else factors can
    still open a gate that was closed, so it is verified again at its 10th, 100th, ... use.
    """

    size: int = 256
    entries: OrderedDict[Hashable, _Entry] = field(default_factory=OrderedDict)

    def recall(self, key: Hashable, tape: Tape) -> Found | None:
        """Recall what was found for a graph of this structure; `None`: it is to be verified."""
        entry = self.entries.get(key)
        if entry is None:
            return None
        entry.seen += 1
        # Often at first, when gates and masks still move, and ever more seldom.
        if entry.seen >= entry.due:
            entry.due *= 10
            return None
        # Nodes are others in every graph: they are found by their position in the walk.
        keys: list[Node | Join] = []
        for node, use in tape.uses.items():
            if use.operands:
                keys.append(node)
        uses: dict[Node | Join, Owners] = {}
        for i, owners in entry.uses.items():
            uses[keys[i]] = owners
        losses = dict(zip(tape.losses, entry.losses, strict=True))
        joins: dict[Join, Owners] = {}
        dropped: list[Node] = []
        for i, constants in entry.dropped:
            if _constants(tape.uses[keys[i]]) != constants:
                return None
            dropped.append(node_of(keys[i]))
        for spot, owners in entry.joins:
            join = spot.join(tape)
            joins[join] = uses[join] = owners
        return Found(Samples(entry.count, uses, losses), joins, dropped)

    def keep(self, key: Hashable, tape: Tape, found: Found) -> None:
        """Remember what was found."""
        samples = found.samples
        nodes = [node for node, use in tape.uses.items() if use.operands]
        position = {node: i for i, node in enumerate(nodes)}
        uses = {position[node]: own for node, own in samples.uses.items() if node in position}
        joins = [(_Spot.of(join, tape), owners) for join, owners in found.joins.items()]
        dropped = [(position[node], _constants(tape.uses[node])) for node in found.dropped]
        losses = list(samples.losses.values())
        entry = _Entry(samples.count, uses, losses, joins, dropped)
        # Popped and put back: the last one in the order is the one that was verified last.
        before = self.entries.pop(key, None)
        if found.apart or found.assumed:
            entry.due = math.inf
        elif before is not None:
            entry.seen = before.seen
            entry.due = before.due
        self.entries[key] = entry
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
        # Torch makes a new edge every time it is asked: they are compared by node and output.
        names = (name for name, edge in edges.items() if edge[:2] == join.edge[:2])
        return cls(position, join.output_nr, next(names))

    def join(self, tape: Tape) -> Join:
        """The join at this spot of another graph."""
        node = tape.nodes[self.node]
        if isinstance(self.argument, int):
            after, number = node.next_functions[self.argument]
            below = GradientEdge(cast("Node", after), number)
            return Join(node, self.output_nr, below)
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
