"""The work of inversion split over processes, and what each of them keeps of it."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from lightning_curv.optimizers.curvature.base import Curvature, Gradient, Part, State
from lightning_curv.optimizers.linear_algebra.collectives import processes

Result = list[Tensor] | None


def shared_inverses(curvature: Curvature, due: Sequence[Part]) -> list[Result]:
    """What `Curvature.inverted` returns, every part computed by one process.

    Sent to all of them in one collective; a curvature that is `sharded` leaves each part where it
    was computed, and the others have an empty tensor in its place.

    Source: J. G. Pauloski, Q. Huang, L. Huang, S. Venkataraman, K. Chard, I. Foster, Z. Zhang,
        *KAISA: An Adaptive
    Second-Order Optimizer Framework for Deep Neural Networks*, SC 2021, section 3.
    """
    world = processes()
    if world == 1 or not due:
        return curvature.inverted(due)
    rank, sharded = dist.get_rank(), curvature.sharded
    owners = (
        _block_owners(curvature, due)
        if sharded
        else _owners([_cost(curvature, *part) for part in due])
    )
    computed = curvature.inverted(
        [part for part, owner in zip(due, owners, strict=True) if owner == rank]
    )
    own = dict(zip((i for i, owner in enumerate(owners) if owner == rank), computed, strict=True))
    shapes = [[] if sharded else curvature.shapes(state, unit) for state, unit, _ in due]
    sizes = [
        1 + sum(shape.numel() for shape in group) for group in shapes
    ]  # a flag, then the tensors
    tensors = [state["factors"][0] for state, _, _ in due]
    dtype = (
        torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    )
    longest = max(
        sum(size for size, o in zip(sizes, owners, strict=True) if o == owner)
        for owner in range(world)
    )
    mine = torch.zeros(longest, dtype=dtype, device=tensors[0].device)
    if own:
        packed = torch.cat([_packed(own[i], sizes[i], mine) for i in own])
        mine[: len(packed)] = packed
    rows = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(rows, mine)
    parts: dict[int, Tensor] = {}
    for owner, row in enumerate(rows):
        indices = [i for i, o in enumerate(owners) if o == owner]
        parts.update(
            zip(
                indices,
                row.split(
                    [*(sizes[i] for i in indices), len(row) - sum(sizes[i] for i in indices)]
                ),
            )
        )
    good = torch.stack([parts[i][0] for i in range(len(due))]).tolist()
    results: list[Result] = []
    for i, like in enumerate(tensors):
        if not good[i]:
            results.append(None)
        elif sharded:
            results.append(own.get(i) or [like.new_empty(0)])
        else:  # what was computed here too: with other strides a product with it would be rounded differently
            numbers = parts[i][1:].split([shape.numel() for shape in shapes[i]])
            results.append(
                [
                    n.view(s).to(like.dtype, copy=True)
                    for n, s in zip(numbers, shapes[i], strict=True)
                ]
            )
    return results


def preconditioned(curvature: Curvature, gradients: Sequence[Gradient]) -> list[list[Tensor]]:
    """What `Curvature.precondition` returns; of a `sharded` curvature each block by the process that has its inverse.

    Then one collective of the parameters' size sends the results to all.
    """
    if processes() == 1 or not curvature.sharded or not gradients:
        return curvature.precondition(gradients)
    mine = [g.state["owner"] % processes() == dist.get_rank() for g in gradients]
    found = iter(curvature.precondition([g for g, own in zip(gradients, mine, strict=True) if own]))
    values = [
        value
        for g, own in zip(gradients, mine, strict=True)
        for value in (next(found) if own else g.values)
    ]
    kept = [own for g, own in zip(gradients, mine, strict=True) for _ in g.values]
    dtypes = [g.state["factors"][0].dtype for g in gradients for _ in g.values]
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    flat = torch.cat(
        [value.to(wide).flatten() * own for value, own in zip(values, kept, strict=True)]
    )
    dist.all_reduce(flat)
    parts = iter(flat.split([value.numel() for value in values]))
    results = iter(
        [next(parts).view(v.shape).to(dtype) for v, dtype in zip(values, dtypes, strict=True)]
    )
    return [[next(results) for _ in g.values] for g in gradients]


def _packed(result: Result, size: int, like: Tensor) -> Tensor:
    if result is None:
        return like.new_zeros(size)
    flat = [tensor.to(like).flatten() for tensor in result] if size > 1 else []
    return torch.cat([like.new_ones(1), *flat])


def _cost(curvature: Curvature, state: State, unit: int, _: Tensor) -> int:
    return sum(
        shape.numel() * shape[-1] if len(shape) > 1 else shape.numel()
        for shape in curvature.shapes(state, unit)
    )


def _owners(costs: Sequence[int]) -> list[int]:
    """The largest first, each to the process with least work."""
    work, owners = [0] * processes(), [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = work.index(min(work))
        work[owners[i]] += costs[i]
    return owners


def _block_owners(curvature: Curvature, due: Sequence[Part]) -> list[int]:
    """For good: all parts of a block belong to one process."""
    new: dict[int, tuple[State, int]] = {}
    for part in due:
        if "owner" not in part[0]:
            cost = new.get(id(part[0]), (part[0], 0))[1]
            new[id(part[0])] = part[0], cost + _cost(curvature, *part)
    for (state, _), owner in zip(
        new.values(), _owners([cost for _, cost in new.values()]), strict=True
    ):
        state["owner"] = owner
    return [state["owner"] % processes() for state, _, _ in due]
