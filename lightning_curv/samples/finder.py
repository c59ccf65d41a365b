r"""The samples: their number N, and the sample that owns each row of every op and loss call.

N comes from the user's batch: `batch_size`, else the leading axis of what the network reads
first. The graph verifies it, it never chooses: columns whose samples are weighted differently are
backpropagated from the top of the loss, and the weight that arrives at a row is that of its owner.
A row where weights mix belongs to several samples: either they influence each other, which is
refused, or the row depends on no sample (a table of positions), and its parameters get their
gradients where the row meets the samples (`joins`).

What was verified is remembered only where it cannot depend on values: see `verified`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lightning_curv.errors import SampleCountError, UnsupportedError
from lightning_curv.graph.tape import Tape
from lightning_curv.passes.owned import Samples
from lightning_curv.recording.provenance import Roots
from lightning_curv.recording.records import Operand, Use
from lightning_curv.samples.assignments import assignments
from lightning_curv.samples.batch import Batch, sample_axes
from lightning_curv.samples.evidence import evident, order_inside, order_known
from lightning_curv.samples.meeting import Mixed
from lightning_curv.samples.refusals import (
    message,
    refuse_penalties,
    refuse_pooled,
    refuse_scales,
)
from lightning_curv.samples.search import Search
from lightning_curv.samples.verification import verified
from lightning_curv.samples.verified import MEMORY, Found, structure_of
from lightning_curv.terms.owners import BatchAxis, batch_axes

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
    given: tuple[bool, ...] = ()
    if batch.tensors is not None:
        batch = batch.read_by(tape)
    if tape.derived:
        batch = batch.of(tape)
        _demote(passes, batch)
    if batch.tensors is not None:
        given = batch.given(tape)
    key = (batch.size, batch.expected, given, independent, strict, *structure_of(tape))
    found = None if check else MEMORY.recall(key, tape)
    if found is None:
        if batch.tape is not tape:
            batch = batch.of(tape)
        search = Search(passes, batch, independent, most, strict)
        try:
            found = _first_that_agrees(search, batch.candidates(tape))
        except UnsupportedError:
            MEMORY.entries.pop(key, None)
            raise
        by_values = strict or tape.routes or tape.gates or not search.told_of_all
        if search.conclusive and (found.apart or not by_values):
            MEMORY.keep(key, tape, found)
    if independent:
        refuse_pooled(tape, batch, found.samples.count)
    # Most graphs have nothing of the kind.
    if found.joins or found.dropped or tape.stray:
        _put_joins(passes, found)
    return found.samples


def _demote(passes: Passes, batch: Batch) -> None:
    """Operands that were computed from the batch are data."""
    tape = passes.tape

    def is_data(use: Use, roots: Roots, operand: Operand) -> bool:
        if not use.shape and use.inputs:
            return True  # a sum of losses
        return not roots.constant and batch.holds(roots)

    while steps := tape.demote(is_data):
        tape.follow(steps, passes.output)


def _first_that_agrees(search: Search, counts: Sequence[int]) -> Found:
    """The samples for the first number that the graph agrees with.

    Raises:
        UnsupportedError: There is none, or more than one besides the default.
    """
    default, *others = counts
    refuse_penalties(search)
    if (found := _attempt(search, default)) is not None:
        return found
    reason = search.reason
    batch, agreeing = search.batch, []
    for count in others:
        # A table of as many rows as the default number is none of the batch if N is another one.
        search.batch = replace(batch, tried=count)
        if count > 1 and (found := _attempt(search, count)) is not None:
            agreeing.append(found)
    search.batch = batch
    if len(agreeing) == 1:
        return agreeing[0]
    if agreeing:
        sizes = " and ".join(str(found.samples.count) for found in agreeing)
        raise UnsupportedError(
            f"Expected one number of samples that the graph agrees with, found {sizes} (the "
            f"network reads {default} rows first, which it does not agree with). Pass "
            "`batch_size=`."
        )
    if not search.independent and (samples := _assumed(search, default)) is not None:
        return Found(samples, {}, [], assumed=True)
    refuse_scales(search)
    if search.batch.size is None:
        kind = UnsupportedError
    else:
        kind = SampleCountError
    raise kind(message(search, default, reason))


def _attempt(search: Search, count: int) -> Found | None:
    """The samples if there are N of them; `None`: the graph does not agree."""
    search.reason = ""
    agreeing: list[tuple[Found, bool]] = []
    for heads in assignments(search, count):
        try:
            # Two passes through the network per assignment; most graphs take one.
            found = verified(search, heads, count)
        except Mixed as mixed:
            search.reason = search.reason or str(mixed)
            continue
        plain = count <= 1 or evident(search, heads, count)
        # Rows that are in order wherever they are read need no other witness.
        if plain and all(isinstance(owners, BatchAxis) for _, owners in heads):
            return found
        in_order = order_inside(search, heads, count)
        if in_order is False:
            search.reason = search.reason or (
                "where rows of the batch meet those of the network: they arrive at summands of the "
                "loss that belong to other samples"
            )
            continue
        # Several assignments may agree with the weights: only a plain one may be taken at once.
        if plain:
            return found
        agreeing.append((found, bool(in_order)))
    # What agrees is not plain by itself: what moves no rows anywhere makes it so, …
    if len(agreeing) == 1 and evident(search, None, count):
        return agreeing[0][0]
    # … and so do rows of the batch that enter further up, which only one of them has in order. What
    # tells one of several from the others must not stand beside rows that were moved unseen.
    told = [found for found, in_order in agreeing if in_order]
    if len(told) == 1 and (len(agreeing) == 1 or order_known(search, count)):
        return told[0]
    if agreeing:
        search.reason = (
            "or not: the rows of the batch were moved before the first parameter, and several ways "
            "to assign them to samples agree with the graph"
        )
    return None


def _assumed(search: Search, count: int) -> Samples | None:
    """Owners by shapes alone, for quantities that take coupled samples as they are."""
    uses = {
        n: batch_axes(u.shape, search.axes[n], count, rows=False)
        for n, u in search.uses.items()
        if search.axes[n]
    }
    heads = {
        node: batch_axes(
            call.arguments["input"].shape,
            [0] if call.arguments["input"].ndim else [],
            count,
        )
        for node, call in search.tape.losses.items()
    }
    if (
        search.tape.stray
        or len(uses) < len(search.uses)
        or not all(uses.values())
        or not all(heads.values())
    ):
        return None
    return Samples(
        count,
        {n: options[0] for n, options in uses.items()},
        {n: h[0] for n, h in heads.items()},
    )


def _put_joins(passes: Passes, found: Found) -> None:
    """Put the joins among the uses of the tape, in the place of what is no use of its own."""
    tape = passes.tape
    loss = passes.loss
    # Their rules cannot be applied, and their parameters act at joins instead.
    for node in found.dropped:
        del tape.uses[node]
    for join in found.joins:
        tape.uses[join] = join.use(loss.dtype, loss.device)
    # All of them have joins now.
    tape.stray.clear()
    tape.forget_parameters()
