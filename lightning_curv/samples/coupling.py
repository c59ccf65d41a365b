"""Whether a loss keeps the samples apart, told by second derivatives at the network's outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_curv.differentiation.formulas import FORMULAS
from lightning_curv.differentiation.internal_pass import internal_pass
from lightning_curv.differentiation.twice import differentiable
from lightning_curv.graph.heads import Head, head_at, linear_inputs, name_of, saved_axis
from lightning_curv.samples.custom_functions import Undecided, bodies, refuse_hidden
from lightning_curv.samples.forward import forward_owners
from lightning_curv.terms.owners import Owners

if TYPE_CHECKING:
    from lightning_curv.passes.passes import Passes


# piecewise linear ops that take several entries together, along `_saved_dim` or all of them
_REDUCTIONS = """
    Amax Amin Cummax Cummin Kthvalue LinalgVectorNorm Max Median Min Mode Nanmedian Norm Sort Topk
"""
REDUCTIONS = frozenset(_REDUCTIONS.split())
PRODUCTS = frozenset(
    ("Addmm", "Baddbmm", "Bmm", "Dot", "Mm", "Mv")
)  # entries that meet are not at the same place


def separable(
    passes: Passes,
    tops: Sequence[Head],
    outputs: Sequence[tuple[Head, Owners]],
) -> bool:
    """Whether a part of a loss is a sum over samples of functions of their own output rows.

    The Hessian H of such a part maps a direction whose rows are weighted by their samples to the
    image with the same weights. It costs two differentiations of what lies above the outputs, and
    no pass through the network.

    Args:
        passes: The graph.
        tops: Where the part begins.
        outputs: The outputs that it is a function of, and who owns their rows.

    Raises:
        Undecided: There is no second derivative, or a function of the user's hides it.
    """
    # The gradient where the part begins, from one pass through what is above.
    seeds = passes.gradients([head.edge for head in tops])
    reached = [
        (head.edge, seed) for head, seed in zip(tops, seeds, strict=True) if seed is not None
    ]
    edges = [head.edge for head, _ in outputs]
    nodes = [*_above(tops, {edge.node for edge in edges})]

    def differentiated() -> Sequence[Tensor | None]:
        return torch.autograd.grad(
            [edge for edge, _ in reached],
            edges,
            [seed for _, seed in reached],
            create_graph=True,
            allow_unused=True,
        )

    with_formulas = differentiable(node for node in nodes if node.name() in FORMULAS)
    with torch.enable_grad(), internal_pass(), with_formulas, bodies(nodes):
        try:
            refuse_hidden(passes, nodes, differentiated, outputs)
            gradients = differentiated()
            # A gradient without a graph is constant: the part is linear in that output.
            curved = [(i, g) for i, g in enumerate(gradients) if g is not None and g.requires_grad]
            if not curved:
                return not nonlinear_in_several(passes, tops, outputs)
            trial = [_trial(head.like) for head, _ in outputs]
            weights = [owners.weights(t) for t, (_, owners) in zip(trial, outputs, strict=True)]

            def image(vectors: Sequence[Tensor]) -> list[Tensor]:
                rows = torch.autograd.grad(
                    [g for _, g in curved],
                    edges,
                    [vectors[i] for i, _ in curved],
                    retain_graph=True,
                    allow_unused=True,
                )
                return [
                    torch.zeros_like(t) if f is None else f
                    for f, t in zip(rows, trial, strict=True)
                ]

            # H v and H (w ⊙ v): if no samples meet, the second is w ⊙ (H v).
            plain = image(trial)
            weighted = image([t * w for t, w in zip(trial, weights, strict=True)])
            if nonlinear_in_several(passes, tops, outputs):
                return False
        except RuntimeError as error:
            raise Undecided(str(error)) from error
    # Rounding is relative to the largest image, since entries of others may cancel to zero.
    scale = max((float(p.abs().max()) for p in plain if p.numel()), default=0.0)
    eps = max(passes.tape.eps, *(torch.finfo(p.dtype).eps for p in plain))
    return all(
        bool(((w * p - x).abs() <= 1e3 * eps * scale).all())
        for p, x, w in zip(plain, weighted, weights, strict=True)
    )


def nonlinear_in_several(
    passes: Passes,
    tops: Sequence[Head],
    outputs: Sequence[tuple[Head, Owners]],
) -> bool:
    """Whether some op above the outputs is nonlinear in entries of several samples.

    Second derivatives do not show it where an op is piecewise linear: an absolute value, a hinge, a
    maximum.
    """
    # The owners at the outputs are known; those above are found from them.
    below = {head.edge[:2] for head, _ in outputs}
    nodes = [
        node
        for node in _above(tops, {head.edge.node for head, _ in outputs})
        if not linear_inputs(node)
    ]
    edges = {
        node: [
            GradientEdge(after, number)
            for after, number in node.next_functions
            if after is not None
        ]
        for node in nodes
    }
    inputs = list(dict.fromkeys(edge[:2] for of_node in edges.values() for edge in of_node))
    known = {
        head.edge[:2]: owners.owner(head.like.shape).expand(head.like.shape)
        for head, owners in outputs
    }
    heads = [head_at(GradientEdge(*edge), passes.loss) for edge in inputs if edge not in below]
    if heads:
        owners_of_heads = forward_owners(passes, heads, outputs, outputs[0][1].count, by_entry=True)
    else:
        owners_of_heads = []
    if owners_of_heads is None:
        return True
    known |= {
        head.edge[:2]: rows.index.reshape(head.like.shape)
        for head, rows in zip(heads, owners_of_heads, strict=True)
    }
    for node in nodes:
        owners = [known[edge[:2]] for edge in edges[node]]
        # Two inputs whose entries belong to different samples meet at one place.
        if name_of(node) not in PRODUCTS and any(differ(one, owners[0]) for one in owners[1:]):
            return True
        if name_of(node) in REDUCTIONS and any(_several(one, node) for one in owners):
            return True
    return False


def _above(tops: Sequence[Head], outputs: set[Node]) -> Iterator[Node]:
    """The nodes of a part of a loss, those of the outputs left out."""
    stack = [head.edge.node for head in tops]
    seen = set[Node]()
    while stack:
        node = stack.pop()
        if node not in seen and node not in outputs:
            seen.add(node)
            yield node
            stack += [after for after, _ in node.next_functions if after is not None]


def differ(one: Tensor, other: Tensor) -> bool:
    """Whether entries of two inputs that meet have different owners.

    Inputs that cannot be broadcast do not meet entry by entry: theirs is no pointwise op.
    """
    try:
        # As the op itself would do with its inputs.
        one, other = torch.broadcast_tensors(one, other)
    except RuntimeError:
        return False
    return bool(((one != other) & (one >= 0) & (other >= 0)).any())


def _several(owners: Tensor, node: Node) -> bool:
    """Whether a reduction takes entries of several samples together."""
    dim = getattr(node, "_saved_dim", None)
    if dim is None:
        axes = list(range(owners.ndim))
    elif isinstance(dim, int):
        axes = [dim]
    else:
        axes = list(dim)
    axes = [saved_axis(axis, owners.ndim) for axis in axes]
    if not axes or not owners.numel():
        return False
    largest = owners.amax(axes)
    # Entries of no sample must not count as the smallest.
    smallest = owners.masked_fill(owners < 0, owners.amax() + 1).amin(axes)
    return bool((largest > smallest).any())


def _trial(like: Tensor) -> Tensor:
    entries = torch.arange(1.0, like.numel() + 1, dtype=torch.float64)
    # Cosines of squares: no linear structure has them in its kernel, and none is large.
    return torch.cos(entries * entries).to(like.device, like.dtype).reshape(like.shape)
