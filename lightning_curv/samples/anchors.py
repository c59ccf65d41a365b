"""What the rows of the batch that ops read, and the targets of losses, tell of the samples.

They are told by the numbers of the rows (`row_numbers`): no pass through the graph is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lightning_curv.graph.heads import Head
from lightning_curv.graph.joins import Join
from lightning_curv.recording.provenance import Roots
from lightning_curv.recording.records import Mapped, Use
from lightning_curv.samples.groups import groups_of
from lightning_curv.samples.search import Search
from lightning_curv.terms.owners import BatchAxis, Owners, RowOwners, owners_of


def anchor_of(search: Search, node: Node | Join, use: Use, count: int) -> Owners | None:
    """Where a use has its samples, as the rows of the batch that it reads tell.

    `None` if they do not tell.
    """
    # Asked again for every assignment that is tried, while the rows stay the same.
    if (node, count) not in search.anchors:
        search.anchors[node, count] = _told_by_rows(search, node, use, count)
    return search.anchors[node, count]


def _told_by_rows(
    search: Search,
    node: Node | Join,
    use: Use,
    count: int,
) -> Owners | None:
    # The rule makes samples of its own: rows of the input are not rows of the output. And where
    # there is one sample, its rows are not on the axis of one entry, but on one that the rule has.
    if groups_of(use) is not None or count <= 1:
        return None
    for name, roots in use.roots.items():
        shape = use.shapes.get(name)
        # A table that all samples read tells nothing, even if it has N rows.
        constant = search.batch.tensors is not None and not search.batch.holds(roots)
        if name in use.operands or not shape or not roots.tensors or constant:
            continue
        numbers = (roots.numbers or {}).get(count)
        owners: Owners | None
        if numbers is None:
            owners = _rows_in_order(search, node, use, shape, roots, count)
        else:
            owners = _numbered(search, node, use, shape, numbers, count)
        if owners is not None:
            return owners
    return None


def _rows_in_order(
    search: Search,
    node: Node | Join,
    use: Use,
    shape: torch.Size,
    roots: Roots,
    count: int,
) -> BatchAxis | None:
    """The first axis, if the rows of the batch are on it in their order.

    Else the first axis of N entries of a tensor of the batch that is read as it is.
    """
    # The op keeps the rows of what it reads.
    rows = len(use.shape) > 0 and shape[0] == use.shape[0]
    if (
        rows
        and count
        and use.shape[0] % count == 0
        and 0 in search.axes[node]
        and in_order(roots, count)
    ):
        return BatchAxis(count)
    # A tensor of the batch that nothing has touched: an axis of N entries is that of the samples.
    as_it_is = (
        [root.shape for root in roots.tensors] == [tuple(shape)]
        and not roots.data
        and not roots.routed
    )
    axis = shape.index(count) if as_it_is and count in shape else 0
    if axis and axis in search.axes[node] and use.shape[axis : axis + 1] == (count,):
        return BatchAxis(count, axis)
    return None


def _numbered(
    search: Search,
    node: Node | Join,
    use: Use,
    shape: torch.Size,
    numbers: Tensor,
    count: int,
) -> Owners | None:
    """The same axes as in what it reads, if all are among its own.

    Or all of it, if it reads one sample only.
    """
    owners = owners_of(numbers, shape, count)
    if all(axis in search.axes[node] and use.shape[axis] == shape[axis] for axis in owners.axes):
        return owners
    if numbers.numel() == 1:
        return owners_of(numbers.flatten(), use.shape, count)
    return None


def told_by_map(search: Search, op: Mapped, count: int) -> Owners | None:
    """Where an op under `vmap` has its samples, as the rows that it reads tell.

    `None` if they do not tell.
    """
    numbers = (op.roots.numbers or {}).get(count)
    if numbers is None:
        return None
    return owners_of(numbers, op.like.shape, count)


def told_by_target(head: Head, count: int) -> Owners | None:
    """Who owns the rows of a head, as the targets of the loss call tell.

    `None` if there are none whose rows were moved and could be followed.
    """
    if head.call is None:
        target = None
    else:
        target = head.call.arguments.get("target")
    if (
        head.call is None
        or not isinstance(target, Tensor)
        or not target.ndim
        or len(head.like) != len(target)
    ):
        return None
    # The numbers of the rows of the targets, as far as they lie along the first axis.
    numbers = (head.call.roots.numbers or {}).get(count)
    if (
        numbers is None
        or not numbers.ndim
        or numbers.numel() != len(numbers)
        or len(numbers) != len(target)
    ):
        return None
    return owners_of(numbers.reshape(-1, *[1] * (head.like.ndim - 1)), head.like.shape, count)


def agrees_with_target(head: Head, owners: RowOwners) -> bool:
    """Whether the targets of a loss call belong to the samples of its input.

    Only targets that are the batch's as they are can disagree.
    """
    if head.call is None:
        target = None
    else:
        target = head.call.arguments.get("target")
    if head.call is None or not isinstance(target, Tensor) or not target.ndim:
        return True
    as_they_are = len(target) == owners.count and in_order(head.call.roots, owners.count)
    return not as_they_are or torch.equal(owners.index.cpu(), torch.arange(owners.count))


def in_order(roots: Roots, count: int) -> bool:
    """Whether something has the rows of the batch in their order, or depends on none.

    It may have several rows of each sample.
    """
    # One row is the same for all samples: it says nothing of their order.
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
