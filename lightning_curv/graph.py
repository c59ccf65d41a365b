"""The walk from the loss to everything recorded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from lightning_curv.recording import LossCall, Use, marks


@dataclass
class Tape:
    """What a loss depends on.

    Attributes:
        uses: Recorded ops with parameters by their autograd node; ops that couple samples too.
        losses: Recorded loss calls by their autograd node.
        outside: Nodes of ``uses`` that the root reaches without passing a recorded loss call.
        stray: Parameters that are reached through ops that were not recorded, and the name of the last such op.
        signature: The structure of the graph: names of its nodes in the order of the walk.
    """

    uses: dict[Node, Use] = field(default_factory=dict)
    losses: dict[Node, LossCall] = field(default_factory=dict)
    outside: set[Node] = field(default_factory=set)
    stray: list[tuple[Tensor, str]] = field(default_factory=list)
    signature: list[str] = field(default_factory=list)


def walk(root: Node) -> Tape:
    """Collect the records between the root of a graph and its leaves; below a record only its data is followed."""
    tape = Tape()
    stack: list[tuple[Node, bool, str]] = [(root, True, "")]
    seen: set[tuple[Node, bool]] = set()
    while stack:
        node, outside, parent = stack.pop()
        if (node, outside) in seen:
            continue
        seen.add((node, outside))
        name = node.name()
        tape.signature.append(name)
        mark = marks(node)
        if mark is not None and mark.loss is not None:
            tape.losses[node] = mark.loss
            stack.append((mark.loss.input.node, False, name))
        elif mark is not None and mark.use is not None:
            tape.uses[node] = mark.use
            if outside:
                tape.outside.add(node)
            stack += [(edge.node, outside, mark.use.name) for edge in mark.use.inputs.values()]
        elif (leaf := _leaf(node)) is None:
            stack += [(after, outside, name) for after, _ in node.next_functions if after is not None]
        elif isinstance(leaf, nn.Parameter):
            tape.stray.append((leaf, parent))
    return tape


def leaves(edge: GradientEdge) -> list[Tensor]:
    """The leaf tensors that the value at ``edge`` was computed from."""
    return list(dict.fromkeys(_leaves(edge.node)))


def _leaves(root: Node) -> Iterator[Tensor]:
    stack, seen = [root], {root}
    while stack:
        node = stack.pop()
        if (leaf := _leaf(node)) is not None:
            yield leaf
        for after, _ in node.next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                stack.append(after)


def _leaf(node: Node) -> Tensor | None:
    """The leaf tensor whose gradient ``node`` accumulates."""
    return getattr(node, "variable", None)
