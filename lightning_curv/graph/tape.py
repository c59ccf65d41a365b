"""The walk from the loss to everything recorded."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import cast
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from lightning_curv.errors import UnsupportedError
from lightning_curv.graph.joins import Join
from lightning_curv.recording.provenance import Roots
from lightning_curv.recording.records import (
    KEY,
    LossCall,
    Mapped,
    Marks,
    Operand,
    Output,
    Use,
    marks,
)

INSIDE = (
    "backward",
    "backward_pass",
)  # what the backward pass of a function calls that makes a graph of its own
_ROUTING = """
    Embedding EmbeddingBag Gather GroupedMm Index IndexAdd IndexCopy IndexFill IndexPut IndexPutImpl
    IndexReduce IndexSelect Kthvalue MaskedScatter MaskedSelect Put RepeatInterleave Scatter
    ScatterAdd ScatterReduce SegmentReduce Sort Take Topk _PackPaddedSequence
"""
# attributes of nodes that hold axes, sizes, places and factors: numbers, never tensors
PLACING = (
    "_saved_dim", "_saved_self_sym_sizes", "_saved_shifts", "_saved_start", "_saved_end",
    "_saved_step", "_saved_alpha", "_saved_beta", "_saved_split_size", "_saved_storage_offset",
    "_saved_offset", "_saved_size", "_saved_stride", "_saved_pad", "_saved_axis", "_saved_diagonal",
    "_saved_dilation", "_saved_downscale_factor", "_saved_expand", "_saved_groups",
    "_saved_kernel_size", "_saved_left", "_saved_output_padding", "_saved_output_size",
    "_saved_repeats", "_saved_source_dim", "_saved_sumdim", "_saved_transpose",
    "_saved_unitriangular", "_saved_upper", "_saved_upscale_factor",
)  # fmt: skip
PLACES = frozenset(("_saved_k", "_saved_length"))  # of these names exactly
ROUTING = frozenset(_ROUTING.split())
PRODUCTS = frozenset(
    ("Addmm", "Baddbmm", "Bmm", "Mm", "SparseAddmm")
)  # a matrix without gradient may permute rows
# ops that take what a mask says; where it may be left out, the attribute that holds it
MASKED = {
    "MaskedFill": "",
    "SafeSoftmax": "",  # of `scaled_dot_product_attention` written out
    "ScaledDotProductEfficientAttention": "_saved_attn_bias",
    "ScaledDotProductFlashAttentionForCpu": "_saved_attn_mask",
    "Where": "",
}
CAST = "ToCopyBackward0"
# The type of the nodes of leaves.
_LEAF: type[Node] = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]
Step = tuple[
    Node, int, bool, str
]  # a node, which of its outputs, whether outside of the losses, the op above it


@dataclass
class Tape:
    """What a loss depends on.

    Attributes:
        uses: Recorded ops with parameters by their autograd node; ops that couple samples too. Once
            the samples are known also the joins, where what depends on no sample meets them.
        losses: Recorded loss calls by their autograd node.
        outside: Keys of `uses` that the root reaches without passing a recorded loss call.
        leaves: Other leaf tensors that require gradients.
        stray: Parameters that are reached through ops that were not recorded, and the name of the
            last such op.
        structure: Names of all nodes in the order of the walk, with the axes and sizes that they
            work on.
        nodes: These nodes.
        casts: Nodes that may change the precision.
        routes: Whether some op moves rows to places that depend on values: what is true of one
            batch need not be so of the next.
        gates: Whether some op takes what a mask says: in the next batch that may be other rows.
        seen: Nodes that the walk has been at, and whether from outside of the losses.
        read: The roots of what ops read that has no gradient, by their node.
        mapped: What ops under `vmap` read of the batch.
        hidden: Names of nodes that run a graph of their own in the backward pass, with parameters
            that cannot be seen.
        nested: Names of ops whose values are nested tensors.
        watched: Values whose gradients the user looks at, by a hook or by `retain_grad`.
        derived: Whether some operand was computed from parameters instead of being one.
        without_operands: Whether some use has none.
    """

    uses: dict[Node | Join, Use] = field(default_factory=dict)
    losses: dict[Node, LossCall] = field(default_factory=dict)
    outside: set[Node] = field(default_factory=set)
    leaves: list[Tensor] = field(default_factory=list)
    stray: list[tuple[Tensor, str]] = field(default_factory=list)
    read: dict[Node, Roots] = field(default_factory=dict)
    mapped: list[Mapped] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    nested: list[str] = field(default_factory=list)
    watched: list[ref[Tensor]] = field(default_factory=list)
    structure: list[Hashable] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    casts: list[Node] = field(default_factory=list)
    routes: bool = False
    gates: bool = False
    derived: bool = False
    without_operands: bool = False
    seen: set[tuple[Node, bool]] = field(default_factory=set)
    _parameters: dict[Node | Join, list[Tensor]] | None = field(default=None, init=False)

    @property
    def parameters(self) -> dict[Node | Join, list[Tensor]]:
        """The parameters that every use consumes, through transforms too."""
        found = self._parameters
        if found is None:
            found = self._parameters = {}
            for node, use in self.uses.items():
                found[node] = parameters(use)
        return found

    def forget_parameters(self) -> None:
        """Forget the parameters of the uses, which have changed."""
        self._parameters = None

    @property
    def all_parameters(self) -> list[Tensor]:
        """The parameters that the loss depends on, each once."""
        used = [parameter for group in self.parameters.values() for parameter in group]
        return list(dict.fromkeys([*used, *(parameter for parameter, _ in self.stray)]))

    def demote(self, is_data: Callable[[Use, Roots, Operand], bool]) -> list[Step]:
        """Take operands that were computed from data for data; returns where the walk goes on."""
        steps: list[Step] = []
        if not self.derived:
            return steps
        for node, use in self.uses.items():
            for name, operand in list(use.operands.items()):
                if operand.derived and is_data(use, use.roots.get(name, Roots()), operand):
                    use.inputs[name] = use.operands.pop(name).edge
                    self.without_operands = self.without_operands or not use.operands
                    steps.append((*operand.edge[:2], node in self.outside, use.name))
        return steps

    def note_routing(self) -> None:
        """Note products of data with a matrix from outside, which may permute rows.

        They looked like uses before their operands were found to be data.
        """
        products = [
            use for use in self.uses.values() if not use.operands and {*use.roots} - {*use.inputs}
        ]
        self.routes = self.routes or any(use.inputs for use in products)

    def follow(self, steps: list[Step], output: LossCall | None) -> None:
        """Walk on from some nodes."""
        while steps:
            _follow(self, steps, self.seen, output)
            steps = _data_after_all(self) if self.derived else []
        if self.without_operands:
            self.note_routing()
        self.forget_parameters()

    @property
    def eps(self) -> float:
        """The rounding of the coarsest type of number in the graph."""
        dtypes = {use.dtype for use in self.uses.values()} | {
            node._input_metadata[0].dtype for node in self.casts
        }
        return max(
            (torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point),
            default=0.0,
        )


def walk(root: Node, output: LossCall | None = None) -> Tape:
    """Collect the records between the root of a graph and its leaves.

    Below a record only its data is followed.

    Args:
        root: The node of the loss.
        output: Where the curvature of the loss enters instead of at the loss calls above it.
    """
    tape = Tape()
    if output is not None:
        tape.losses[root] = output
    tape.follow([(root, 0, True, "")], output)
    return tape


def _data_after_all(tape: Tape) -> list[Step]:
    """Demote operands that look computed from parameters, but depend on the network's data.

    Such as a mean over the batch.
    """
    return tape.demote(
        lambda _, __, operand: any(below in tape.uses for below in nodes_below(operand.edge.node))
    )


def _follow(
    tape: Tape,
    stack: list[Step],
    seen: set[tuple[Node, bool]],
    output: LossCall | None,
) -> None:
    while stack:
        node, index, outside, parent = stack.pop()
        outside = outside and not (output is not None and (node, index) == output.input[:2])
        if (node, outside) in seen:
            tape.structure.append(
                index
            )  # which nodes meet again, in the order of the walk, tells how they are connected
            continue
        seen.add((node, outside))
        name = node.name()
        kind = _kind(type(node), name)
        tape.nodes.append(node)
        if kind.placing:
            tape.structure.append((name, index, *[getattr(node, field) for field in kind.placing]))
        else:
            tape.structure.append((name, index))
        if kind.is_cast:
            tape.casts.append(node)
        if kind.masked is not None:
            tape.gates = tape.gates or not kind.masked or getattr(node, kind.masked) is not None
        if kind.hides:
            tape.hidden.append(name)
        mark: Marks | None = node.metadata.get(KEY)  # type: ignore[attr-defined]
        call = use = None
        if mark is not None:
            call = mark.loss
            use = mark.use
            if mark.read is not None:
                tape.read[node] = mark.read
            if mark.nested is not None:
                tape.nested.append(mark.nested)
            if mark.watched is not None:
                tape.watched += mark.watched
            if mark.mapped is not None:
                tape.mapped.append(mark.mapped)
                tape.routes = True
        if call is not None and (output is None or not reaches(call.input.node, output.input.node)):
            tape.losses[node] = call
            stack.append((call.input.node, call.input.output_nr, False, name))
            if call.beside:
                stack += _below(node, outside, name)
        elif use is not None and not (outside and output and _above(use, output)):
            tape.uses[node] = use
            tape.routes = tape.routes or kind.moves_rows_of_a_use
            if outside:
                tape.outside.add(node)
            if not use.operands:
                tape.without_operands = True
            for operand in use.operands.values():
                if operand.source is not None:
                    tape.derived = True
            for edge in use.inputs.values():
                stack.append((edge.node, edge.output_nr, outside, use.name))
        elif (leaf := leaf_of(node)) is None:
            below = _below(node, outside, name)
            tape.routes = (
                tape.routes
                or kind.moves_rows
                or (
                    # A factor without gradient may be a matrix that permutes rows.
                    kind.multiplies and len(below) < len(node.next_functions)
                )
            )
            stack += below
        elif isinstance(leaf, nn.Parameter):
            tape.stray.append((leaf, parent))
        else:
            tape.leaves.append(leaf)


def _below(node: Node, outside: bool, name: str) -> list[Step]:
    """The steps to what a node of this name reads."""
    return [(after, i, outside, name) for after, i in node.next_functions if after is not None]


@dataclass(frozen=True, slots=True)
class _Kind:
    """What the walk has to know of all nodes of a type and name.

    Attributes:
        placing: Attributes that hold axes and sizes.
        is_cast: Whether they may change the precision.
        masked: For ops that take what a mask says the attribute that holds it, "" if it is always
            there; else `None`.
        hides: Whether their backward pass runs ops with parameters that cannot be seen.
        moves_rows: Whether they move rows to places that depend on values.
        moves_rows_of_a_use: The same where the op has a rule.
        multiplies: Whether they multiply matrices.
    """

    placing: tuple[str, ...]
    is_cast: bool
    masked: str | None
    hides: bool
    moves_rows: bool
    moves_rows_of_a_use: bool
    multiplies: bool


@cache
def plain_name(name: str) -> str:
    """The name of a node without its namespace and `Backward0`."""
    return re.sub(r"^torch::autograd::|Backward\d*$", "", name)


@lru_cache(1024)
def _kind(type_of_node: type[Node], name: str) -> _Kind:
    # Nodes of several names may be of one type, and functions of one name of several.
    plain = plain_name(name)
    is_custom = issubclass(type_of_node, torch.autograd.function.BackwardCFunction)
    return _Kind(
        placing=_placing(type_of_node),
        is_cast=name == CAST,
        masked=MASKED.get(plain),
        hides=is_custom and _hides(type_of_node),
        moves_rows=plain in ROUTING or (is_custom and plain != "_Parts"),
        moves_rows_of_a_use=plain in ROUTING and plain != "Embedding",
        multiplies=plain in PRODUCTS,
    )


def _hides(kind: type) -> bool:
    """Whether a custom function runs ops with unseen parameters during its backward pass."""
    backward = getattr(getattr(kind, "_forward_cls", None), "backward", None)
    code = getattr(backward, "__code__", None)
    return code is not None and any(name in INSIDE for name in code.co_names)


def _placing(kind: type[Node]) -> tuple[str, ...]:
    """Attributes of a kind of node that hold axes and sizes.

    An op that works along the axis of the samples mixes them, another one does not.
    """
    attributes = [name for name in dir(kind) if name.startswith(PLACING) or name in PLACES]
    if kind.__name__.startswith("Select"):
        attributes.append("_saved_index")
    return tuple(attributes)


def _above(use: Use, output: LossCall) -> bool:
    """Whether a use above the network's output is none.

    What looked like its parameters was then computed from the output.
    """
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
        candidates = [output] if reaches(root, output.edge.node) else []
        name = f"a tensor of shape {tuple(output.like.shape)}"
    else:
        known = [
            (node, mark.outputs)
            for node in nodes_below(root)
            if (mark := marks(node)) is not None and mark.outputs
        ]
        candidates = [
            Output(GradientEdge(node, outputs[output][0]), outputs[output][1])
            for node, outputs in known
            if output in outputs
        ]
        name = f"`{type(output).__name__}`"
    if len(candidates) != 1:
        raise UnsupportedError(
            f"`output=` must be something that the loss depends on once, found {name} "
            f"{len(candidates)} times in its graph. Run the forward pass inside "
            "`curvature(..., output=module)` or `record(output=module)`, or `extend` the module; "
            "pass the tensor instead of a module that is called several times; clone an output "
            "that is a view before overwriting it."
        )
    return LossCall(
        find_output,
        {"input": candidates[0].like},
        candidates[0].edge,
        loss.shape,
        loss.output_nr,
    )


def reaches(root: Node, node: Node) -> bool:
    """Whether a value depends on another."""
    return any(below is node for below in nodes_below(root))


def leaves(edge: GradientEdge) -> list[Tensor]:
    """The leaf tensors that the value at `edge` was computed from."""
    return list(
        dict.fromkeys(
            leaf for node in nodes_below(edge.node) if (leaf := leaf_of(node)) is not None
        )
    )


def parameters(use: Use) -> list[Tensor]:
    """The parameters that a use consumes, through transforms too."""
    # By `id`: the hash of a tensor is a function of Python's.
    consumed: dict[int, Tensor] = {}
    for operand in use.operands.values():
        if operand.source is None:
            consumed[id(operand.tensor)] = operand.tensor
            continue
        for parameter in leaves(operand.source):
            consumed[id(parameter)] = parameter
    return list(consumed.values())


def nodes_below(root: Node) -> Iterator[Node]:
    """All nodes that a value depends on, itself included."""
    stack = [root]
    seen = {root}
    while stack:
        node = stack.pop()
        yield node
        for after, _ in node.next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                stack.append(after)


def accumulator(parameter: Tensor, node: Node) -> Node:
    """The node that accumulates the gradient of a parameter, which is mostly right below its op.

    Args:
        parameter: The parameter.
        node: That of an op which consumes it.
    """
    for below, _ in node.next_functions:
        if below is not None:
            # `F.linear` transposes its weight.
            for leaf in (below, *[after for after, _ in below.next_functions]):
                if leaf is not None and leaf_of(leaf) is parameter:
                    return leaf
    # Torch makes a view of the parameter to find it, which takes ten times as long.
    return torch.autograd.graph.get_gradient_edge(parameter).node


def leaf_of(node: Node) -> Tensor | None:
    """The leaf tensor whose gradient `node` accumulates."""
    # Not any attribute of that name, which a custom function may have left at its node.
    return node.variable if type(node) is _LEAF else None  # type: ignore[attr-defined]
