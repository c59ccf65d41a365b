"""The walk from the loss to everything recorded."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from lightning_curv.errors import UnsupportedError
from lightning_curv.losses import by_autograd
from lightning_curv.records import LossCall, Output, Use, marks

HIDING = {"CheckpointFunctionBackward"}
CAST = "ToCopyBackward0"
Step = tuple[Node, int, bool, str]  # a node, which of its outputs, whether outside of the losses, the op above it


@dataclass
class Tape:
    """What a loss depends on.

    Attributes:
        uses: Recorded ops with parameters by their autograd node; ops that couple samples too.
        losses: Recorded loss calls by their autograd node.
        outside: Nodes of ``uses`` that the root reaches without passing a recorded loss call.
        leaves: Other leaf tensors that require gradients.
        stray: Parameters that are reached through ops that were not recorded, and the name of the last such op.
        refusals: Why calls of known loss functions were not recorded.
        structure: Names of all nodes in the order of the walk, with the axes and sizes that they work on.
        casts: Nodes that may change the precision.
        hidden: Names of nodes that run a graph of their own in the backward pass, with parameters that cannot be seen.
    """

    uses: dict[Node, Use] = field(default_factory=dict)
    losses: dict[Node, LossCall] = field(default_factory=dict)
    outside: set[Node] = field(default_factory=set)
    leaves: list[Tensor] = field(default_factory=list)
    stray: list[tuple[Tensor, str]] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    structure: list[Hashable] = field(default_factory=list)
    casts: list[Node] = field(default_factory=list)

    @cached_property
    def parameters(self) -> dict[Node, list[Tensor]]:
        """The parameters that every use consumes, through transforms too."""
        return {node: parameters(use) for node, use in self.uses.items()}

    @property
    def eps(self) -> float:
        """The rounding of the coarsest type of number in the graph."""
        dtypes = {use.dtype for use in self.uses.values()} | {node._input_metadata[0].dtype for node in self.casts}
        return max((torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point), default=0.0)


def walk(root: Node, output: LossCall | None = None) -> Tape:
    """Collect the records between the root of a graph and its leaves; below a record only its data is followed.

    Args:
        root: The node of the loss.
        output: Where the curvature of the loss enters instead of at the loss calls above it.
    """
    tape = Tape()
    if output is not None:
        tape.losses[root] = output
    seen: set[tuple[Node, bool]] = set()
    stack: list[Step] = [(root, 0, True, "")]
    while stack:
        _follow(tape, stack, seen, output)
        stack = _data_after_all(tape)
    return tape


def _data_after_all(tape: Tape) -> list[Step]:
    """Operands that look computed from parameters, but depend on the network's data (a mean over the batch)."""
    steps: list[Step] = []
    for node, use in tape.uses.items():
        for name, operand in list(use.operands.items()):
            if operand.derived and any(found in tape.uses for found in _nodes(operand.edge.node)):
                use.inputs[name] = use.operands.pop(name).edge
                steps.append((*operand.edge[:2], node in tape.outside, use.name))
    return steps


def _follow(tape: Tape, stack: list[Step], seen: set[tuple[Node, bool]], output: LossCall | None) -> None:
    while stack:
        node, index, outside, parent = stack.pop()
        outside = outside and not (output is not None and (node, index) == output.input[:2])
        if (node, outside) in seen:
            continue
        seen.add((node, outside))
        name = node.name()
        placing = _placing(type(node))
        tape.structure.append((name, *(getattr(node, attribute) for attribute in placing)) if placing else name)
        if name == CAST:
            tape.casts.append(node)
        if name in HIDING:
            tape.hidden.append(name)
        mark = marks(node)
        if mark is not None and mark.refusal is not None:
            tape.refusals.append(mark.refusal)
        call = mark.loss if mark is not None else None
        if call is not None and (output is None or not reaches(call.input.node, output.input.node)):
            tape.losses[node] = call
            stack.append((call.input.node, call.input.output_nr, False, name))
            if call.beside:
                stack += [(after, i, outside, name) for after, i in node.next_functions if after is not None]
        elif mark is not None and mark.use is not None and not (outside and output and _above(mark.use, output)):
            tape.uses[node] = mark.use
            if outside:
                tape.outside.add(node)
            stack += [(edge.node, edge.output_nr, outside, mark.use.name) for edge in mark.use.inputs.values()]
        elif (leaf := _leaf(node)) is None:
            stack += [(after, i, outside, name) for after, i in node.next_functions if after is not None]
        elif isinstance(leaf, nn.Parameter):
            tape.stray.append((leaf, parent))
        else:
            tape.leaves.append(leaf)


@cache
def _placing(kind: type[Node]) -> tuple[str, ...]:
    """Attributes of a kind of node that hold axes and sizes: one that works along the samples mixes them."""
    return tuple(name for name in dir(kind) if name.startswith("_saved_dim") or name == "_saved_self_sym_sizes")


def _above(use: Use, output: LossCall) -> bool:
    """Whether a use outside of the network is none: what looked like its parameters comes from the output."""
    return all(o.derived and reaches(o.edge.node, output.input.node) for o in use.operands.values())


def find_output(loss: Tensor, output: nn.Module | Output | None) -> LossCall | None:
    """All of a loss, as a function of one output of the network.

    Raises:
        UnsupportedError: The loss does not depend on such an output, or on more than one.
    """
    if output is None:
        return None
    root = cast("Node", loss.grad_fn)
    if isinstance(output, Output):
        found = [output] if reaches(root, output.edge.node) else []
        name = f"a tensor of shape {tuple(output.like.shape)}"
    else:
        known = [(node, mark.outputs) for node in _nodes(root) if (mark := marks(node)) is not None and mark.outputs]
        found = [
            Output(GradientEdge(node, outputs[output][0]), outputs[output][1])
            for node, outputs in known
            if output in outputs
        ]
        name = f"`{type(output).__name__}`"
    if len(found) != 1:
        raise UnsupportedError(
            f"`output=` must be something that the loss depends on once, found {name} {len(found)} times in its graph. "
            "Run the forward pass inside `curvature(..., output=module)` or `record(output=module)`, or `extend` the "
            "module; pass the tensor instead of a module that is called several times; clone an output that is a view "
            "before overwriting it."
        )
    arguments = {"input": found[0].like, "root": loss, "edge": found[0].edge}
    return LossCall(by_autograd, arguments, found[0].edge, loss.shape, loss.output_nr)


def reaches(root: Node, node: Node) -> bool:
    """Whether a value depends on another."""
    return any(found is node for found in _nodes(root))


def leaves(edge: GradientEdge) -> list[Tensor]:
    """The leaf tensors that the value at ``edge`` was computed from."""
    return list(dict.fromkeys(leaf for node in _nodes(edge.node) if (leaf := _leaf(node)) is not None))


def parameters(use: Use) -> list[Tensor]:
    """The parameters that a use consumes, through transforms too."""
    found: dict[Tensor, None] = {}
    for operand in use.operands.values():
        if operand.derived:
            found.update(dict.fromkeys(leaves(operand.edge)))
        else:
            found[operand.tensor] = None
    return list(found)


def _nodes(root: Node) -> Iterator[Node]:
    """All nodes that a value depends on, itself included."""
    stack, seen = [root], {root}
    while stack:
        node = stack.pop()
        yield node
        for after, _ in node.next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                stack.append(after)


def _leaf(node: Node) -> Tensor | None:
    """The leaf tensor whose gradient ``node`` accumulates."""
    return getattr(node, "variable", None)
