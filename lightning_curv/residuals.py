r"""Residuals: what the network itself adds to the GGN to make the Hessian.

.. math::
    H = \sum_n J_n^\top (\nabla_f^2 \ell_n) J_n
        + \sum_{\text{nodes } \varphi} \sum_n J_{\varphi n}^\top R_{\varphi n} J_{\varphi n},
    \qquad R_\varphi = \sum_k g_k\, \nabla^2 \varphi_k

over the nodes of the autograd graph between the network's output and its parameters, with the gradient g at the node's
output and the Jacobian from the parameters to the node's inputs (Dangel, Harmeling & Hennig, *Modular block-diagonal
curvature approximations for feedforward architectures*, AISTATS 2020). Every residual is found by differentiating the
node twice; no list of activation functions is needed. Its eigenvectors are columns with signs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_curv.dependence import Dependence
from lightning_curv.local_curvature import LocalCurvature, Residual
from lightning_curv.passes import Passes
from lightning_curv.places import largest_entry, place_of

# nodes whose output is (piecewise) linear in all data inputs together: never differentiated
_LINEAR = """
    Abs AdaptiveAvgPool2D AdaptiveAvgPool3D AdaptiveMaxPool2D AdaptiveMaxPool3D Add Alias Amax Amin AsStrided AvgPool2D
    AvgPool3D Cat Clone Col2Im ConstantPadNd CopySlices Cumsum Diagonal Embedding Expand Flip Gather Hardtanh Im2Col
    Index IndexSelect LeakyRelu MaskedFill Max MaxPool2DWithIndices MaxPool3DWithIndices Mean Min
    MkldnnAdaptiveAvgPool2D NativeDropout Neg Permute ReflectionPad1D ReflectionPad2D ReflectionPad3D Relu Repeat
    ReplicationPad1D ReplicationPad2D ReplicationPad3D Reshape ReshapeAlias Roll Rsub Select Slice Split SplitWithSizes
    Squeeze Stack Sub Sum T Threshold ToCopy Transpose Tril Triu Unbind Unfold UnsafeView Unsqueeze UpsampleBilinear2D
    UpsampleNearest2D View Where
"""
LINEAR = frozenset(_LINEAR.split())
# nodes that are linear in each input: linear in the data if one input alone carries it
BILINEAR = frozenset(("Addmm", "Baddbmm", "Bmm", "Convolution", "Dot", "Mm", "Mul", "Mv"))


def residuals(passes: Passes) -> Iterator[Residual]:
    """The residuals of all nonlinear nodes between the losses and the parameters' ops.

    Raises:
        UnsupportedError: A node cannot be differentiated twice, or mixes samples.
    """
    nodes, count = _candidates(passes), passes.samples.count
    outputs = {node: [GradientEdge(node, i) for i in range(len(node._input_metadata))] for node in nodes}
    every = [edge for edges in outputs.values() for edge in edges]
    gradients = dict(zip(every, passes.gradients(every), strict=True)) if every else {}
    probed = probes(passes, [edge for edges in nodes.values() for edge in edges])
    for node, edges in nodes.items():
        reached = [(edge, g) for edge in outputs[node] if (g := gradients[edge]) is not None]
        probe = [p for edge in edges if (p := probed[edge]) is not None]
        if reached and len(probe) == len(edges):
            curvature = LocalCurvature(node, edges, reached)
            if not curvature.linear:
                yield curvature.eigen([place_of(*p, count) for p in probe], count)


def _candidates(passes: Passes) -> dict[Node, list[GradientEdge]]:
    """Nodes that may be nonlinear, and their data inputs (each once)."""
    candidates, dependence = {}, Dependence(passes.tape)
    for node in dependence.nodes:
        data = dependence.inputs(node)
        name = re.sub(r"Backward\d*$", "", node.name())
        if data and name not in LINEAR and not (name in BILINEAR and len(data) == 1):
            candidates[node] = list(dict.fromkeys(data))
    return candidates


def probes(passes: Passes, edges: Sequence[GradientEdge]) -> dict[GradientEdge, tuple[Tensor, Tensor, float] | None]:
    """Two cotangents per edge, the second with weighted samples, and their scale: what `place_of` needs."""
    calls = [(call.input, call.arguments["input"], passes.samples.losses[n]) for n, call in passes.tape.losses.items()]
    ones = [torch.linspace(1, 2, v.numel(), device=v.device).to(v.dtype).reshape(v.shape) for _, v, _ in calls]
    count = passes.samples.count
    numbered = [one * place.weights(one, count) for one, (_, _, place) in zip(ones, calls, strict=True)]
    starts = [edge for edge, _, _ in calls]
    if not edges:
        return {}
    first, second = passes.backward(starts, edges, ones), passes.backward(starts, edges, numbered)
    scale = largest_entry(first)
    found = zip(edges, first, second, strict=True)
    return {edge: None if a is None or b is None else (a, b, scale) for edge, a, b in found}
