"""Graphs in which samples cannot meet, whatever the numbers are.

A verification by weights is true of one batch: a mask or a factor that is zero today may be
something else tomorrow. Where every op is known to treat the axis of the samples entry by entry, as
the kinds of nodes and the axes that they work along tell, it is true of all graphs of the same
structure. What is not in the tables here is not known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.autograd.graph import Node

from lightning_curv.graph.heads import Head, name_of, saved_axis
from lightning_curv.graph.joins import Join
from lightning_curv.graph.tape import Tape
from lightning_curv.terms.owners import BatchAxis, Owners

_ENTRYWISE = """
    Abs Add Alias Clamp ClampMax ClampMin Clone Cos Div Elu Erf Exp Expm1 Gelu Hardsigmoid Hardswish
    Hardtanh LeakyRelu Log Log1P LogSigmoid MaskedFill Mish Mul NanToNum NativeDropout Neg Pow
    Reciprocal Relu Rsqrt Rsub Sigmoid Silu Sin Softplus Sqrt Sub Tanh Threshold ToCopy Where
"""
_VIEWS = "ReshapeAlias Squeeze UnsafeView Unsqueeze View Reshape".split()  # noqa: SIM905
_LEADING = """
    AdaptiveAvgPool2D AvgPool2D MaxPool2DWithIndices ReflectionPad2D ReplicationPad2D
    ScaledDotProductEfficientAttention ScaledDotProductFlashAttention
    ScaledDotProductFlashAttentionForCpu UpsampleBilinear2D UpsampleNearest2D
