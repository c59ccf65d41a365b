"""The joins of a graph: from what depends on no sample upwards, to where it meets the samples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node
from torch.nn import Parameter

from lightning_curv.errors import describe
from lightning_curv.graph.heads import Head, name_of
from lightning_curv.graph.joins import Join
from lightning_curv.graph.tape import Tape, leaf_of, parameters
from lightning_curv.recording.provenance import Roots, roots_of
from lightning_curv.samples.probing import Place, Probe
from lightning_curv.terms.owners import Owners

if TYPE_CHECKING:
    from lightning_curv.recording.records import Use


class Mixed(Exception):
    """Samples influence each other; the text says where."""


@dataclass(frozen=True)
class _Link:
    """A node and one of its inputs."""

    node: Node
    edge: GradientEdge
    recorded: Use | None


def find_joins(
    tape: Tape,
    heads: Sequence[Head],
    mixed: Iterable[Node],
    strays: Iterable[Node],
    probe: Probe,
    holds: Callable[[Roots], bool],
) -> dict[Join, Owners]:
    """Where the values of some nodes meet the samples.

    Args:
        tape: The graph.
        heads: Where it begins.
        mixed: Recorded ops whose rows belong to all samples.
        strays: Nodes of parameters that reach the loss through ops that were not recorded.
        probe: Tells who owns the rows of a tensor.
        holds: Whether what was computed from some tensors depends on the samples.

    Raises:
        Mixed: They never do, or what they meet mixes the samples.
    """
    # A dictionary instead of a set: nodes have no order of their own, and joins must come out in
    # the same order on all processes.
    mixed = dict.fromkeys(mixed)
    links = _links(tape, heads)
    shared = _shared(tape, heads)
    data = _data_nodes(tape, heads, mixed, holds)
    for node in mixed:
        # An op that mixes samples of its own input is no place where something shared enters.
        if node in data and any(below in data for below in _inputs(tape, node)):
            raise Mixed(f"in the input of `{tape.uses[node].name}`")
    # Every node at which something shared may meet the samples is asked at once, in two passes.
    above = _above(links, data, [*mixed, *strays])
    outputs = [GradientEdge(node, i) for node in above for i in range(len(node._input_metadata))]
    places = [Place.anywhere(edge, probe.count) for edge in outputs]
    by_edge = {
        edge[:2]: finding for edge, finding in zip(outputs, probe.findings(places), strict=True)
    }
    joins: dict[tuple[Node, int, Node, int], tuple[Join, Owners]] = {}
    pending = [*mixed, *strays]
    seen = set[Node]()
    while pending:
        child = pending.pop()
        # Several parameters often reach the samples by the same way.
        if child in seen:
            continue
        seen.add(child)
        if not links[child]:
            # Nothing lies above: the loss itself is reached without a sample in between.
            leaf = leaf_of(child)
            if leaf is not None:
                names = [leaf]
            else:
                names = parameters(tape.uses[child])
            name = describe(names[0]) if names else "?"
            raise Mixed(
                f"in a summand of the loss that depends on no sample: a penalty of parameter {name}"
            )
        for link in links[child]:
            findings = [by_edge[link.node, i] for i in range(len(link.node._input_metadata))]
            mixes = any(finding.mixed for finding in findings)
            # Below here samples were kept apart, here they are not: the network mixes them.
            if mixes and link.node in data:
                raise Mixed(f"in `{name_of(link.node)}`")
            # Still a sum over all samples, or inside of an op with a rule: further up.
            if (mixes or link.node in shared) and link.node not in data:
                pending.append(link.node)
                continue
            for i, finding in enumerate(findings):
                if finding.reached and finding.owners is not None:
                    join = Join(link.node, i, link.edge, link.recorded)
                    joins.setdefault((link.node, i, *link.edge[:2]), (join, finding.owners))
    return dict(joins.values())


def _inputs(tape: Tape, node: Node) -> list[Node]:
    use = tape.uses.get(node)
    if use is not None:
        return [edge.node for edge in use.inputs.values()]
    return [after for after, _ in node.next_functions if after is not None]


def _links(tape: Tape, heads: Sequence[Head]) -> dict[Node, list[_Link]]:
    """List for every node the nodes that it is an input of.

    Below a recorded op only its data is followed.
    """
    links: dict[Node, list[_Link]] = defaultdict(list)
    stack = [head.edge.node for head in heads]
    seen = set[Node]()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        use: Use | None = tape.uses.get(node)
        # A recorded op may be several nodes: its inputs are then not those of its last node.
        direct = {(after, number) for after, number in node.next_functions if after is not None}
        if use is None:
            edges = direct
        else:
            edges = {edge[:2] for edge in use.inputs.values()}
        # Sets have no order; autograd's numbers are the same in every run.
        for after, number in sorted(edges, key=lambda edge: (edge[0]._sequence_nr(), edge[1])):
            links[after].append(
                _Link(node, GradientEdge(after, number), None if (after, number) in direct else use)
            )
            stack.append(after)
    return links


def _shared(tape: Tape, heads: Sequence[Head]) -> set[Node]:
    """Nodes inside of recorded ops.

    What arrives there is accounted for by the rules of these ops, in part at least.
    """
    followed = {id(node) for node in tape.nodes}
    inner = set[Node]()
    seen = set[Node]()
    stack = [node for node, use in tape.uses.items() if isinstance(node, Node) and use.operands]
    for key in stack:
        use = tape.uses[key]
        data = {edge.node for edge in use.inputs.values()}
        # From the op's own node down to its recorded inputs: what lies in between is the op.
        inside = [
            after for after, _ in key.next_functions if after is not None and after not in data
        ]
        while inside:
            node = inside.pop()
            if node not in seen and node not in data:
                seen.add(node)
                inner.add(node)
                inside += [after for after, _ in node.next_functions if after is not None]
    # The walk of the tape has left out what no loss depends on.
    return {node for node in inner if id(node) in followed}


def reads_unknown(node: Node, holds: Callable[[Roots], bool]) -> bool:
    """Whether a node is a custom function that may read the batch unseen.

    It reads something without gradient, and has saved nothing that tells what.
    """
    if not isinstance(node, BackwardCFunction) or all(
        after is not None for after, _ in node.next_functions
    ):
        return False
    # What a function has saved is all that can be known of what it reads.
    saved = [
        tensor
        for tensor in cast("Any", node).saved_tensors
        if tensor is not None and not tensor.requires_grad
    ]
    return not saved or any(holds(roots_of(tensor)) for tensor in saved)


def _data_nodes(
    tape: Tape,
    heads: Sequence[Head],
    mixed: Mapping[Node, None],
    holds: Callable[[Roots], bool],
) -> set[Node]:
    """The nodes that depend on the samples.

    Ops that have rows of the samples, or may read them, and all that is above.
    """
    depends: dict[Node, bool] = {}
    reading = {op.edge.node for op in tape.mapped if holds(op.roots)}
    reading |= {node for node, roots in tape.read.items() if node not in mixed and holds(roots)}
    # Every node twice: once to put its inputs above it on the stack, once when they are finished.
    stack = [(head.edge.node, False) for head in heads]
    seen = set[Node]()
    while stack:
        node, finished = stack.pop()
        inputs = _inputs(tape, node)
        if finished:
            use = tape.uses.get(node)
            leaf = leaf_of(node)
            own = (use is not None and bool(use.operands) and node not in mixed) or (
                leaf is not None and not isinstance(leaf, Parameter)
            )
            own = own or node in reading or reads_unknown(node, holds)
            depends[node] = own or any(depends.get(after, False) for after in inputs)
        elif node not in seen:
            seen.add(node)
            stack += [(node, True), *((after, False) for after in inputs)]
    return {node for node, is_data in depends.items() if is_data}


def _above(
    links: Mapping[Node, list[_Link]],
    data: set[Node],
    start: Iterable[Node],
) -> dict[Node, None]:
    """The nodes above some others, up to the first ones that depend on the samples."""
    above: dict[Node, None] = {}
    stack = [*start]
    seen = set[Node]()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        for link in links.get(node, []):
            above[link.node] = None
            if link.node not in data:
                stack.append(link.node)
    return above
