r"""Residuals: what the network itself adds to the GGN to make the Hessian.

$$H = \sum_n J_n^\top (\nabla_f^2 \ell_n) J_n
      + \sum_{\text{nodes } \varphi} \sum_n J_{\varphi n}^\top R_{\varphi n} J_{\varphi n},
  \qquad R_\varphi = \sum_k g_k\, \nabla^2 \varphi_k$$

over the nodes of the autograd graph between the network's output and its parameters, with the
gradient g at the node's output and the Jacobian from the parameters to the node's inputs (Dangel,
Harmeling & Hennig, *Modular block-diagonal curvature approximations for feedforward architectures*,
AISTATS 2020). Every residual is found by differentiating the node twice; no list of activation
functions is needed. Its eigenvectors are columns with signs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, partial

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_curv.differentiation.internal_pass import nothing_below
from lightning_curv.graph.dependence import Dependence
from lightning_curv.graph.heads import BILINEAR, is_piecewise_linear, name_of
from lightning_curv.passes.passes import Passes
from lightning_curv.passes.summands import bounds, nodes_of_loss
from lightning_curv.samples.probing import owners_at
from lightning_curv.second_derivatives.local_curvature import (
    DiagonalResidual,
    LocalCurvature,
    Residual,
)
from lightning_curv.terms.owners import Owners

# nodes whose output entries depend on one entry of their only data input each
_ELEMENTWISE = """
    Acos Acosh Asin Asinh Atan Atanh Celu Cos Cosh Elu Erf Erfc Exp Expm1 Gelu Hardswish Log Log10
    Log1P Log2 LogSigmoid Mish Pow Reciprocal Rsqrt Sigmoid Silu Sin Sinh Softplus Sqrt Tan Tanh
"""
ELEMENTWISE = frozenset(_ELEMENTWISE.split())


def residuals(passes: Passes) -> Iterator[Residual]:
    """The residuals of all nonlinear nodes between the losses and the parameters' ops.

    Raises:
        UnsupportedError: A node cannot be differentiated twice, or mixes samples.
    """
    nodes = _candidates(passes)
    if not nodes:
        return
    outputs = {
        node: [GradientEdge(node, i) for i in range(len(node._input_metadata))] for node in nodes
    }
    every = [edge for edges in outputs.values() for edge in edges]
    # One pass for all nodes: R of a node needs the gradient that arrives at its outputs.
    gradients = dict(zip(every, gradients_in_network(passes, every), strict=True))

    # Asked for at the first node that is not elementwise; many networks have none.
    @cache
    def owners() -> dict[GradientEdge, Owners | None]:
        return owners_at(passes, [edge for edges in nodes.values() for edge in edges])

    def owner(edge: GradientEdge) -> Owners | None:
        return owners()[edge]

    for node, edges in nodes.items():
        # What no gradient reaches has no weight in the Hessian.
        reached = [(edge, g) for edge in outputs[node] if (g := gradients[edge]) is not None]
        if not reached:
            continue
        curvature = LocalCurvature(node, edges, reached)
        if name_of(node) in ELEMENTWISE and len(edges) == 1:
            values = curvature.diagonal()
            if bool(values.any()):
                yield DiagonalResidual(edges, values, partial(owner, edges[0]))
        else:
            owners_of_edges = [at for edge in edges if (at := owner(edge)) is not None]
            if len(owners_of_edges) == len(edges) and not curvature.linear:
                yield curvature.eigen(owners_of_edges)


def gradients_in_network(passes: Passes, edges: Sequence[GradientEdge]) -> list[Tensor | None]:
    """The gradient of the loss at `edges`, less what arrives from above the network's outputs.

    A node may be part of the loss and of the network: the exponential of a variance that is drawn
    with and penalised.
    """
    gradients = [*passes.gradients(edges)]
    above = nodes_of_loss(passes)
    shared = [i for i, edge in enumerate(edges) if edge.node in above]
    if shared:
        # The part that stays inside of the loss: a pass that ends where the network begins.
        with nothing_below(bounds(passes.parts)):
            own = passes.gradients([edges[i] for i in shared])
        for i, g in zip(shared, own, strict=True):
            total = gradients[i]
            if g is None or total is None:
                gradients[i] = total
            else:
                gradients[i] = total - g
    return gradients


def _candidates(passes: Passes) -> dict[Node, list[GradientEdge]]:
    """Nodes that may be nonlinear, and their data inputs (each once)."""
    candidates: dict[Node, list[GradientEdge]] = {}
    dependence = Dependence(passes.tape, (edge for part in passes.parts for edge in part.edges))
    for node in dependence.nodes:
        data = dependence.inputs(node)
        # A product with a constant is linear; one of two values of the network is not.
        linear = is_piecewise_linear(node) or (name_of(node) in BILINEAR and len(data) == 1)
        if data and not linear:
            candidates[node] = list(dict.fromkeys(data))
    return candidates
