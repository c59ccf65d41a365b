"""The inverses of the blocks: how much each is damped, which are renewed in a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_curv.optimizers.curvature.base import Block, Curvature, State
from lightning_curv.optimizers.linear_algebra.readings import Readings
from lightning_curv.optimizers.step.parameters import Parameters
from lightning_curv.optimizers.step.schedule import Schedule
from lightning_curv.optimizers.step.sharded_inverses import shared_inverses
from lightning_curv.optimizers.warn import warn

# Keeps the damping of a block without any curvature positive.
TINY = torch.finfo(torch.float32).tiny

Dampings = dict[Tensor, Callable[[], Tensor]]


def block_damping(
    curvature: Curvature,
    state: State,
    block: Block,
    relative: float,
    floor: float | Tensor,
) -> Tensor:
    r"""The damping $\lambda$ of a block, [].

    It is the number of the group, or for "auto" `relative` · mean eigenvalue + `floor` ·
    `Curvature.floor_scale`.
    """
    damping = block.group["damping"]
    if damping != "auto":
        param = block.params[0]
        dtype = torch.promote_types(param.dtype, torch.float32)
        return torch.as_tensor(damping, dtype=dtype, device=param.device)
    relative_part = relative * curvature.mean_eigenvalue(state)
    if isinstance(floor, Tensor):
        floor = floor.to(relative_part)
    elif not floor:
        return relative_part + TINY
    return relative_part + floor * curvature.floor_scale(state) + TINY


def refresh(
    curvature: Curvature,
    schedule: Schedule,
    parameters: Parameters,
    blocks: Sequence[Block],
    dampings: Dampings,
    step: int,
    readings: Readings,
    all_parts: bool = False,
    kept: int = 1,
) -> None:
    """Renew the inverses that are due, and those that do not exist yet.

    Args:
        curvature: what inverts.
        schedule: says what is due.
        parameters: of the optimizer.
        blocks: of the parameters that move.
        dampings: what gives that of each block whose curvature is known, by its first parameter.
        step: number of the step.
        readings: of the step.
        all_parts: whether all are due.
        kept: for how many steps what was measured last is kept.
    """
    states = [parameters.state[block.params[0]] for block in blocks]
    counts = [curvature.units(state) for state in states]
    due = []
    blocks_of_due = []
    number = 0
    for block, state, count in zip(blocks, states, counts, strict=True):
        for unit in range(count):
            # Numbers run over the parts of all blocks: the work is spread over the steps.
            is_due = all_parts or schedule.invert_due(step, number, sum(counts), kept)
            if is_due or not curvature.ready(state):
                due.append((state, unit, dampings[block.params[0]]()))
                blocks_of_due.append(block)
            number += 1
    results = shared_inverses(curvature, due, readings)
    for (state, unit, _), result in zip(due, results, strict=True):
        if result is not None:
            curvature.accept(state, unit, result)
    failed = {
        block.params[0]: block
        for block, result in zip(blocks_of_due, results, strict=True)
        if result is None
    }
    for param, block in failed.items():
        has_former = curvature.ready(parameters.state[param])
        if has_former:
            in_use = "its former inverse"
        else:
            in_use = "the fallback update"
        warn(
            f"could not invert the damped curvature of {parameters.described([param])}; "
            f"{in_use} stays in use. "
            f"Raise `damping`, now {block.group['damping']}, if this repeats."
        )
