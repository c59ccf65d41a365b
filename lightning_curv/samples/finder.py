r"""The samples: their number N, and the sample that owns each row of every recorded op's output and of every loss call.

N comes from the user's batch: ``batch_size``, else the leading axis of what the network reads
first. The graph verifies it, it never chooses: columns whose samples are weighted differently are
backpropagated from the top of the loss, and the weight that arrives at a row is that of its owner.
A row where weights mix belongs to several samples: either they influence each other, which is
refused, or the row depends on no sample (a table of positions), and its parameters get their
gradients where the row meets the samples (`joins`).

What was verified is remembered only where it cannot depend on values: see `verified`.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.utils.weak import WeakIdKeyDictionary

from lightning_curv.errors import SampleCountError, UnsupportedError, describe, names_of
from lightning_curv.graph.heads import LINEAR, Head, find_heads, frontier, name_of
from lightning_curv.graph.joins import Join, node_of
from lightning_curv.graph.tape import Tape, leaf_of, nodes_below
from lightning_curv.passes.owned import Samples
from lightning_curv.recording.provenance import Roots, roots_of
from lightning_curv.recording.records import (
    CONSTANT,
    PURE,
    Mapped,
    Operand,
    Use,
    edge_of,
    marks,
    shape_at,
)
from lightning_curv.rules.fallback import FallbackWarning
from lightning_curv.samples.batch import Batch, sample_axes
from lightning_curv.samples.coupling import Undecided, differ, separable
from lightning_curv.samples.meeting import Mixed, find_joins, reads_unknown
from lightning_curv.samples.probing import Finding, Place, Probe, forward_owners
from lightning_curv.samples.rowwise import samples_cannot_meet
from lightning_curv.samples.verified import MEMORY, Found, structure_of
from lightning_curv.terms.owners import BatchAxis, Owners, RowOwners, batch_axes, owners_of

if TYPE_CHECKING:
    from lightning_curv.passes.passes import Passes


def whole_batch(tape: Tape) -> Samples:
    """The whole batch as one sample: for quantities that need none."""
    axes = {node: sample_axes(use) for node, use in tape.uses.items()}
    uses = {node: BatchAxis(1, axes[node][0] if axes[node] else 0) for node in tape.uses}
    return Samples(1, uses, {node: BatchAxis(1) for node in tape.losses})


def find_samples(
    passes: Passes,
    batch: Batch,
    independent: bool = True,
    check: bool = False,
    most: int | None = None,
    strict: bool = False,
) -> Samples:
    """Find N and the owners, and put the joins among the uses of the tape.

    Args:
        passes: The recorded graph.
        batch: What is known of the batch.
        independent: Whether samples must not influence each other.
        check: Verify this very graph, even if one of its structure was verified before.
        most: Quantities are those of at most so many of the samples, for the price that is warned
            of.
        strict: Whether samples must be apart to the last digits, not only up to rounding errors of
            larger numbers.

    Raises:
        UnsupportedError: N does not agree with the graph, or samples influence each other.
    """
    tape = passes.tape
    batch = batch.read_by(tape)
    batch = replace(batch, tape=tape)
    _demote(passes, batch)
    key = (batch.size, batch.expected, batch.given(tape), independent, strict, *structure_of(tape))
    found = None if check else MEMORY.recall(key, tape)
    if found is None:
        finder = _Finder(passes, batch, independent, most, strict)
        try:
            found = finder.found(batch.candidates(tape))
        except UnsupportedError:
            MEMORY.entries.pop(key, None)
            raise
        if not tape.routes and finder.conclusive and (found.apart or not strict):
            MEMORY.keep(key, tape, found)
    if independent:
        _refuse_pooled(tape, batch, found.samples.count)
    _put_joins(passes, found)
    return found.samples


def _refuse_pooled(tape: Tape, batch: Batch, count: int) -> None:
    """Raise if a parameter meets a statistic of the raw batch, or rows that were computed with one.

    Raises:
        UnsupportedError: One does.
    """
    read = [
        (use.name, roots)
        for use in tape.uses.values()
        for k, roots in use.roots.items()
        if k not in use.operands
    ]
    read += [(call.name, call.roots) for call in tape.losses.values()]
    read += [(op.name, op.roots) for op in tape.mapped]
    for name, roots in read:
        if count in roots.pooled and batch.holds(roots):
            raise UnsupportedError(
                "Per-sample quantities need samples that do not influence each other, but samples mix in what "
                f"`{name}` reads: a statistic over the {count} samples of the batch (a mean, a maximum, a sum of rows "
                "of several samples). Take it over the data set, beforehand."
            )


def _put_joins(passes: Passes, found: Found) -> None:
    """Put the joins among the uses of the tape, in the place of what is no use of its own."""
    tape, loss = passes.tape, passes.loss
    if not found.joins and not found.dropped and not tape.stray:
        return
    for node in found.dropped:
        del tape.uses[node]
    for join in found.joins:
        tape.uses[join] = join.use(loss.dtype, loss.device)
    tape.stray.clear()
    tape.__dict__.pop("parameters", None)


def _demote(passes: Passes, batch: Batch) -> None:
    """Operands that were computed from the batch are data."""
    tape = passes.tape

    def is_data(use: Use, roots: Roots, operand: Operand) -> bool:
        if not use.shape and use.inputs:
            return True  # a sum of losses
        return not roots.constant and batch.holds(roots)

    while steps := tape.demote(is_data):
        tape.follow(steps, passes.output)


_PRICED: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameters whose price was named


def _warn_of_price(slow: Sequence[tuple[Tensor, str]], count: int, most: int | None) -> None:
    """Once for every parameter."""
    if all(parameter in _PRICED for parameter, _ in slow):
        return
    _PRICED.update((parameter, None) for parameter, _ in slow)
    names = sorted(set(names_of([parameter for parameter, _ in slow])))
    some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    ops = ", ".join(sorted({op for _, op in slow})[:3])
    price = (
        f"the {count} samples"
        if most is None or most >= count
        else f"{most} of the {count} samples"
    )
    warnings.warn(
        f"Parameters {some} are used by ops without a rule for this use of them ({ops}): their quantities are exact "
        f"but slow, every column takes a pass through such an op for each of {price}. A rule for the op "
        "(`@lightning_curv.rule`) is the fast path; `CurvatureCallback(max_samples=)` logs estimates from fewer "
        "samples.",
        FallbackWarning,
        stacklevel=2,
    )


def _in_order(roots: Roots, count: int) -> bool:
    """Whether something has the rows of the batch in their order, several per sample perhaps, or depends on none."""
    several = [root for root in roots.tensors if root.ndim and len(root) > 1]
    if roots.numbers is None or not several:
        return not roots.data and not roots.routed and all(len(root) == count for root in several)
    numbers = roots.numbers.get(count)
    if numbers is None or roots.data:
        return False
    return (
        numbers.ndim > 0 and numbers.numel() == len(numbers) and _counts(numbers.flatten(), count)
    )


def _counts(numbers: Tensor, count: int) -> bool:
    """Whether the rows are those of the batch in their order, one or several per sample."""
    rows = len(numbers)
    expected = torch.arange(rows, device=numbers.device) // max(1, rows // max(1, count))
    return rows % max(1, count) == 0 and torch.equal(numbers.long(), expected)


def _agrees_with_target(head: Head, owners: RowOwners) -> bool:
    """Whether the targets of a loss call, if they are the batch's as they are, belong to the samples of its input."""
    target = None if head.call is None else head.call.arguments.get("target")
    if head.call is None or not isinstance(target, Tensor) or not target.ndim:
        return True
    as_they_are = len(target) == owners.count and _in_order(head.call.roots, owners.count)
    return not as_they_are or torch.equal(owners.index.cpu(), torch.arange(owners.count))


