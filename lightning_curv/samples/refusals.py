"""Losses that are no sum over samples, and what to say where the samples are not found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch.autograd.graph import Node

from lightning_curv.errors import UnsupportedError, describe
from lightning_curv.graph.heads import LINEAR, name_of
from lightning_curv.graph.tape import Tape, leaf_of, nodes_below
from lightning_curv.recording.provenance import Roots
from lightning_curv.recording.records import CONSTANT, PURE, LossCall, Mapped, Use, marks
from lightning_curv.samples.batch import Batch
from lightning_curv.samples.search import Search


def refuse_penalties(
    search: Search,
) -> None:
    """Raise if a summand of the loss depends on parameters alone.

    Raises:
        UnsupportedError: There is one.
    """
    for head in search.heads:
        node = head.edge.node
        mark = marks(head.edge.node)
        if isinstance(leaf_of(node), torch.nn.Parameter) or (
            mark is not None and mark.origin == PURE
        ):
            refuse_scales(search)
            leaves = (leaf_of(below) for below in nodes_below(node))
            penalized = next(leaf for leaf in leaves if leaf is not None)
            raise UnsupportedError(
                "Per-sample quantities need a loss that is a sum over samples, found a summand "
                f"that depends on no sample: a penalty of parameter {describe(penalized)}. Leave "
                "penalties to the optimizer (`weight_decay`)."
            )


def refuse_scales(
    search: Search,
) -> None:
    """Raise if a parameter multiplies a loss whose samples were summed before.

    Raises:
        UnsupportedError: One does.
    """
    for node in _top([head.edge.node for head in search.heads if head.call is None]):
        factors = [after for after, _ in node.next_functions if after is not None]
        scales = [factor for factor in factors if _of_parameters(factor)]
        if name_of(node) in ("Div", "Mul") and scales and len(scales) < len(factors):
            parameter = next(
                leaf for below in nodes_below(scales[0]) if (leaf := leaf_of(below)) is not None
            )
            raise UnsupportedError(
                "Per-sample quantities need a loss that is a sum over samples, found parameter "
                f"{describe(parameter)} that multiplies a loss whose samples were averaged before: "
                "what each of them contributes to the parameter's gradient is gone. Multiply and "
                "add before averaging: "
                '`(scale * F.cross_entropy(..., reduction="none") + penalty).mean()`.'
            )


def refuse_pooled(tape: Tape, batch: Batch, count: int) -> None:
    """Raise if a parameter meets a statistic of the raw batch, or rows that were computed with one.

    Args:
        tape: The graph.
        batch: What is known of the batch.
        count: N, as it was found.

    Raises:
        UnsupportedError: One does.
    """
    read: list[tuple[Use | LossCall | Mapped, Roots]] = []
    for use in tape.uses.values():
        for name, roots in use.roots.items():
            if roots.pooled and name not in use.operands:
                read.append((use, roots))
    for call in tape.losses.values():
        if call.roots.pooled:
            read.append((call, call.roots))
    for mapped in tape.mapped:
        read.append((mapped, mapped.roots))
    for op, roots in read:
        if count in roots.pooled and replace(batch.of(tape), tried=count).holds(roots):
            raise UnsupportedError(
                "Per-sample quantities need samples that do not influence each other, but samples "
                f"mix in what `{op.name}` reads: a statistic over the {count} samples of the batch "
                "(a mean, a maximum, a sum of rows of several samples). Take it over the data set, "
                "beforehand."
            )


def message(search: Search, count: int, reason: str) -> str:
    """Say why the graph does not agree with N, and what to do."""
    shapes = Counter(f"{use.name}: {tuple(use.shape)}" for use in search.uses.values())
    some = ", ".join(shape for shape, _ in shapes.most_common(4))
    if reason:
        where = f"samples mix {reason}"
    else:
        where = "no axis of the loss or of the network's outputs has them"
    if search.batch.size is not None:
        known = "`batch_size` says"
    else:
        known = "The batch has"
    return (
        f"Per-sample quantities need samples that do not influence each other. {known} {count} "
        f"samples, but {where} (ops with parameters: {some}). {_way_out(search)}"
    )


def _way_out(search: Search) -> str:
    known = search.batch.size is not None
    if search.tape.stray:
        # stray parameters may have been used before recording began
        parameter, op = search.tape.stray[0]
        advice = (
            f"Parameter {describe(parameter)} is used by `{op}`, which was not recorded: if the "
            "forward pass ran outside of `curvature(...)`, run it inside or `extend` the model."
        )
        if search.uses:
            return (
                f"{advice} If it is the derivative of a recorded op, add up what the loss has of "
                "each sample before you average (`torch.zeros(N).index_add(0, sample, losses)`): "
                "that tells whose its rows are."
            )
        return advice if known else f"{advice} Else pass `batch_size=`."
    number = "" if known else "Pass `batch_size=` if their number is another one. "
    return (
        f"{_other_axis(search)}{number}Statistics over the batch, contrastive losses and penalties "
        "of batch means have no per-sample gradients: use quantities that need no samples (`HMP`, "
        "`GGNMP`), or evaluation mode for BatchNorm."
    )


def _other_axis(search: Search) -> str:
    """What to say of a batch that is as long along another axis: the first one was taken."""
    count = search.batch.size if search.batch.size is not None else search.batch.likely
    read = [
        root
        for use in search.uses.values()
        for roots in use.roots.values()
        for root in roots.tensors
    ]
    square = any(root.shape[:1] == (count,) and count in root.shape[1:-1] for root in read)
    if count <= 1 or not square:
        return ""
    return (
        f"What the network reads has {count} entries along another axis too: the first one is "
        "taken for that of the samples. If it is not, give the other one another length. "
    )


def _top(heads: Sequence[Node]) -> Iterator[Node]:
    """Heads, and below those that add or multiply what they add or multiply."""
    stack = [*heads]
    seen = set[Node]()
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            yield node
            if name_of(node) in LINEAR | {"Div", "Mul"}:
                stack += [after for after, _ in node.next_functions if after is not None]


def _of_parameters(node: Node) -> bool:
    """Whether a value was computed from parameters and constants alone."""
    mark = marks(node)
    return isinstance(leaf_of(node), torch.nn.Parameter) or (
        mark is not None and mark.origin in (PURE, CONSTANT)
    )
