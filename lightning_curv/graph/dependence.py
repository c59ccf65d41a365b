"""Which nodes of the graph depend on recorded uses."""

from __future__ import annotations

from collections.abc import Iterable

from torch.autograd.graph import GradientEdge, Node

from lightning_curv.graph.joins import node_of
from lightning_curv.graph.tape import Tape
from lightning_curv.recording.records import Use


class Dependence:
    """The part of the graph between the network's outputs and the uses.

    Args:
        tape: What is recorded.
        outputs: Where the outputs are.

    Attributes:
        nodes: Its nodes, uses included, inputs before outputs.
    """

    def __init__(self, tape: Tape, outputs: Iterable[GradientEdge]) -> None:
        # Depth first, without recursion: graphs of deep networks are deeper than Python's stack.
        reaches: dict[Node, bool] = {}
        uses = {node_of(key) for key in tape.uses}
        seen: set[Node] = set()
        stack = [(edge.node, False) for edge in outputs]
        while stack:
            node, finished = stack.pop()
            after = [n for n, _ in node.next_functions if n is not None]
            if finished:
                reaches[node] = node in uses or any(reaches[n] for n in after)
            elif node not in seen:
                seen.add(node)
                stack += [(node, True), *((n, False) for n in after)]
        self.nodes = {node: None for node, reach in reaches.items() if reach}

    def inputs(self, node: Node) -> list[GradientEdge]:
        """The inputs of a node that depend on uses."""
        return [GradientEdge(after, nr) for after, nr in node.next_functions if after in self.nodes]


def uses_below(tape: Tape, edges: Iterable[GradientEdge]) -> list[Use]:
    """The uses that the values at `edges` depend on."""
    uses = {node_of(key): use for key, use in tape.uses.items()}
    stack = [edge.node for edge in edges]
    seen = set[Node]()
    below = []
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            # Below a use there may be others, as of a network whose output enters it again.
            if node in uses:
                below.append(uses[node])
            stack += [after for after, _ in node.next_functions if after is not None]
    return below