def _told_by_target(head: Head, count: int) -> Owners | None:
    """Who owns the rows of a head, as the targets of the loss call tell, whose rows were moved; ``None``: no such."""
    target = None if head.call is None else head.call.arguments.get("target")
    if (
        head.call is None
        or not isinstance(target, Tensor)
        or not target.ndim
        or len(head.like) != len(target)
    ):
        return None
    numbers = (head.call.roots.numbers or {}).get(count)
    if (
        numbers is None
        or not numbers.ndim
        or numbers.numel() != len(numbers)
        or len(numbers) != len(target)
    ):
        return None
    return owners_of(numbers.reshape(-1, *[1] * (head.like.ndim - 1)), head.like.shape, count)


def _top(heads: Sequence[Node]) -> Iterator[Node]:
    """Heads, and below those that add or multiply what they add or multiply."""
    stack, seen = [*heads], set[Node]()
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


def _single(use: Use, name: str) -> bool:
    """Whether an argument is a single number, which all samples share."""
    value = use.arguments.get(name)
    return isinstance(value, Tensor) and value.numel() == 1


def _groups(use: Use) -> Tensor | None:
    """For ops whose rule makes its own samples of ragged rows: which of them every row belongs to."""
    return None if use.rule.groups is None or not use.arguments else use.rule.groups(use.arguments)


