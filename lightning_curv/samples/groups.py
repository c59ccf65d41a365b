"""Ops whose rule makes samples of its own from ragged rows: which of them own which rows.

Packed sequences have the steps of a sequence in several rows, which the rule of a recurrence adds
up: it has a sample per sequence. Each of these must then belong to one sample of the batch.
"""

from __future__ import annotations

from torch import Tensor

from lightning_curv.recording.records import Use
from lightning_curv.samples.meeting import Mixed
from lightning_curv.terms.owners import Owners, RowOwners


def groups_of(use: Use) -> Tensor | None:
    """The sample of the rule that every row belongs to; `None`: it makes none of its own."""
    if use.rule.groups is None or not use.arguments:
        return None
    return use.rule.groups(use.arguments)


def by_group(use: Use, owners: Owners) -> Owners:
    """Who owns the samples of the rule, where they are not the rows.

    Raises:
        Mixed: One of them has several owners.
    """
    groups = groups_of(use)
    if groups is None or not isinstance(owners, RowOwners):
        return owners
    groups = groups.to(owners.index.device)
    rows = owners.index
    # The largest owner among the rows of a group; any other owner in it is then seen below.
    largest = rows.new_full((int(groups.max()) + 1 if len(groups) else 0,), -1)
    largest = largest.scatter_reduce(0, groups, rows, "amax")
    if bool(((rows >= 0) & (rows != largest[groups])).any()):
        raise Mixed(f"in `{use.name}`")
    return RowOwners(owners.count, largest)


def owner_of_rows(use: Use, owners: Owners) -> Tensor:
    """The sample that every entry of the output of a use belongs to; broadcasts against it."""
    groups = groups_of(use)
    if groups is None or not isinstance(owners, RowOwners):
        return owners.owner(use.shape)
    return RowOwners(owners.count, owners.index[groups.to(owners.index.device)]).owner(use.shape)
