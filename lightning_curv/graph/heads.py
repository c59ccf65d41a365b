"""Heads: the places near the top of a loss where its summands are still apart.

Above a head a loss is linear (a mean, a sum, a factor) or a known loss function, so a head's rows
are summands. Samples are found from there: a head's rows are weighted, and the weights are followed
through the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_curv.graph.tape import Tape, plain_name
from lightning_curv.recording.records import LossCall, like, shape_at

# nodes whose output is linear in all of their differentiable inputs together
_LINEAR = """
    Add Alias Cat Clone ConstantPadNd Expand Flip Gather Index IndexSelect MaskedFill MaskedSelect
    Mean NanToNum Nansum Neg Permute Repeat Reshape ReshapeAlias Roll Rsub Select Slice Split
    SplitWithSizes Squeeze Stack Sub Sum T ToCopy Transpose Unbind UnsafeView Unsqueeze View Where
"""
LINEAR = frozenset(_LINEAR.split())
# the same but for kinks: second derivatives are zero almost everywhere
_PIECEWISE = """
    Abs AdaptiveAvgPool2D AdaptiveAvgPool3D AdaptiveMaxPool2D AdaptiveMaxPool3D Amax Amin AsStrided
    AvgPool2D AvgPool3D Clamp ClampMax ClampMin Col2Im Complex Conj ConjPhysical CopySlices Cummax
    Cummin Cumsum Diagonal Embedding FftC2C FftC2R FftR2C Hardsigmoid Hardtanh Im2Col Imag IndexAdd
    IndexCopy IndexFill IndexPut IndexPutImpl
    Kthvalue LeakyRelu MaskedScatter Max MaxPool2DWithIndices MaxPool3DWithIndices Maximum Median
    Min Minimum MkldnnAdaptiveAvgPool2D NativeDropout Nanmedian Real ReflectionPad1D ReflectionPad2D
    ReflectionPad3D Relu ReplicationPad1D ReplicationPad2D ReplicationPad3D Scatter ScatterAdd Sort
    Threshold Topk Trace Tril Triu Unfold UpsampleBilinear2D UpsampleNearest2D ViewAsComplex
    ViewAsReal
"""
PIECEWISE_LINEAR = LINEAR | frozenset(_PIECEWISE.split())
# nodes that are linear in one of their inputs if the others carry no gradient; for a quotient: in
# the first
PRODUCTS = frozenset(("Div", "Dot", "Mul", "Mv"))
# nodes that are linear in each input: linear in the data if one input alone carries it
BILINEAR = frozenset(("Addmm", "Addmv", "Baddbmm", "Bmm", "Convolution", "Dot", "Mm", "Mul", "Mv"))
CLASSES = frozenset(("cross_entropy", "nll_loss"))  # loss functions with classes on the second axis


@dataclass(frozen=True)
class Head:
    """A place near the top of a loss.

    Attributes:
        edge: Where it is in the graph.
        like: A tensor of its shape, type and device.
        call: The recorded loss call whose input it is, if it is one.
    """

    edge: GradientEdge
    like: Tensor
    call: LossCall | None = None

    @property
    def axes(self) -> list[int]:
        """The axes that may carry the samples: not that of classes."""
        if self.call is not None and self.call.name in CLASSES and self.like.ndim > 1:
            classes = 1
        else:
            classes = None
        return [axis for axis in range(self.like.ndim) if axis != classes]


def find_heads(tape: Tape, loss: Tensor) -> list[Head]:
    """The heads of a loss, each once."""
    heads: dict[tuple[Node, int], Head] = {}
    seen: set[tuple[Node, int]] = set()
    stack = [(cast("Node", loss.grad_fn), loss.output_nr)]
    while stack:
        node, number = stack.pop()
        if (node, number) in seen:
            continue
        seen.add((node, number))
        call = tape.losses.get(node)
        if call is not None:
            heads.setdefault(call.input[:2], Head(call.input, like(call.arguments["input"]), call))
            if call.beside:
                stack += [
                    (after, index) for after, index in node.next_functions if after is not None
                ]
        elif not (node in tape.uses and tape.uses[node].operands) and (
            inputs := linear_inputs(node)
        ):
            stack += inputs
        else:
            heads.setdefault((node, number), head_at(GradientEdge(node, number), loss))
    return list(heads.values())


def head_at(edge: GradientEdge, loss: Tensor) -> Head:
    """A head that is no input of a known loss function."""
    metadata = edge.node._input_metadata[edge.output_nr]
    if isinstance(metadata.dtype, torch.dtype):
        dtype = metadata.dtype
    else:
        dtype = loss.dtype
    return Head(edge, torch.zeros((), dtype=dtype, device=loss.device).expand(shape_at(edge)))


def frontier(tape: Tape, heads: Sequence[Head], loss: Tensor) -> list[Head]:
    """The outputs of the first ops with parameters below some heads."""
    outputs: dict[tuple[Node, int], Head] = {}
    stack = [head.edge.node for head in heads]
    seen = set[Node]()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        use = tape.uses.get(node)
        if use is not None:
            outputs[node, use.output_nr] = head_at(GradientEdge(node, use.output_nr), loss)
        else:
            stack += [after for after, _ in node.next_functions if after is not None]
    return list(outputs.values())


def linear_inputs(node: Node, kinks: bool = False) -> list[tuple[Node, int]]:
    """The inputs of a node that is linear in them; empty: it is not.

    Args:
        node: The node.
        kinks: Whether it may be piecewise linear, and add up rows in any order.
    """
    name = name_of(node)
    inputs = [after for after in node.next_functions if after[0] is not None]
    linear = is_piecewise_linear(node) if kinks else name in LINEAR
    products = PRODUCTS | BILINEAR if kinks else PRODUCTS
    if linear or (name in products and len(inputs) == 1 and not _is_divisor(node, name)):
        return cast("list[tuple[Node, int]]", inputs)
    return []


def is_piecewise_linear(node: Node) -> bool:
    """Whether a node is linear in all of its inputs together, but for kinks."""
    name = name_of(node)
    # |z| bends where z is a complex number: it is √(x² + y²) of its parts.
    bends = name == "Abs" and any(dtype.is_complex for dtype in _dtypes_of_inputs(node))
    return name in PIECEWISE_LINEAR and not bends


def _dtypes_of_inputs(node: Node) -> list[torch.dtype]:
    inputs = [(after, number) for after, number in node.next_functions if after is not None]
    return [after._input_metadata[number].dtype for after, number in inputs]


def _is_divisor(node: Node, name: str) -> bool:
    return name == "Div" and node.next_functions[0][0] is None


def name_of(node: Node) -> str:
    """A node's name without `Backward0`."""
    return plain_name(node.name())


def saved_integer(value: int) -> int:
    """An integer that a node saved, which autograd shows without its sign."""
    return value - 2**64 if value >= 2**63 else value


def saved_axis(dim: int, rank: int) -> int:
    """An axis that a node saved, of a tensor of that rank."""
    return saved_integer(dim) % max(1, rank)