def _by_group(use: Use, owners: Owners) -> Owners:
    """Who owns the samples of the rule, where they are not the rows.

    Raises:
        Mixed: One of them has several owners.
    """
    groups = _groups(use)
    if groups is None or not isinstance(owners, RowOwners):
        return owners
    groups, rows = groups.to(owners.index.device), owners.index
    found = rows.new_full((int(groups.max()) + 1 if len(groups) else 0,), -1)
    found = found.scatter_reduce(0, groups, rows, "amax")
    if bool(((rows >= 0) & (rows != found[groups])).any()):
        raise Mixed(f"in `{use.name}`")
    return RowOwners(owners.count, found)


def owner_of_rows(use: Use, owners: Owners) -> Tensor:
    """The sample that every entry of the output of a use belongs to; broadcasts against it."""
    groups = _groups(use)
    if groups is None or not isinstance(owners, RowOwners):
        return owners.owner(use.shape)
    return RowOwners(owners.count, owners.index[groups.to(owners.index.device)]).owner(use.shape)


def _refuse_other_rows(name: str, told: Owners, finding: Finding, shape: torch.Size) -> None:
    """Raise if rows of the output of an op belong to other samples than what it reads tells.

    Raises:
        Mixed: They do.
    """
    if finding.owners is not None and differ(told.owner(shape), finding.owners.owner(shape)):
        raise Mixed(
            f"in `{name}`, whose rows arrive at summands of the loss that belong to other samples"
        )


