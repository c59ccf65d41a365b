"""Graphs in which samples cannot meet, whatever the numbers are.

A verification by weights is true of one batch: a mask or a factor that is zero today may be
something else tomorrow. Where every op is known to treat the axis of the samples entry by entry, as
the kinds of nodes and the axes that they work along tell, it is true of all graphs of the same
structure. What is not in the tables here is not known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_curv.graph.heads import Head, linear_inputs, name_of, saved_axis
from lightning_curv.graph.joins import Join
from lightning_curv.graph.tape import Tape
from lightning_curv.recording.records import shape_at
from lightning_curv.terms.owners import BatchAxis, Owners

_ENTRYWISE = """
    Abs Add Alias Ceil Clamp ClampMax ClampMin Clone Cos Div Elu Erf Exp Expand Expm1 Floor Gelu
    Hardsigmoid Hardswish Hardtanh LeakyRelu Lerp Log Log10 Log1P Log2 LogSigmoid MaskedFill Maximum
    Minimum Mish Mul NanToNum NativeDropout Neg Pow PreluKernel Reciprocal Relu Round Rsqrt Rsub
    Sigmoid Sign Silu Sin Softplus Sqrt Sub Tan Tanh Threshold ToCopy Where
"""
_VIEWS = "ReshapeAlias Squeeze UnsafeView Unsqueeze View Reshape".split()  # noqa: SIM905
_LEADING = """
    AdaptiveAvgPool2D AdaptiveAvgPool3D AvgPool2D AvgPool3D Baddbmm Bmm
    MaxPool2DWithIndices MaxPool3DWithIndices NativeGroupNorm PixelShuffle PixelUnshuffle
    ReflectionPad1D ReflectionPad2D ReplicationPad1D ReplicationPad2D
    ScaledDotProductCudnnAttention ScaledDotProductEfficientAttention
    ScaledDotProductFlashAttention ScaledDotProductFlashAttentionForCpu UpsampleBicubic2D
    UpsampleBilinear2D UpsampleLinear1D UpsampleNearest1D UpsampleNearest2D
"""
# Ops that mix the entries of the axes in `_saved_dim` or `_saved_dims`, and keep all axes.
_MIXING = """
    Cat Cumprod Cumsum Flip LogSoftmax Roll SafeSoftmax Softmax Split SplitWithSizes
"""
_ALONG = frozenset(_MIXING.split())
_SUMMING = """
    Amax Amin LinalgVectorNorm Logsumexp Max Mean Min Std Sum Var
"""
_REDUCING = frozenset(_SUMMING.split())
ENTRYWISE = frozenset(_ENTRYWISE.split())
VIEWS = frozenset(_VIEWS)
LEADING = frozenset(_LEADING.split())
_SLOTTED = """
    batch_norm conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d embedding
    group_norm layer_norm linear matmul rms_norm
