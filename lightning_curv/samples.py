r"""Where the samples are: the axis of every recorded op's output that carries them.

The axis is read off the shapes where they leave one choice. Where they leave several (sequence-first tensors, rows
``[N·T, ...]`` flattened from sequences, equal sizes) the graph itself decides: a column that is non-zero for one sample
only, backpropagated from the loss, must stay within that sample at every op. Nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lightning_curv.errors import UnsupportedError, describe
from lightning_curv.graph import Tape, leaves
from lightning_curv.records import LossCall, Use
from lightning_curv.rules import Call


@dataclass(frozen=True)
class Place:
    """The position of the samples in a tensor.

    Attributes:
        axis: The axis; its size is N or a multiple of it (rows of several positions per sample).
        minor: Whether the sample is the inner index of the rows.
    """

    axis: int = 0
    minor: bool = False

    def owner(self, shape: Sequence[int], samples: int) -> Tensor:
        """The sample that every entry of a tensor belongs to; broadcasts against it."""
        if not len(shape):
            return torch.zeros(())
        rows = torch.arange(shape[self.axis])
        index = rows % samples if self.minor else rows // max(1, shape[self.axis] // max(1, samples))
        return index.reshape(-1, *[1] * (len(shape) - self.axis - 1))

    def split(self, tensor: Tensor, samples: int) -> Tensor:
        """The entries of every sample, ``[N, E]``."""
        rows = tensor.movedim(self.axis, 0) if tensor.ndim else tensor[None]
        if self.minor:
            rows = rows.unflatten(0, (-1, samples)).transpose(0, 1)
        return rows.reshape(samples, -1)

    def join(self, entries: Tensor, shape: Sequence[int]) -> Tensor:
        """The tensor of this shape whose `split` are ``entries``."""
        if not len(shape):
            return entries.reshape(())
        rest = [size for axis, size in enumerate(shape) if axis != self.axis]
        rows = entries.reshape(len(entries), -1, *rest)
        rows = (rows.transpose(0, 1) if self.minor else rows).reshape(shape[self.axis], *rest)
        return rows.movedim(0, self.axis)


@dataclass(frozen=True)
class Samples:
    """N and the place of the samples in the output of every use and in the input of every loss call."""

    count: int
    uses: Mapping[Node, Place]
    losses: Mapping[Node, Place]


Probe = Callable[[Node, Tensor], Sequence[Tensor | None]]  # backpropagate a column from a loss call to all uses


def find_samples(tape: Tape, probe: Probe, batch_size: int | None = None, check: bool = False) -> Samples:
    """Find N and the places.

    Args:
        tape: The recorded graph.
        probe: Backpropagates a column from the input of a loss call to the uses, in their order on the tape.
        batch_size: N, where the caller knows it.
        check: Probe even where the shapes leave one choice only.

    Raises:
        UnsupportedError: No choice is consistent with the graph, or a choice cannot be verified.
    """
    uses = {node: use for node, use in tape.uses.items() if use.operands}
    axes = {node: _axes(use) for node, use in uses.items()}
    rows = [_rows(call) for call in tape.losses.values()]
    sizes = [use.shape[axes[node][0]] for node, use in uses.items()] + rows
    found: list[Samples] = []
    # N = 1 agrees with every graph: it is considered only where a loss call has one row, or everything has
    candidates = {size for size in sizes if size != 1 or size in rows} or {1}
    for count in [batch_size] if batch_size is not None else sorted(candidates):
        choices = {node: list(_places(use.shape, axes[node], count)) for node, use in uses.items()}
        heads = {node: list(_places((_rows(call),), [0], count)) for node, call in tape.losses.items()}
        if not all(choices.values()) or not all(heads.values()):
            continue
        sure = all(len(c) == 1 for c in [*choices.values(), *heads.values()])
        first = Samples(count, {n: c[0] for n, c in choices.items()}, {n: c[0] for n, c in heads.items()})
        if sure and (batch_size is not None or len(set(sizes)) == 1) and not (check and tape.losses):
            return first
        if not tape.losses:
            found.append(first)
            continue
        if (verified := _verify(tape, uses, choices, heads, count, probe)) is not None:
            return verified
    if len(found) == 1:
        return found[0]
    raise UnsupportedError(_message(uses, sizes, batch_size, bool(tape.losses)))


def _axes(use: Use) -> list[int]:
    axes = list(use.rule.axes(Call(use.shape, tuple(use.operands)), use.arguments))
    if not axes:
        parameter = describe(leaves(next(iter(use.operands.values())).edge)[0])
        raise UnsupportedError(
            f"`{use.name}` uses parameter {parameter}, but no axis of its output of shape {tuple(use.shape)} can "
            "carry samples: "
            "it is an unbatched call or lies outside of the network (a weight penalty in the loss?). "
            "Add the batch axis; leave penalties to the optimizer (`weight_decay`)."
        )
    return axes


def _rows(call: LossCall) -> int:
    shape = call.arguments["input"].shape
    return int(shape[0]) if shape else 1


def _places(shape: Sequence[int], axes: Sequence[int], count: int) -> Iterator[Place]:
    """All places that N samples may have in a tensor; an axis of exactly N entries excludes flattened ones."""
    exact = [axis for axis in axes if shape[axis] == count]
    if exact:
        yield from (Place(axis) for axis in exact)
    elif shape[axes[0]] % max(count, 1) == 0:
        yield from (Place(axes[0], minor) for minor in (False, True)[: 2 if count > 1 else 1])


def place_of(first: Tensor, second: Tensor, count: int) -> Place:
    """The place of the samples in a tensor, from two cotangents: sample n of ``second`` is n times that of ``first``.

    Raises:
        UnsupportedError: There is none: samples mix.
    """
    tolerance = 1e3 * torch.finfo(first.dtype).eps * max(1, count) * float(first.abs().max() if first.numel() else 0)
    axes = [axis for axis, size in enumerate(first.shape) if size == count]
    choices = [Place(axis) for axis in axes or [0]]
    choices += [
        Place(axis, minor)
        for axis, size in enumerate(first.shape)
        if size % max(1, count) == 0
        for minor in (False, True)
    ]
    for place in choices:
        if bool(((second - first * place.owner(first.shape, count).to(first)).abs() <= tolerance).all()):
            return place
    raise UnsupportedError(
        f"Expected one axis with {count} samples in a tensor of shape {tuple(first.shape)}, found none that keeps them "
        "apart: an op mixes samples."
    )


def _verify(
    tape: Tape,
    uses: Mapping[Node, Use],
    choices: Mapping[Node, Sequence[Place]],
    heads: Mapping[Node, Sequence[Place]],
    count: int,
    probe: Probe,
) -> Samples | None:
    """The first combination of places that the graph's own dependencies agree with."""
    if count == 1:
        return Samples(count, {n: c[0] for n, c in choices.items()}, {n: c[0] for n, c in heads.items()})
    chosen = count // 2
    possible: dict[Node, list[Place]] = {node: list(places) for node, places in choices.items()}
    losses: dict[Node, Place] = {}
    for node, call in tape.losses.items():
        for head in heads[node]:
            remaining = _consistent(tape, call, node, head, possible, count, chosen, probe)
            if all(remaining.values()):
                possible, losses[node] = remaining, head
                break
        else:
            return None
    return Samples(count, {n: c[0] for n, c in possible.items()}, losses)


def _consistent(
    tape: Tape,
    call: LossCall,
    node: Node,
    head: Place,
    possible: Mapping[Node, Sequence[Place]],
    count: int,
    chosen: int,
    probe: Probe,
) -> dict[Node, list[Place]]:
    source = call.arguments["input"]
    mask = (head.owner(source.shape, count) == chosen).to(source.device)
    column = torch.linspace(1, 2, source.numel(), dtype=source.dtype, device=source.device).reshape(source.shape) * mask
    remaining = {}
    for (at, use), g in zip(tape.uses.items(), probe(node, column), strict=True):
        if at in possible:
            remaining[at] = [
                place for place in possible[at] if g is None or _within(g.reshape(use.shape), place, count, chosen)
            ]
    return remaining


def _within(g: Tensor, place: Place, count: int, chosen: int) -> bool:
    """Whether ``g`` is zero outside of the chosen sample."""
    return not bool((g * (place.owner(g.shape, count) != chosen).to(g.device)).any())


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
