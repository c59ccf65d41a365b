"""The work of inversion split over processes, and what each of them keeps of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from lightning_curv.distributed.failures import processes, together
from lightning_curv.optimizers.curvature.base import Curvature, Gradient, Part, State
from lightning_curv.optimizers.linear_algebra.collectives import summed, wide_dtype
from lightning_curv.optimizers.linear_algebra.readings import Readings

Result = list[Tensor] | None


def shared_inverses(
    curvature: Curvature, due: Sequence[Part], readings: Readings | None = None
) -> list[Result]:
    """What `Curvature.inverted` returns, every part computed by one process.

    Sent to all of them in one collective; a curvature that is `sharded` leaves each part where it
    was computed, and the others have an empty tensor in its place.

    Args:
        curvature: what inverts.
        due: state, number of the part, damping of the block; the same on all processes.
        readings: of the step, see `Curvature.inverted`; of use to a single process.

    Returns:
        For each part what `Curvature.accept` takes; None if it failed where it was computed.

    Source: J. G. Pauloski, Q. Huang, L. Huang, S. Venkataraman, K. Chard, I. Foster, Z. Zhang,
        *KAISA: An Adaptive Second-Order Optimizer Framework for Deep Neural Networks*, SC 2021,
        section 3.
    """
    if processes() == 1 or not due:
        return curvature.inverted(due, readings)
    sharded = curvature.sharded
    if sharded:
        owners = _block_owners(curvature, due)
    else:
        owners = _part_owners(curvature, due)
    indices_here = [i for i, owner in enumerate(owners) if owner == dist.get_rank()]
    inverses_here = curvature.inverted([due[i] for i in indices_here])
    computed: dict[int, Result] = dict(zip(indices_here, inverses_here, strict=True))

    # Where inverses stay, only the flags of success are sent.
    shapes = [[] if sharded else curvature.shapes(state, unit) for state, unit, _ in due]
    sent = _exchanged(curvature, due, owners, shapes, computed)
    succeeded = torch.stack([numbers[0] for numbers in sent]).tolist()
    results: list[Result] = []
    for i, (state, _, damping) in enumerate(due):
        dtype = curvature.dtype(state)
        if not succeeded[i]:
            results.append(None)
        elif sharded:
            elsewhere = torch.empty(0, dtype=dtype, device=damping.device)
            results.append(computed.get(i) or [elsewhere])
        else:
            # What was computed here is taken from what was sent, too: with other strides a product
            # with it would be rounded differently than on the other processes.
            sizes = [shape.numel() for shape in shapes[i]]
            flat = sent[i][1:].split(sizes)
            inverses = []
            for numbers, shape in zip(flat, shapes[i], strict=True):
                inverses.append(numbers.view(shape).to(dtype, copy=True))
            results.append(inverses)
    return results


def _exchanged(
    curvature: Curvature,
    due: Sequence[Part],
    owners: Sequence[int],
    shapes: Sequence[Sequence[torch.Size]],
    computed: dict[int, Result],
) -> list[Tensor]:
    """Send what each process computed to all: per part a flag of success, then its numbers."""
    world = processes()
    sizes = [1 + sum(shape.numel() for shape in part) for part in shapes]
    parts_of: list[list[int]] = [[] for _ in range(world)]
    for i, owner in enumerate(owners):
        parts_of[owner].append(i)
    # All processes send equally many numbers, those with less work zeros behind their own.
    longest = max(sum(sizes[i] for i in parts) for parts in parts_of)
    # One collective has one type: the widest, so that nothing is rounded on the way.
    wide = wide_dtype(curvature.dtype(state) for state, _, _ in due)
    mine = torch.zeros(longest, dtype=wide, device=due[0][2].device)
    if computed:
        # In the order of the parts, which all processes know: no numbers of parts are sent.
        packed_parts = [_packed(result, sizes[i], mine) for i, result in computed.items()]
        packed = torch.cat(packed_parts)
        mine[: len(packed)] = packed
    rows = [torch.empty_like(mine) for _ in range(world)]
    together(dist.all_gather, rows, mine)

    sent: dict[int, Tensor] = {}
    for parts, row in zip(parts_of, rows, strict=True):
        sizes_of_parts = [sizes[i] for i in parts]
        used = row[: sum(sizes_of_parts)]
        if parts:
            numbers_of_parts = used.split(sizes_of_parts)
            sent.update(zip(parts, numbers_of_parts, strict=True))
    return [sent[i] for i in range(len(due))]


def preconditioned(curvature: Curvature, gradients: Sequence[Gradient]) -> list[list[Tensor]]:
    """What `Curvature.precondition` returns, of a `sharded` curvature from all processes.

    Each block is preconditioned by the process that has its inverse; then one collective of the
    parameters' size sends the results to all.

    Args:
        curvature: what preconditions.
        gradients: of all blocks; the same on all processes.
    """
    if processes() == 1 or not curvature.sharded or not gradients:
        return curvature.precondition(gradients)
    rank = dist.get_rank()
    # The inverse of a block is on one process alone.
    is_mine = [_owner(curvature, gradient.state) == rank for gradient in gradients]
    mine_only = [g for g, mine in zip(gradients, is_mine, strict=True) if mine]
    directions_here = iter(curvature.precondition(mine_only))
    # Every process adds zeros where another one has the direction.
    shares: list[Tensor] = []
    for gradient, mine in zip(gradients, is_mine, strict=True):
        dtype = curvature.dtype(gradient.state)
        values = next(directions_here) if mine else gradient.values
        shares += [value.to(dtype) * mine for value in values]
    totals = zip(summed(shares), shares, strict=True)
    sums = iter([total.to(share) for total, share in totals])
    return [[next(sums) for _ in gradient.values] for gradient in gradients]


def with_all_inverses(curvature: Curvature, state: State) -> State:
    """The state of a block with the inverses that its owner has, the same in all processes.

    Args:
        curvature: whose state it is; if it is `sharded`, all of its `derived` entries are lists of
            a tensor per part, or None where there is none yet.
        state: of the block.

    Cost: of a `sharded` curvature one collective per part, called by all processes.
    """
    owner = curvature.owner(state)
    if owner is None:
        return state
    whole = {key: value for key, value in state.items() if key != "owner"}
    if processes() == 1:
        return whole
    owner = _owner(curvature, state)
    for key in curvature.derived:
        for unit, tensor in enumerate(state.get(key, ())):
            if tensor is not None:
                (shape,) = curvature.shapes(state, unit)
                sent = tensor.new_empty(shape)
                if owner == dist.get_rank():
                    sent.copy_(tensor)
                together(dist.broadcast, sent, src=owner)
                whole[key] = [*whole[key][:unit], sent, *whole[key][unit + 1 :]]
    return whole


def keep_own_inverses(curvature: Curvature, states: Iterable[State]) -> None:
    """Of states from `with_all_inverses` keep the inverses that this process owns.

    Args:
        curvature: whose states they are.
        states: of all blocks, in the same order in all processes.
    """
    if not curvature.sharded or processes() == 1:
        return
    blocks = [state for state in states if any(key in state for key in curvature.derived)]
    costs = [
        sum(_cost(curvature, state, unit) for unit in range(curvature.units(state)))
        for state in blocks
    ]
    for state, owner in zip(blocks, _balanced(costs), strict=True):
        curvature.assign(state, owner)
        if owner != dist.get_rank():
            for key in curvature.derived:
                state[key] = [None if part is None else part.new_empty(0) for part in state[key]]


def _packed(result: Result, size: int, like: Tensor) -> Tensor:
    """The flag and the numbers of a part; all zeros if its computation failed."""
    if result is None:
        return like.new_zeros(size)
    if size > 1:
        numbers = [tensor.to(like).flatten() for tensor in result]
    else:
        numbers = []
    return torch.cat([like.new_ones(1), *numbers])


def _cost(curvature: Curvature, state: State, unit: int) -> int:
    """Multiplications of an inversion, up to a constant: d³ for a matrix, d for a diagonal."""
    cost = 0
    for shape in curvature.shapes(state, unit):
        width = shape[-1] if len(shape) > 1 else 1
        cost += shape.numel() * width
    return cost


def _part_owners(curvature: Curvature, due: Sequence[Part]) -> list[int]:
    return _balanced([_cost(curvature, state, unit) for state, unit, _ in due])


def _balanced(costs: Sequence[int]) -> list[int]:
    """The process for each piece of work: the largest first, each to the one with least work."""
    work = [0] * processes()
    owners = [0] * len(costs)
    # Ties are broken by position, so that all processes come to the same answer.
    largest_first = sorted(range(len(costs)), key=lambda i: -costs[i])
    for i in largest_first:
        owners[i] = work.index(min(work))
        work[owners[i]] += costs[i]
    return owners


def _block_owners(curvature: Curvature, due: Sequence[Part]) -> list[int]:
    """The process for each part: one for all parts of a block, and the same for good."""
    new_states: dict[int, State] = {}  # a state is a dict, which can be no key itself
    costs: dict[int, int] = {}
    for state, unit, _ in due:
        if curvature.owner(state) is None:
            new_states[id(state)] = state
            cost = _cost(curvature, state, unit)
            costs[id(state)] = costs.get(id(state), 0) + cost
    # Blocks that have no process yet are spread over all by their cost.
    owners = _balanced(list(costs.values()))
    for state, owner in zip(new_states.values(), owners, strict=True):
        curvature.assign(state, owner)
    return [_owner(curvature, state) for state, _, _ in due]


def _owner(curvature: Curvature, state: State) -> int:
    """The process that has the inverse of a block; there may be fewer than when it was assigned."""
    owner = curvature.owner(state)
    assert owner is not None
    return owner % processes()