class _Finder:
    """One search for the samples of a graph."""

    def __init__(
        self,
        passes: Passes,
        batch: Batch,
        independent: bool,
        most: int | None = None,
        strict: bool = False,
    ) -> None:
        self.passes, self.tape, self.batch, self.independent = (
            passes,
            passes.tape,
            batch,
            independent,
        )
        self.most, self.strict = most, strict
        self.uses = {node: use for node, use in self.tape.uses.items() if use.operands}
        self.axes = {node: sample_axes(use) for node, use in self.uses.items()}
        self.heads = find_heads(self.tape, passes.loss)
        self.reason = ""
        self.conclusive = True
        self.silent: set[Node | Join] = set()  # where nothing arrives
        self._anchors: dict[tuple[Node | Join, int], Owners | None] = {}
        self.blind = any(reads_unknown(node, batch.holds) for node in self.tape.nodes)

    def found(self, counts: Sequence[int]) -> Found:
        """The samples for the first number that the graph agrees with.

        Raises:
            UnsupportedError: There is none, or more than one besides the default.
        """
        default, *others = counts
        self._refuse_penalties()
        if (found := self._attempt(default)) is not None:
            return found
        reason = self.reason
        agreeing = [
            found for count in others if count > 1 and (found := self._attempt(count)) is not None
        ]
        if len(agreeing) == 1:
            return agreeing[0]
        if agreeing:
            sizes = " and ".join(str(found.samples.count) for found in agreeing)
            raise UnsupportedError(
                f"Expected one number of samples that the graph agrees with, found {sizes} (the network reads "
                f"{default} rows first, which it does not agree with). Pass `batch_size=`."
            )
        if not self.independent and (samples := self._assumed(default)) is not None:
            return Found(samples, {}, [])
        self._refuse_scales()
        kind = UnsupportedError if self.batch.size is None else SampleCountError
        raise kind(self._message(default, reason))

    def _refuse_penalties(self) -> None:
        """Raise if a summand of the loss depends on parameters alone.

        Raises:
            UnsupportedError: There is one.
        """
        for head in self.heads:
            node, mark = head.edge.node, marks(head.edge.node)
            if isinstance(leaf_of(node), torch.nn.Parameter) or (
                mark is not None and mark.origin == PURE
            ):
                found = [
                    leaf for below in nodes_below(node) if (leaf := leaf_of(below)) is not None
                ]
                self._refuse_scales()
                raise UnsupportedError(
                    "Per-sample quantities need a loss that is a sum over samples, found a summand that depends on no "
                    f"sample: a penalty of parameter {describe(found[0])}. Leave penalties to the optimizer "
                    "(`weight_decay`)."
                )

    def _refuse_scales(self) -> None:
        """Raise if a parameter multiplies a loss whose samples were summed before.

        Raises:
            UnsupportedError: One does.
        """
        for node in _top([head.edge.node for head in self.heads if head.call is None]):
            factors = [after for after, _ in node.next_functions if after is not None]
            scales = [factor for factor in factors if _of_parameters(factor)]
            if name_of(node) in ("Div", "Mul") and scales and len(scales) < len(factors):
                parameter = next(
                    leaf for below in nodes_below(scales[0]) if (leaf := leaf_of(below)) is not None
                )
                raise UnsupportedError(
                    "Per-sample quantities need a loss that is a sum over samples, found parameter "
                    f"{describe(parameter)} that multiplies a loss whose samples were averaged before: what each of "
                    "them contributes to the parameter's gradient is gone. Multiply and add before averaging: "
                    '`(scale * F.cross_entropy(..., reduction="none") + penalty).mean()`.'
                )

    def _attempt(self, count: int) -> Found | None:
        """The samples if there are N of them; ``None``: the graph does not agree."""
        self.reason = ""
        agreeing: list[Found] = []
        first: list[tuple[Head, Owners]] = []
        for heads in self._assignments(count):
            try:
                agreeing.append(self._verified(heads, count))
                first = first or heads
            except Mixed as mixed:
                self.reason = self.reason or str(mixed)
                continue
            if count <= 1 or self._evident(heads, count):
                return agreeing[0]
        evident = agreeing and (self._evident(None, count) or self._told_inside(first, count))
        if len(agreeing) > 1 or (agreeing and not evident):
            self.reason = (
                "or not: the rows of the batch were moved before the first parameter, and several ways to assign them "
                "to samples agree with the graph"
            )
            return None
        return next(iter(agreeing), None)

    def _from_nothing(self) -> bool:
        """Whether the loss depends on nothing from outside: on points that recorded code has made, perhaps."""
        tape = self.tape
        read = [roots for use in self.uses.values() for roots in use.roots.values()] + [
            *tape.read.values()
        ]
        read += [call.roots for call in tape.losses.values()] + [op.roots for op in tape.mapped]
        return all(roots.constant for roots in (*read, *map(roots_of, tape.leaves)))

    def _told_inside(self, heads: Sequence[tuple[Head, Owners]], count: int) -> bool:
        """Whether rows of the batch that enter between ops without trainable parameters are where the weights arrive.

        Such as the inputs of a frozen network, beside a prompt.
        """
        read = [
            node
            for node, roots in self.tape.read.items()
            if self.batch.holds(roots) and _in_order(roots, count)
        ]
        edges = [
            GradientEdge(node, 0)
            for node in read
            if shape_at(GradientEdge(node, 0))[:1] == (count,)
        ]
        if not edges or count <= 1:
            return False
        found = Probe(self.passes, heads, count).findings(
            [Place.anywhere(edge, count) for edge in edges]
        )
        arrived = [finding.owners for finding in found if not finding.silent]
        return bool(arrived) and all(owners == BatchAxis(count) for owners in arrived)

    def _evident(self, heads: Sequence[tuple[Head, Owners]] | None, count: int) -> bool:
        """Whether it is plain which rows belong to which sample.

        It is where all that the network reads keeps the order of the batch, where the targets of
        every loss call do, or where a head has one row per sample and all others depend on the same
        rows. ``None``: wherever the heads are.
        """
        heads = [(head, BatchAxis(count)) for head in self.heads] if heads is None else heads
        if all(head.call is not None and _in_order(head.call.roots, count) for head, _ in heads):
            return True
        told = [(_told_by_target(head, count), owners, head.like.shape) for head, owners in heads]
        if all(
            target is not None and not differ(target.owner(s), owners.owner(s))
            for target, owners, s in told
        ):
            return True
        single = [
            isinstance(o, BatchAxis) and head.like.shape[o.axis] == count
            for head, o in heads
            if head.like.ndim
        ]
        if (
            heads
            and self.tape.mapped
            and all(self._told_by_map(op, count) is not None for op in self.tape.mapped)
        ):
            return True
        read = [
            [roots for name, roots in use.roots.items() if name not in use.operands]
            for use in self.uses.values()
        ]
        read += [[op.roots] for op in self.tape.mapped]
        if all(single) and not self.blind and self._from_nothing():
            return True
        known = not any(self._unknown_order(roots, count) for roots in read)
        if known and any(single) and self._linked([head for head, _ in heads]):
            return True
        outside = [  # last: to see whether a module holds a tensor takes long
            (node, use)
            for node, use in self.uses.items()
            if node not in self.silent
            and any(
                k not in use.operands and roots.tensors and self.batch.holds(roots)
                for k, roots in use.roots.items()
            )
        ]
        return (
            bool(outside)
            and not self.blind
            and all(self._anchor(n, use, count) is not None for n, use in outside)
        )

    def _unknown_order(self, read: Sequence[Roots], count: int) -> bool:
        """Whether all rows of the batch that an op reads were moved by something unknown."""
        unknown = [
            roots for roots in read if roots.numbers is not None and count not in roots.numbers
        ]
        known = [roots for roots in read if roots.numbers is None or count in roots.numbers]
        told = unknown and any(map(self.batch.holds, known))
        return not told and any(map(self.batch.holds, unknown))

    def _linked(self, heads: Sequence[Head]) -> bool:
        """Whether rows of all heads depend on rows of the same ops, so that they were compared with each other.

        Heads that depend on no parameter, such as targets that are differentiated, do not count
        beside others.
        """
        keys = {node_of(node) for node in self.uses}
        groups: list[set[Node]] = []
        for head in heads:
            nodes = [*nodes_below(head.edge.node)]
            if len(heads) > 1 and not any(
                isinstance(leaf_of(node), torch.nn.Parameter) for node in nodes
            ):
                continue
            below = {node for node in nodes if node in keys}
            apart = [group for group in groups if not group & below]
            groups = [*apart, below.union(*(group for group in groups if group & below))]
        return len(groups) == 1

    def _assignments(self, count: int) -> Iterator[list[tuple[Head, Owners]]]:
        """Who may own the rows of the heads, the likeliest first."""
        if count <= 1:
            yield [(head, BatchAxis(count)) for head in self.heads]
            return
        told = [
            (head, owners)
            for head in self.heads
            if (owners := _told_by_target(head, count)) is not None
        ]
        if len(told) == len(self.heads):
            yield told
        options = [(head, batch_axes(head.like.shape, head.axes, count)) for head in self.heads]
        if all(found for _, found in options):
            for i in range(max((len(found) for _, found in options), default=0)):
                yield [(head, found[min(i, len(found) - 1)]) for head, found in options]
        yield from self._from_inputs(count)
        yield from self._from_outputs(count)

    def _from_inputs(self, count: int) -> Iterator[list[tuple[Head, Owners]]]:
        """Rows of the heads in any order, as the network's inputs tell."""
        sources = [
            (Head(GradientEdge(node_of(node), use.output_nr), self._like(use)), anchor)
            for node, use in self.uses.items()
            if (anchor := self._anchor(node, use, count))
        ]
        sources += [
            (Head(op.edge, op.like), owners)
            for op in self.tape.mapped
            if (owners := self._told_by_map(op, count)) is not None
        ]
        heads = [head for head in self.heads if head.like.ndim]
        if not sources or len(heads) < len(self.heads):
            return
        found = forward_owners(self.passes, heads, sources, count)
        if found is not None and all(map(_agrees_with_target, heads, found)):
            yield list(zip(heads, found, strict=True))

    def _told_by_map(self, op: Mapped, count: int) -> Owners | None:
        """Where an op under ``vmap`` has its samples, as the rows that it reads tell; ``None``: they do not."""
        numbers = (op.roots.numbers or {}).get(count)
        return None if numbers is None else owners_of(numbers, op.like.shape, count)

    def _like(self, use: Use) -> Tensor:
        return torch.zeros((), dtype=use.dtype, device=self.passes.loss.device).expand(use.shape)

    def _from_outputs(self, count: int) -> Iterator[list[tuple[Head, Owners]]]:
        """The network's outputs instead of the heads, for losses that are no sum of anything with N rows.

        Heads that are inputs of known loss functions stay, if that does not agree all that have N
        rows.
        """
        rows = [
            head
            for head in self.heads
            if head.like.ndim and batch_axes(head.like.shape, head.axes, count)
        ]
        calls = [head for head in rows if head.call is not None]
        for kept in [calls, rows] if len(calls) < len(rows) < len(self.heads) else [calls]:
            yield from self._beside(kept, count)

    def _beside(self, kept: Sequence[Head], count: int) -> Iterator[list[tuple[Head, Owners]]]:
        """Some heads as they are, and outputs of the network instead of the others."""
        unknown = [head for head in self.heads if head not in kept]
        if not unknown:
            return
        below = [head for head in frontier(self.tape, unknown, self.passes.loss) if head.like.ndim]
        options = [batch_axes(head.like.shape, self._axes_of(head), count) for head in below]
        calls = [batch_axes(head.like.shape, head.axes, count) for head in kept]
        if not below or not all(options) or not all(calls):
            return
        for i in range(max(map(len, options))):
            picked = [found[min(i, len(found) - 1)] for found in options]
            outputs: list[tuple[Head, Owners]] = list(zip(below, picked, strict=True))
            try:
                apart = separable(self.passes, unknown, outputs)
            except Undecided as error:
                self.reason = f"in the loss, which cannot be looked into: {error}"
                return
            if apart:
                yield [
                    *((head, found[0]) for head, found in zip(kept, calls, strict=True)),
                    *outputs,
                ]
            else:
                self.reason = "in the loss, above the outputs of the network"

    def _axes_of(self, output: Head) -> list[int]:
        return self.axes.get(output.edge.node) or list(range(output.like.ndim))

    def _anchor(self, node: Node | Join, use: Use, count: int) -> Owners | None:
        """Where a use has its samples, as the rows of the batch that it reads tell; ``None``: they do not."""
        if (node, count) not in self._anchors:
            self._anchors[node, count] = self._told_by_rows(node, use, count)
        return self._anchors[node, count]

    def _told_by_rows(self, node: Node | Join, use: Use, count: int) -> Owners | None:
        if _groups(use) is not None:
            return None
        for name, roots in use.roots.items():
            shape = use.shapes.get(name)
            constant = self.batch.tensors is not None and not self.batch.holds(roots)
            if name in use.operands or not shape or not roots.tensors or constant:
                continue
            numbers = (roots.numbers or {}).get(count)
            found = (
                self._in_order(node, use, shape, roots, count)
                if numbers is None
                else self._numbered(node, use, shape, numbers, count)
            )
            if found is not None:
                return found
        return None

    def _in_order(
        self, node: Node | Join, use: Use, shape: torch.Size, roots: Roots, count: int
    ) -> BatchAxis | None:
        """The first axis, if the rows of the batch are on it; else the first axis of N of a tensor read as it is."""
        rows = len(use.shape) > 0 and shape[0] == use.shape[0]
        if (
            rows
            and count
            and use.shape[0] % count == 0
            and 0 in self.axes[node]
            and _in_order(roots, count)
        ):
            return BatchAxis(count)
        as_it_is = (
            [root.shape for root in roots.tensors] == [tuple(shape)]
            and not roots.data
            and not roots.routed
        )
        axis = shape.index(count) if as_it_is and count in shape else 0
        if axis and axis in self.axes[node] and use.shape[axis : axis + 1] == (count,):
            return BatchAxis(count, axis)
        return None

    def _numbered(
        self, node: Node | Join, use: Use, shape: torch.Size, numbers: Tensor, count: int
    ) -> Owners | None:
        """The same axes as in what it reads, if all are among its own; or all of it, if it reads one sample only."""
        owners = owners_of(numbers, shape, count)
        axes = (owners.axis,) if isinstance(owners, BatchAxis) else owners.axes
        if all(axis in self.axes[node] and use.shape[axis] == shape[axis] for axis in axes):
            return owners
        return owners_of(numbers.flatten(), use.shape, count) if numbers.numel() == 1 else None

    def _verified(self, heads: Sequence[tuple[Head, Owners]], count: int) -> Found:
        """The owners everywhere.

        Raises:
            Mixed: The graph does not agree.
        """
        probe = Probe(self.passes, heads, count, self.strict)
        nodes = list(self.uses)
        places = [self._place(node, self.uses[node], count) for node in nodes]
        own = {head.edge[:2] for head, _ in heads}
        calls = {node: call for node, call in self.tape.losses.items() if call.input[:2] not in own}
        for call in calls.values():
            head = Head(call.input, call.arguments["input"], call)
            axes = batch_axes(head.like.shape, head.axes, count)
            places.append(Place(call.input, head.like.shape, axes, [(axis,) for axis in head.axes]))
        told = [
            (op, said)
            for op in self.tape.mapped
            if (said := self._told_by_map(op, count)) is not None
        ]
        places += [Place.anywhere(op.edge, count) for op, _ in told]
        findings = probe.findings(places)
        findings, of_mapped = (
            findings[: len(places) - len(told)],
            findings[len(places) - len(told) :],
        )
        for (op, expected), finding in zip(told, of_mapped, strict=True):
            if not finding.silent:  # as what is above the heads
                _refuse_other_rows(op.name, expected, finding, op.like.shape)
        self.silent = {
            node for node, finding in zip(nodes, findings, strict=False) if finding.silent
        }
        uses, losses = (
            dict(zip(nodes, findings, strict=False)),
            dict(zip(calls, findings[len(nodes) :], strict=True)),
        )
        if (
            self.independent
            and (node := next((n for n, f in losses.items() if f.mixed), None)) is not None
        ):
            raise Mixed(f"in the input of `{calls[node].name}`")
        self._refuse_undefined(uses)
        joins, dropped = self._joins(heads, uses, probe, count)
        self.conclusive = self.conclusive and probe.conclusive
        by_edge = {head.edge[:2]: owners for head, owners in heads}
        owners: dict[Node | Join, Owners] = {}
        for key, finding in uses.items():
            self._refuse_other_order(key, finding, count)
            if key not in dropped:
                assert finding.owners is not None
                owners[key] = _by_group(self.uses[key], finding.owners)
        found = {
            node: by_edge.get(call.input[:2]) or losses[node].owners
            for node, call in self.tape.losses.items()
        }
        found |= self._above(
            heads, [node for node, finding in losses.items() if not finding.reached], count
        )
        placed = {node: found_owners or BatchAxis(count) for node, found_owners in found.items()}
        owners.update(joins.items())
        apart = (
            self.strict
            and not joins
            and not dropped
            and samples_cannot_meet(self.tape, heads, owners)
        )
        return Found(Samples(count, owners, placed), joins, dropped, apart)

    def _refuse_undefined(self, found: Mapping[Node | Join, Finding]) -> None:
        """Raise if it cannot be told whose numbers are not finite: nothing arrives that would tell the samples apart.

        Raises:
            Mixed: There are such.
        """
        for node, finding in found.items():
            read = self.uses[node].arguments.values() if self.strict and finding.options else ()
            if any(
                isinstance(v, Tensor) and v.is_floating_point() and not bool(v.isfinite().all())
                for v in read
            ):
                raise Mixed(
                    f"or not: what `{self.uses[node].name}` reads is not finite, and whose it is cannot be told"
                )

    def _refuse_other_order(self, node: Node | Join, finding: Finding, count: int) -> None:
        """Raise if rows of a use belong to other samples than the rows of the batch that it reads.

        Raises:
            Mixed: They do.
        """
        use = self.uses[node]
        anchor = self._anchor(node, use, count)
        if isinstance(anchor, RowOwners):
            _refuse_other_rows(use.name, anchor, finding, use.shape)

    def _above(
        self, heads: Sequence[tuple[Head, Owners]], calls: Sequence[Node], count: int
    ) -> dict[Node, Owners]:
        """Who owns the rows of loss calls that are functions of the heads, instead of the other way round.

        Raises:
            Mixed: A row of theirs has several owners.
        """
        if not calls or count <= 1:
            return {}
        records = [self.tape.losses[node] for node in calls]
        inputs = [Head(call.input, call.arguments["input"], call) for call in records]
        found = forward_owners(self.passes, inputs, heads, count)
        if (
            found is None
            and self.passes.output is not None
            and all(len(head.like) == count for head in inputs)
        ):
            return {
                node: BatchAxis(count) for node in calls
            }  # beside `output=`, whose leading axis holds the samples
        if found is None:
            raise Mixed(f"in the input of `{records[0].name}`")
        return dict(zip(calls, found, strict=True))

    def _place(self, node: Node | Join, use: Use, count: int) -> Place:
        edge, allowed = GradientEdge(node_of(node), use.output_nr), self.axes[node]
        axes = batch_axes(use.shape, allowed, count, rows=False) if allowed else []
        if isinstance(anchor := self._anchor(node, use, count), BatchAxis):
            # 16 rows of 4 features may be 4 graphs, or 16 steps of 4 sequences: the weights tell
            ambiguous = anchor.axis > 0 and use.shape[0] % count == 0
            others = [axis for axis in axes if ambiguous and axis != anchor]
            return Place(edge, use.shape, [anchor, *others], [])
        rows: list[tuple[int, ...]] = [(axis,) for axis in allowed]
        lead = next((k for k, axis in enumerate(allowed) if axis != k), len(allowed))
        rows += [tuple(range(k)) for k in range(2, min(lead, len(use.shape) - 1) + 1)]
        if _groups(use) is not None:
            return Place(edge, use.shape, [], [(0,)])
        return Place(edge, use.shape, axes, rows if use.rule.outputs is None else [])

    def _joins(
        self,
        heads: Sequence[tuple[Head, Owners]],
        uses: Mapping[Node | Join, Finding],
        probe: Probe,
        count: int,
    ) -> tuple[dict[Join, Owners], list[Node]]:
        """Where what depends on no sample meets the samples, and the ops that are no uses of their own then."""
        unplaced = [
            node
            for node, finding in uses.items()
            if finding.mixed or not self._has_rule(node, finding)
        ]
        strays = dict.fromkeys(edge_of(parameter).node for parameter, _ in self.tape.stray)
        slow = [(parameter, op) for parameter, op in self.tape.stray]
        if not unplaced and not strays:
            return {}, []
        here: dict[Join, Owners] = {}
        mixed: list[Node] = []
        anywhere = [
            Place.anywhere(GradientEdge(node_of(n), self.uses[n].output_nr), count)
            for n in unplaced
        ]
        for node, finding in zip(unplaced, probe.findings(anywhere), strict=True):
            use = self.uses[node]
            if finding.owners is not None:
                self._refuse_inner_mixing(use, uses[node], probe, count)
                direct = {after[:2] for after in node_of(node).next_functions}
                slow += [(parameter, use.name) for parameter in self.tape.parameters[node]]
                for operand in use.operands.values():
                    join = Join(
                        node_of(node),
                        use.output_nr,
                        operand.edge,
                        None if operand.edge[:2] in direct else use,
                    )
                    here[join] = finding.owners
                continue
            if any(
                self.batch.holds(roots) and not _single(use, name)
                for name, roots in use.roots.items()
            ):
                raise Mixed(
                    f"in what is computed from the output of `{use.name}` (if its input is the same for all samples, "
                    "let the module hold it as a buffer)"
                )
            mixed.append(node_of(node))
        if mixed or strays:
            here |= find_joins(
                self.tape, [head for head, _ in heads], mixed, strays, probe, self.batch.holds
            )
        if slow:
            _warn_of_price(slow, count, self.most)
        return here, [node_of(node) for node in unplaced]

    def _refuse_inner_mixing(self, use: Use, by_rule: Finding, probe: Probe, count: int) -> None:
        """Raise if an op may mix the samples that its outputs keep apart: they lie on axes that its rule excludes.

        Raises:
            Mixed: Its inputs mix samples, or tell nothing.
        """
        excluded = by_rule.mixed and bool(sample_axes(use))
        places = [Place.anywhere(edge, count) for edge in use.inputs.values()]
        findings = probe.findings(places) if excluded or not use.rule.slots else []
        if any(finding.mixed for finding in findings) or (excluded and not findings):
            raise Mixed(f"in `{use.name}`")

    def _has_rule(self, node: Node | Join, finding: Finding) -> bool:
        """Whether the rule of a use can be applied; those of single ops always can."""
        use = self.uses[node]
        if not self.axes[node] or finding.owners is None:
            return False
        if use.rule.slots:
            return True
        owned = owner_of_rows(use, finding.owners) >= 0
        column = owned.to(self.passes.loss.device, use.dtype).expand(1, *use.shape)
        from lightning_curv.passes.passes import terms_of_rule

        try:
            terms_of_rule(use, finding.owners, column)
        except NotImplementedError:
            return False
        return True

    def _assumed(self, count: int) -> Samples | None:
        """Owners by shapes alone, for quantities that take coupled samples as they are."""
        uses = {
            n: batch_axes(u.shape, self.axes[n], count, rows=False)
            for n, u in self.uses.items()
            if self.axes[n]
        }
        heads = {
            node: batch_axes(
                call.arguments["input"].shape, [0] if call.arguments["input"].ndim else [], count
            )
            for node, call in self.tape.losses.items()
        }
        if (
            self.tape.stray
            or len(uses) < len(self.uses)
            or not all(uses.values())
            or not all(heads.values())
        ):
            return None
        return Samples(
            count, {n: found[0] for n, found in uses.items()}, {n: h[0] for n, h in heads.items()}
        )

    def _message(self, count: int, reason: str) -> str:
        shapes = Counter(f"{use.name}: {tuple(use.shape)}" for use in self.uses.values())
        some = ", ".join(shape for shape, _ in shapes.most_common(4))
        where = (
            f"samples mix {reason}"
            if reason
            else "no axis of the loss or of the network's outputs has them"
        )
        known = "`batch_size` says" if self.batch.size is not None else "The batch has"
        return (
            f"Per-sample quantities need samples that do not influence each other. {known} {count} samples, but "
            f"{where} (ops with parameters: {some}). {self._way_out(reason)}"
        )

    def _way_out(self, reason: str) -> str:
        if self.tape.stray:
            # stray parameters may have been used before recording began
            parameter, op = self.tape.stray[0]
            return (
                f"Parameter {describe(parameter)} is used by `{op}`, which was not recorded: if the forward pass ran "
                "outside of `curvature(...)`, run it inside or `extend` the model. Else pass `batch_size=`."
            )
        if self.batch.size is None:
            return (
                "Pass `batch_size=` if their number is another one. Statistics over the batch, contrastive losses and "
                "penalties of batch means have no per-sample gradients: use quantities that need no samples (`HMP`, "
                "`GGNMP`), or evaluation mode for BatchNorm."
            )
        return (
            "Statistics over the batch, contrastive losses and penalties of batch means have no per-sample gradients: "
            "use quantities that need no samples (`HMP`, `GGNMP`), or evaluation mode for BatchNorm."
        )