"""
_USES = frozenset(_SLOTTED.split()) | frozenset("add addmm div mul sub".split())  # noqa: SIM905

# linear ops that losses per sample are added up by
_ADDED = "Add Clone Div MaskedFill Mean Mul Neg Rsub Sub Sum ToCopy Where"
_ADDING = frozenset(_ADDED.split())

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
    axes: dict[Edge, BatchAxis] = {}
    stack: list[tuple[Edge, Owners | None]] = [
        ((head.edge.node, head.edge.output_nr), owners) for head, owners in heads
    ]
    while stack:
        edge, axis = stack.pop()
        if not isinstance(axis, BatchAxis):
            return False
        if edge in axes:
            if axes[edge] != axis:
                return False
            continue
        axes[edge] = axis
        node = edge[0]
        if node in tape.uses:
            use = tape.uses[node]
            if use.operands and (
                use.mixes_samples
                or use.output_nr != edge[1]
                or uses.get(node) != axis
                or use.name not in _USES
            ):
                return False
            inputs = [(below.node, below.output_nr) for below in use.inputs.values()]
            rule = _same if use.operands and use.rule.parameters else _rule(node)
        else:
            inputs = [(after, number) for after, number in node.next_functions if after is not None]
            rule = _rule(node)
        if inputs and rule is None:
            return False
        shape = _shape(edge)
        if node in tape.uses and tape.uses[node].operands:
            shape = tape.uses[node].shape
        stack += [
            (below, rule(node, shape, _shape(below), axis)) for below in inputs if rule is not None
        ]
    return True


def _shape(edge: Edge) -> torch.Size:
    return shape_at(GradientEdge(*edge))


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
        return _along
    if name in _REDUCING and hasattr(node, "_saved_keepdim"):
        return _reducing
    return {
        "Addmm": _product,
        "ConstantPadNd": _padded,
        "Convolution": _convolution,
        "Mm": _product,
        "NativeBatchNorm": _batch_norm,
        "NativeLayerNorm": _layer_norm,
        "Permute": _permute,
        "Select": _select,
        "Slice": _slice,
        "Stack": _stack,
        "T": _transpose,
        "Transpose": _transpose,
        "Unbind": _select,
    }.get(name)


def _same(
    node: Any,
    out: torch.Size,
    inp: torch.Size,
    axis: BatchAxis,
) -> BatchAxis | None:
    """Ops whose rule keeps the axes up to that of the samples."""
    if inp[: axis.axis + 1] == out[: axis.axis + 1]:
        return axis
    return None


def _entrywise(
    node: Any,
    out: torch.Size,
    inp: torch.Size,
    axis: BatchAxis,
) -> BatchAxis | None:
    place = axis.axis - (len(out) - len(inp))
    if place < 0 or inp[place] != out[axis.axis]:
        return None  # broadcast along the samples
    return BatchAxis(axis.count, place, axis.inner)


def _leading(
    node: Any,
    out: torch.Size,
    inp: torch.Size,
    axis: BatchAxis,
) -> BatchAxis | None:
    """Ops that treat the entries of the first axis separately."""
    if not axis.axis and len(inp) == len(out) and inp[0] == out[0]:
        return axis
    return None


def _view(
    node: Any,
    out: torch.Size,
    inp: torch.Size,
    axis: BatchAxis,
) -> BatchAxis | None:
    """The same numbers in the same order, as many of them before the index of the sample."""
    before = math.prod(out[: axis.axis]) * (out[axis.axis] // axis.count if axis.inner else 1)
    for place, size in enumerate(inp):
        if size % axis.count:
            continue
        outer = math.prod(inp[:place])
        if outer == before:
            return BatchAxis(axis.count, place)
        if outer * (size // axis.count) == before:
            return BatchAxis(axis.count, place, inner=size != axis.count)
    return None


def _along(
    node: Any,
    out: torch.Size,
    inp: torch.Size,
    axis: BatchAxis,
) -> BatchAxis | None:
    """Ops that mix entries along some axes, all of them if none is saved."""
    saved = node._saved_dims if hasattr(node, "_saved_dims") else (node._saved_dim,)
    mixed = {saved_axis(dim, len(out)) for dim in saved} or {*range(len(out))}
    kept = len(inp) == len(out) and inp[axis.axis] == out[axis.axis]
    return axis if kept and axis.axis not in mixed else None


def _padded(
    node: Any,
    out: torch.Size,
    inp: torch.Size,
    axis: BatchAxis,
) -> BatchAxis | None:
    """Padding, two numbers per axis from the last one on: rows may also be cut off and put on."""
    first = 2 * (len(out) - 1 - axis.axis)
    return axis if not any(node._saved_pad[first : first + 2]) else None


def _product(
    node: Any,
    out: torch.Size,
    inp: torch.Size,
    axis: BatchAxis,
) -> BatchAxis | None:
    """A row of a matrix product reads one row of the first matrix, whatever the second one is.

    Only if the second matrix, or what is added, carries no gradient: else it belongs to all rows.
    """
    first, *others = _matrices(node)
    reads_first = first is not None and all(other is None for other in others)
    return axis if reads_first and not axis.axis and inp[:1] == out[:1] else None


def _convolution(
    node: Any,
    out: torch.Size,
    inp: torch.Size,
    axis: BatchAxis,
) -> BatchAxis | None:
    """Of data with a kernel that carries no gradient: else that belongs to all samples."""
    _, *kernel = (after for after, _ in node.next_functions)
    return None if any(kernel) else _leading(node, out, inp, axis)


def _matrices(node: Any) -> list[Node | None]:
    """The nodes of the matrices of a product, the first one first, then what is added to it."""
    nodes = [after for after, _ in node.next_functions]
    return [*nodes[1:], nodes[0]] if name_of(node) == "Addmm" else nodes


def _batch_norm(
    node: Any,
    out: torch.Size,
    inp: torch.Size,
    axis: BatchAxis,
) -> BatchAxis | None:
    """With running statistics it treats entries apart; with those of the batch samples meet."""
    return None if node._saved_training else _leading(node, out, inp, axis)


def _layer_norm(
    node: Any,
    out: torch.Size,
    inp: torch.Size,
    axis: BatchAxis,
) -> BatchAxis | None:
    rows = len(out) - len(node._saved_normalized_shape)
    return axis if inp == out and axis.axis < rows else None


def _stack(
    node: Any,
    out: torch.Size,
    inp: torch.Size,
    axis: BatchAxis,
) -> BatchAxis | None:
    new = saved_axis(node._saved_dim, len(out))
    return None if new == axis.axis else replace(axis, axis=axis.axis - (new < axis.axis))


def _reducing(
    node: Any,
    out: torch.Size,
    inp: torch.Size,
    axis: BatchAxis,
) -> BatchAxis | None:
    dims = node._saved_dim if isinstance(node._saved_dim, tuple) else (node._saved_dim,)
    summed = {saved_axis(dim, len(inp)) for dim in dims if dim is not None}
    summed = summed or {*range(len(inp))}
    kept = [place for place in range(len(inp)) if node._saved_keepdim or place not in summed]
    if axis.axis >= len(kept):
        return None
    place = kept[axis.axis]
    if place in summed:
        return None
    return BatchAxis(axis.count, place, axis.inner)


def _transpose(
    node: Any,
    out: torch.Size,
    inp: torch.Size,
    axis: BatchAxis,
) -> BatchAxis | None:
    dims = (0, 1) if name_of(node) == "T" else (node._saved_dim0, node._saved_dim1)
    first, second = (saved_axis(dim, len(out)) for dim in dims)
    place = {first: second, second: first}.get(axis.axis, axis.axis)
    return BatchAxis(axis.count, place, axis.inner)


def _permute(
    node: Any,
    out: torch.Size,
    inp: torch.Size,
    axis: BatchAxis,
) -> BatchAxis | None:
    return BatchAxis(axis.count, saved_axis(node._saved_dims[axis.axis], len(inp)), axis.inner)


def _select(
    node: Any,
    out: torch.Size,
    inp: torch.Size,
    axis: BatchAxis,
) -> BatchAxis | None:
    gone = saved_axis(node._saved_dim, len(inp))
    return replace(axis, axis=axis.axis + (gone <= axis.axis))


def _slice(
    node: Any,
    out: torch.Size,
    inp: torch.Size,
    axis: BatchAxis,
) -> BatchAxis | None:
    return axis if out[axis.axis] == inp[axis.axis] else None


def added_by_row(loss: Tensor, heads: Sequence[Head], count: int) -> dict[Node, list[Head]]:
    """The heads that are added up row by row, by the node of the sum: the losses of N samples.

    Args:
        loss: The loss, which is linear in the heads.
        heads: Its heads.
        count: N.
    """
    by_place = {head.edge[:2]: head for head in heads}
    sums: dict[Node, list[Head]] = {}
    stack, seen = [(cast("Node", loss.grad_fn), loss.output_nr)], set[Edge]()
    while stack:
        place = stack.pop()
        if place in seen or place in by_place:
            continue
        seen.add(place)
        added = _added_at(place, by_place, count)
        if len(added) > 1:
            sums[place[0]] = added
        else:
            stack += linear_inputs(place[0])
    return sums


def _added_at(top: Edge, by_place: Mapping[Edge, Head], count: int) -> list[Head]:
    """The heads whose row n is added up in row n of an output of N rows."""
    added, stack, seen = list[Head](), [top], set[Edge]()
    while stack:
        place = stack.pop()
        if place in seen or _shape(place)[:1] != (count,):
            continue
        seen.add(place)
        if place in by_place:
            added.append(by_place[place])
        else:
            stack += [below for below in linear_inputs(place[0]) if _adds_up_rows(place, below)]
    return added


def _adds_up_rows(above: Edge, below: Edge) -> bool:
    """Whether row n of an output of a linear node is made of row n of an input."""
    node, rows = above[0], BatchAxis(_shape(above)[0])
    rule = _rule(node) if name_of(node) in _ADDING else None
    return rule is not None and rule(node, _shape(above), _shape(below), rows) == rows
