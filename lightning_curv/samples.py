r"""The samples: their number N, and the axis of every recorded op's output that carries them.

The axis is read off the shapes where they leave one choice. Where they leave several (sequence-first tensors, rows
``[N·T, ...]`` flattened from sequences, equal sizes) the graph itself decides: columns whose samples are weighted
differently, backpropagated from the loss, must keep these weights at every op. The same pass shows that samples do not
influence each other. It is made once per structure of a graph; nothing is guessed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lightning_curv.errors import UnsupportedError, describe
from lightning_curv.graph import Tape, leaves
from lightning_curv.places import Place, consistent, largest_entry, places
from lightning_curv.records import LossCall, Use
from lightning_curv.rules import Call

Probe = Callable[[Node, Tensor], Sequence[Tensor | None]]  # backpropagate a column from a loss call to all uses
Choices = Mapping[Node, Sequence[Place]]

_VERIFIED: OrderedDict[Hashable, tuple[int, list[Place], list[Place]]] = OrderedDict()  # structures seen lately
_VERIFIED_SIZE = 256


@dataclass(frozen=True)
class Samples:
    """N and the place of the samples in the output of every use and in the input of every loss call.

    Attributes:
        conclusive: Whether what was found holds for all graphs of this structure; not so if entries were not finite.
    """

    count: int
    uses: Mapping[Node, Place]
    losses: Mapping[Node, Place]
    conclusive: bool = True


def find_samples(
    tape: Tape, probe: Probe, batch_size: int | None = None, independent: bool = True, check: bool = False
) -> Samples:
    """Find N and the places.

    Args:
        tape: The recorded graph.
        probe: Backpropagates a column from the input of a loss call to the uses, in their order on the tape.
        batch_size: N, where the caller knows it.
        independent: Whether samples must not influence each other.
        check: Verify this very graph, even if one of its structure was verified before.

    Raises:
        UnsupportedError: No choice is consistent with the graph, or a choice cannot be verified.
    """
    uses = {node: use for node, use in tape.uses.items() if use.operands}
    axes = {node: _axes(use) for node, use in uses.items()}
    key = (
        batch_size,
        tuple(tape.structure),
        tuple((use.shape, use.dtype) for use in uses.values()),
        tuple(map(_rows, tape.losses.values())),
    )
    if not check and (known := _VERIFIED.get(key)) is not None:
        return Samples(known[0], dict(zip(uses, known[1], strict=True)), dict(zip(tape.losses, known[2], strict=True)))
    sizes = [use.shape[axes[node][0]] for node, use in uses.items()] + [_rows(call) for call in tape.losses.values()]
    found, verified = None, False
    for count in _candidates(tape, sizes, batch_size):
        choices = {node: places(use.shape, axes[node], count) for node, use in uses.items()}
        heads = {node: places((_rows(call),), [0], count) for node, call in tape.losses.items()}
        if all(choices.values()) and all(heads.values()):
            sure = len({*sizes}) == 1 or batch_size is not None
            sure = sure and all(len(c) == 1 for c in [*choices.values(), *heads.values()])
            if count == 1 or not tape.losses or (sure and not independent):
                found = _first(count, choices, heads) if found is None else _ambiguous(uses, sizes, batch_size)
                if tape.losses:
                    break
            elif (found := _verified(tape, uses, choices, heads, count, probe)) is not None:
                verified = True
                break
    if found is None:
        raise UnsupportedError(_message(uses, sizes, batch_size, bool(tape.losses)))
    if (independent or verified) and found.conclusive:
        _VERIFIED[key] = found.count, list(found.uses.values()), list(found.losses.values())
        while len(_VERIFIED) > _VERIFIED_SIZE:
            _VERIFIED.popitem(last=False)
    return found


def _candidates(tape: Tape, sizes: Sequence[int], batch_size: int | None) -> list[int]:
    """Possible numbers of samples; 1 and 0 agree with every graph, so only where a loss call has it, or all have."""
    if batch_size is not None:
        return [batch_size]
    rows = [_rows(call) for call in tape.losses.values()]
    return sorted({size for size in sizes if size > 1 or size in rows} or {max(sizes, default=1)})


def _first(count: int, choices: Choices, heads: Choices) -> Samples:
    return Samples(count, {n: c[0] for n, c in choices.items()}, {n: c[0] for n, c in heads.items()})


def _ambiguous(uses: Mapping[Node, Use], sizes: Sequence[int], batch_size: int | None) -> Samples:
    raise UnsupportedError(_message(uses, sizes, batch_size, known_loss=False))


def _axes(use: Use) -> list[int]:
    axes = list(use.rule.axes(Call(use.shape, tuple(use.operands)), use.arguments))
    if not axes:
        parameter = describe(leaves(next(iter(use.operands.values())).edge)[0])
        raise UnsupportedError(
            f"`{use.name}` uses parameter {parameter}, but no axis of its output of shape {tuple(use.shape)} can "
            "carry samples: it is an unbatched call or lies outside of the network (a weight penalty in the loss?). "
            "Add the batch axis; leave penalties to the optimizer (`weight_decay`)."
        )
    return axes


def _rows(call: LossCall) -> int:
    shape = call.arguments["input"].shape
    return int(shape[0]) if shape else 1


def _verified(
    tape: Tape, uses: Mapping[Node, Use], choices: Choices, heads: Choices, count: int, probe: Probe
) -> Samples | None:
    """The first combination of places that the graph's own dependencies agree with."""
    possible: Choices = choices
    chosen: dict[Node, Place] = {}
    conclusive = True
    for node, call in tape.losses.items():
        like = call.arguments["input"]
        column = torch.linspace(1, 2, like.numel(), device=like.device).to(like.dtype).reshape(like.shape)
        plain = probe(node, column)
        conclusive = conclusive and all(g is None or bool(g.isfinite().all()) for g in plain)
        for head in heads[node]:
            weighted = probe(node, column * head.weights(like, count))
            left = _agreeing(tape, uses, possible, plain, weighted, count)
            if all(left.values()):
                possible, chosen[node] = left, head
                break
        else:
            return None
    return Samples(count, {node: c[0] for node, c in possible.items()}, chosen, conclusive)


def _agreeing(
    tape: Tape,
    uses: Mapping[Node, Use],
    possible: Choices,
    plain: Sequence[Tensor | None],
    weighted: Sequence[Tensor | None],
    count: int,
) -> Choices:
    left, scale, eps = dict(possible), largest_entry(plain), tape.eps
    for node, first, second in zip(tape.uses, plain, weighted, strict=True):
        if node in uses and first is not None and second is not None:
            shape = uses[node].shape
            left[node] = consistent(first.reshape(shape), second.reshape(shape), scale, eps, possible[node], count)
    return left


def _message(uses: Mapping[Node, Use], sizes: Sequence[int], batch_size: int | None, known_loss: bool) -> str:
    shapes = ", ".join(sorted({f"{use.name}: {tuple(use.shape)}" for use in uses.values()})[:6])
    wanted = (
        f"{batch_size} samples" if batch_size is not None else f"a number of samples (candidates {sorted(set(sizes))})"
    )
    reason = (
        "no choice keeps the samples apart: does an op mix them (statistics over the batch, a contrastive loss)?"
        if known_loss
        else "the loss is no recorded loss function, so the choice cannot be verified."
    )
    return (
        f"Expected one axis with {wanted} in the output of every op with parameters, found {shapes}; {reason} "
        "Pass `batch_size=` to `curvature`, keep the batch axis first, or use quantities that need no samples."
    )
