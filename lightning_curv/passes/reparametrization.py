"""Parameters behind a transform: casts, transposes, slices, parametrizations.

The term of the transformed value becomes terms of the parameters it was computed from. Re-indexings
(views, transposes, slices, casts) keep its structure; every other transform is pulled back through
its own graph, densely.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_curv.graph.heads import saved_axis, saved_integer
from lightning_curv.graph.tape import leaves
from lightning_curv.rules.fallback import dense
from lightning_curv.terms.jacobian import Jacobian
from lightning_curv.terms.parameter_axes import permuted, uncut
from lightning_curv.terms.term import Term


def pulled_back(
    edge: GradientEdge,
    value: Tensor,
    term: Term,
) -> Iterator[tuple[Tensor, Term]]:
    """Terms of the leaves that `value` was computed from, given its own term.

    Args:
        edge: The value's place in the graph, which must not be freed yet.
        value: The value, detached.
        term: Its term. Unless the transform is a re-indexing, the result is dense:
            `[V, N, *leaf]` is held in memory.
    """
    if (reindexed := _reindexed(edge, term)) is not None:
        yield reindexed
        return
    jacobian = Jacobian(value, [term]).per_sample().to(value.dtype)
    parameters = leaves(edge)
    for parameter, pulled in zip(
        parameters,
        _pull(edge, parameters, jacobian.flatten(0, 1)),
        strict=True,
    ):
        if pulled is not None:
            yield parameter, dense(pulled.reshape(*jacobian.shape[:2], *parameter.shape))


def _pull(
    edge: GradientEdge,
    inputs: list[Tensor],
    cotangents: Tensor,
) -> list[Tensor | None]:
    """The transposed derivative of a transform, applied to every entry of the leading axis."""
    try:
        return list(
            torch.autograd.grad(
                edge,
                inputs,
                cotangents,
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=True,
            )
        )
    except RuntimeError:  # an op without a batching rule
        rows = [
            torch.autograd.grad(edge, inputs, c, retain_graph=True, allow_unused=True)
            for c in cotangents
        ]
        return [
            None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True)
        ]


def _reindexed(edge: GradientEdge, term: Term) -> tuple[Tensor, Term] | None:
    """The leaf behind a chain of re-indexings and its term; `None`: the chain has another op."""
    node: Any = edge.node
    number = edge.output_nr
    current = term
    while (leaf := getattr(node, "variable", None)) is None:
        step = STEPS.get(node.name())
        pulled = step(node, number, current) if step else None
        if pulled is None:
            return None
        current, (node, number) = pulled, node.next_functions[0]
    if leaf.device != term.g.device:
        return None
    dtype = torch.promote_types(leaf.dtype, torch.float32)
    if current.x is None or current.classes:
        x = current.x
    else:
        x = current.x.to(dtype)
    return leaf, replace(current, g=current.g.to(dtype), x=x)


def _same(node: Any, number: int, term: Term) -> Term:
    """Casts, and views that keep the order in memory: a term knows nothing else of the shape."""
    return term


def _transposed(node: Any, number: int, term: Term) -> Term | None:
    shape = node._input_metadata[number].shape
    source = list(range(len(shape)))
    if node.name() == "PermuteBackward0":
        source = [saved_axis(dim, len(shape)) for dim in node._saved_dims]
    elif len(shape) > 1:
        plain = node.name() == "TBackward0"
        if plain:
            a = 0
            b = 1
        else:
            a, b = (saved_axis(dim, len(shape)) for dim in (node._saved_dim0, node._saved_dim1))
        source[a], source[b] = source[b], source[a]
    return permuted(term, shape, source)


def _sliced(node: Any, number: int, term: Term) -> Term | None:
    sizes = node._saved_self_sym_sizes
    axis = saved_axis(node._saved_dim, len(sizes))
    index = torch.arange(sizes[axis], device=term.g.device)
    if node.name() == "SliceBackward0":
        index = index[
            saved_integer(node._saved_start) : saved_integer(node._saved_end) : node._saved_step
        ]
    elif node.name() == "SplitBackward0":
        index = index.split(node._saved_split_size)[number]
    else:
        index = index.split(list(node._saved_split_sizes))[number]
    return uncut(term, node._input_metadata[number].shape, axis, index, sizes[axis])


STEPS: dict[str, Callable[[Any, int, Term], Term | None]] = {
    **dict.fromkeys(("ToCopyBackward0", "CloneBackward0", "AliasBackward0"), _same),
    **dict.fromkeys(("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"), _same),
    **dict.fromkeys(("UnsqueezeBackward0", "SqueezeBackward0", "SqueezeBackward1"), _same),
    **dict.fromkeys(("TBackward0", "TransposeBackward0", "PermuteBackward0"), _transposed),
    **dict.fromkeys(("SliceBackward0", "SplitBackward0", "SplitWithSizesBackward0"), _sliced),
}
