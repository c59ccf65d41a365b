"""From gradients to new parameters: directions, and updates that are applied only if all are finite."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_curv.optimizers.curvature.base import (
    Block,
    Curvature,
    Direction,
    Gradient,
    Member,
    ParamGroup,
)
from lightning_curv.optimizers.linear_algebra.finite import finite_flags
from lightning_curv.optimizers.linear_algebra.running_mean import next_weight, update_mean
from lightning_curv.optimizers.step.adam import adam_direction
from lightning_curv.optimizers.step.parameters import Parameters, gradient
from lightning_curv.optimizers.step.sharded_inverses import preconditioned
from lightning_curv.optimizers.step_size.rules import Step


def directions(
    curvature: Curvature,
    parameters: Parameters,
    blocks: Sequence[Block],
    dampings: dict[Tensor, Tensor],
    jacobians: Sequence[dict[Tensor, Any]],
    average: bool = True,
) -> list[Direction]:
    """The preconditioned gradients of all parameters whose curvature is ready.

    Args:
        curvature: what preconditions.
        parameters: of the optimizer.
        blocks: of the parameters that move.
        dampings: of the blocks whose curvature is known, by their first parameter.
        jacobians: of every micro-batch.
        average: whether running means of the gradients are preconditioned, decayed as their groups
            say.
    """
    state = parameters.state
    ready = [block for block in blocks if curvature.ready(state[block.params[0]])]
    members = [member for block in ready for member in block.members]
    found = (
        _averaged(parameters, members)
        if average
        else {param: gradient(param) for _, param in members}
    )
    gradients = [
        Gradient(state[b.params[0]], b, [found[p] for p in b.params], dampings[b.params[0]])
        for b in ready
    ]
    return [
        Direction(
            param,
            gradient(param),
            value,
            partial(curvature.squared_norm, g.state, grad.to(value.dtype), value),
            g.damping,
            group,
            state[param].get("velocity"),
            [batch.get(param) for batch in jacobians],
        )
        for g, values in zip(gradients, preconditioned(curvature, gradients), strict=True)
        for (group, param), grad, value in zip(g.block.members, g.values, values, strict=True)
    ]


def _averaged(parameters: Parameters, members: Sequence[Member]) -> dict[Tensor, Tensor]:
    """Running means of the gradients, kept in the state of each parameter."""
    found = {}
    for group, param in members:
        decay, state, found[param] = _decay(group), parameters.state[param], gradient(param)
        if decay:
            if "gradient" not in state:
                dtype = torch.promote_types(param.dtype, torch.float32)
                state["gradient"], state["gradient_weight"] = (
                    torch.zeros_like(param, dtype=dtype),
                    0.0,
                )
            state["gradient_weight"] = next_weight(state["gradient_weight"], decay)
            update_mean(state["gradient"], found[param], state["gradient_weight"])
            found[param] = state["gradient"]
    return found


def _decay(group: ParamGroup) -> float:
    betas = group.get("betas")
    return float(betas[0] if betas else group.get("gradient_decay", 0.0))


def move(
    parameters: Parameters,
    members: Sequence[Member],
    updates: dict[Tensor, Tensor],
    step: Step,
    keep: bool,
) -> bool:
    """Add the updates, and Adam's to all other members; False if some are not finite, then nothing moves.

    Args:
        parameters: of the optimizer.
        members: parameters that move.
        updates: of those with curvature.
        step: what they come from.
        keep: whether updates are remembered, whatever `momentum` is.
    """
    state = parameters.state
    fallback = {p: adam_direction(state[p], gradient(p)) for _, p in members if p not in updates}
    if not all(finite_flags([*updates.values(), *fallback.values()])):
        return False
    for group, param in members:
        update = updates.get(param)
        if update is None:
            update = fallback[param] * (-group["fallback_lr"] * group["lr"] / group["base_lr"])
        elif keep or group.get("momentum", 0.0):
            state[param]["velocity"] = update
        if group["weight_decay"]:
            rate = step.rate if param in updates else 1.0
            param.mul_(1 - min(max(rate * group["lr"] * group["weight_decay"], 0.0), 1.0))
        param.add_(update)
    return True