"""
_ALONG = frozenset(("LogSoftmax", "Softmax"))
_REDUCING = frozenset(("Mean", "Sum"))
ENTRYWISE, VIEWS, LEADING = (
    frozenset(_ENTRYWISE.split()),
    frozenset(_VIEWS),
    frozenset(_LEADING.split()),
)
_USES = frozenset(
    (
        "linear",
        "conv1d",
        "conv2d",
        "conv3d",
        "layer_norm",
        "group_norm",
        "rms_norm",
        "matmul",
        "embedding",
    )
)

Edge = tuple[Node, int]


def samples_cannot_meet(
    tape: Tape,
    heads: Sequence[tuple[Head, Owners]],
    uses: Mapping[Node | Join, Owners],
) -> bool:
    """Whether, in every graph of this structure, no row below the heads depends on several samples.

    Args:
        tape: What the loss depends on.
        heads: Where the samples are apart, and who owns the rows there.
        uses: Who was found to own the rows of the outputs of all uses.
    """
    if tape.stray or any(
        not isinstance(owners, BatchAxis) for owners in [*uses.values(), *(o for _, o in heads)]
    ):
        return False
    found: dict[Edge, BatchAxis] = {}
    stack: list[tuple[Edge, Owners | None]] = [
        ((head.edge.node, head.edge.output_nr), owners) for head, owners in heads
    ]
    while stack:
        edge, axis = stack.pop()
        if not isinstance(axis, BatchAxis):
            return False
        if edge in found:
            if found[edge] != axis:
                return False
            continue
        found[edge] = axis
        node = edge[0]
        if node in tape.uses:
            use = tape.uses[node]
            if use.operands and (
                use.output_nr != edge[1] or uses.get(node) != axis or use.name not in _USES
            ):
                return False
            inputs = [(below.node, below.output_nr) for below in use.inputs.values()]
            rule = _same if use.operands and use.rule.slots else _rule(node)
        else:
            inputs = [(after, number) for after, number in node.next_functions if after is not None]
            rule = _rule(node)
        if inputs and rule is None:
            return False
        shape = torch.Size(node._input_metadata[edge[1]].shape)
        if node in tape.uses and tape.uses[node].operands:
            shape = tape.uses[node].shape
        stack += [
            (below, rule(node, shape, _shape(below), axis)) for below in inputs if rule is not None
        ]
    return True


def _shape(edge: Edge) -> torch.Size:
    return torch.Size(edge[0]._input_metadata[edge[1]].shape)


Rule = Callable[[Any, torch.Size, torch.Size, BatchAxis], BatchAxis | None]


def _rule(node: Node) -> Rule | None:
    name = name_of(node)
    if name in ENTRYWISE:
        return _entrywise
    if name in VIEWS:
        return _view
    if name in LEADING:
        return _leading
    if name in _ALONG:
        return lambda node, out, inp, axis: (
            axis if saved_axis(node._saved_dim, len(out)) != axis.axis else None
        )
    if name in _REDUCING and node.name().endswith("1"):
        return _reducing
    return {
        "Transpose": _transpose,
        "Permute": _permute,
        "Select": _select,
        "Slice": _slice,
        "Bmm": _leading,
    }.get(name)


def _same(
    node: Any,
    out: torch.Size,
    inp: torch.Size,
    axis: BatchAxis,
) -> BatchAxis | None:
    """Ops whose rule keeps the axes up to that of the samples."""
    return axis if inp[: axis.axis + 1] == out[: axis.axis + 1] else None


def _entrywise(
    node: Any,
    out: torch.Size,
    inp: torch.Size,
    axis: BatchAxis,
) -> BatchAxis | None:
    place = axis.axis - (len(out) - len(inp))
    if place < 0 or inp[place] != out[axis.axis]:
        return None  # broadcast along the samples
    return BatchAxis(axis.count, place, axis.minor)


def _leading(
    node: Any,
    out: torch.Size,
    inp: torch.Size,
    axis: BatchAxis,
) -> BatchAxis | None:
    """Ops that treat the entries of the first axis separately."""
    return axis if not axis.axis and len(inp) == len(out) and inp[0] == out[0] else None


def _view(
    node: Any,
    out: torch.Size,
    inp: torch.Size,
    axis: BatchAxis,
) -> BatchAxis | None:
    """The same numbers in the same order: as many of them before the index of the sample as before."""
    before = math.prod(out[: axis.axis]) * (out[axis.axis] // axis.count if axis.minor else 1)
    for place, size in enumerate(inp):
        if size % axis.count:
            continue
        outer = math.prod(inp[:place])
        if outer == before:
            return BatchAxis(axis.count, place)
        if outer * (size // axis.count) == before:
            return BatchAxis(axis.count, place, minor=size != axis.count)
    return None


def _reducing(
    node: Any,
    out: torch.Size,
    inp: torch.Size,
    axis: BatchAxis,
) -> BatchAxis | None:
    summed = {saved_axis(dim, len(inp)) for dim in node._saved_dim} or {*range(len(inp))}
    kept = [place for place in range(len(inp)) if node._saved_keepdim or place not in summed]
    place = kept[axis.axis]
    return None if place in summed else BatchAxis(axis.count, place, axis.minor)


def _transpose(
    node: Any,
    out: torch.Size,
    inp: torch.Size,
    axis: BatchAxis,
) -> BatchAxis | None:
    first, second = saved_axis(node._saved_dim0, len(out)), saved_axis(node._saved_dim1, len(out))
    place = {first: second, second: first}.get(axis.axis, axis.axis)
    return BatchAxis(axis.count, place, axis.minor)


def _permute(
    node: Any,
    out: torch.Size,
    inp: torch.Size,
    axis: BatchAxis,
) -> BatchAxis | None:
    return BatchAxis(axis.count, saved_axis(node._saved_dims[axis.axis], len(inp)), axis.minor)


def _select(
    node: Any,
    out: torch.Size,
    inp: torch.Size,
    axis: BatchAxis,
) -> BatchAxis | None:
    gone = saved_axis(node._saved_dim, len(inp))
    return BatchAxis(axis.count, axis.axis + (gone <= axis.axis), axis.minor)


def _slice(
    node: Any,
    out: torch.Size,
    inp: torch.Size,
    axis: BatchAxis,
) -> BatchAxis | None:
    return axis if out[axis.axis] == inp[axis.axis] else None
