"""From gradients to new parameters: directions, and updates, which must all be finite."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_curv.devices import on_one_device
from lightning_curv.distributed.shards import is_sharded, own_part, whole
from lightning_curv.optimizers.curvature.base import (
    Block,
    Curvature,
    Direction,
    Gradient,
    Member,
    ParamGroup,
)
from lightning_curv.optimizers.linear_algebra.readings import Answer, Readings
from lightning_curv.optimizers.linear_algebra.running_mean import next_weight, updated_means
from lightning_curv.optimizers.step.adam import adam_direction
from lightning_curv.optimizers.step.parameters import Parameters, gradient
from lightning_curv.optimizers.step.refresh import Dampings
from lightning_curv.optimizers.step.sharded_inverses import preconditioned
from lightning_curv.optimizers.step_size.rules import Step
from lightning_curv.optimizers.step_size.trust_region import TrustRegion

# The least length of a weight, per root of its outputs, that its updates are compared with.
LEAST_LENGTH = 0.03

# Of each weight what its updates are compared with, [].
Lengths = dict[Tensor, Tensor]


def directions(
    curvature: Curvature,
    parameters: Parameters,
    blocks: Sequence[Block],
    dampings: Dampings,
    jacobians: Sequence[dict[Tensor, Any]],
    average: bool = True,
    radius: float | Tensor = math.inf,
    lengths: Lengths | None = None,
) -> list[Direction]:
    """The preconditioned gradients of all parameters whose curvature is ready.

    Args:
        curvature: what preconditions.
        parameters: of the optimizer.
        blocks: of the parameters that move.
        dampings: what gives that of each block whose curvature is known, by its first parameter.
        jacobians: of every micro-batch.
        average: whether running means of the gradients are preconditioned, decayed as their groups
            say.
        radius: How far a layer may move, see `shorten`.
        lengths: Of the weights; None if layers may move as far as they want.

    Returns:
        One direction per parameter, those of a block beside each other.
    """
    # Blocks without an inverse of theirs yet are moved by the update without curvature.
    ready = [block for block in blocks if _is_ready(curvature, parameters, block)]
    members = [member for block in ready for member in block.members]
    if average:
        values = _averaged(parameters, members)
    else:
        values = {param: gradient(param) for _, param in members}
    gradients = []
    for block in ready:
        first, *_ = block.params
        values_of_block = [values[param] for param in block.params]
        gradients.append(Gradient(parameters.state[first], block, values_of_block, dampings[first]))
    all_directions: list[Direction] = []
    all_results = preconditioned(curvature, gradients)
    if lengths is not None:
        shorten([g.block.params for g in gradients], all_results, radius, lengths)
    for g, results in zip(gradients, all_results, strict=True):
        for member, value, result in zip(g.block.members, g.values, results, strict=True):
            all_directions.append(
                _direction(curvature, parameters, g, member, value, result, jacobians)
            )
    return all_directions


def _is_ready(curvature: Curvature, parameters: Parameters, block: Block) -> bool:
    state = parameters.state[block.params[0]]
    return curvature.ready(state) and curvature.fits(state, block)


def shorten(
    params: Sequence[Sequence[Tensor]],
    directions: Sequence[Sequence[Tensor]],
    radius: float | Tensor,
    lengths: Lengths,
) -> None:
    """Shorten the directions of layers that move by more than `radius` times their own length.

    That of the layer that moves least is left: where targets are far away and all layers try to
    reach them, it does so with the least change.

    Args:
        params: Of every block.
        directions: Of every block, changed in place.
        radius: Bound on the length of a direction relative to that of its weight.
        lengths: Of the weights.
    """
    weights = [
        (of[0], found) for of, found in zip(params, directions, strict=True) if of[0].dim() > 1
    ]
    if len(weights) < 2:
        return
    updates = torch._foreach_norm([found[0] for _, found in weights])
    changes = relative_changes(updates, [lengths[weight] for weight, _ in weights])
    factors = (radius / changes).clamp(max=1.0)
    # `factors[changes.argmin()] = 1` would wait for the device.
    factors.scatter_(0, changes.argmin(0, keepdim=True), 1.0)
    if factors.device.type == "cpu":
        # There the host knows that mostly no layer moves too far.
        bounded = zip(weights, factors.tolist(), strict=True)
        too_long = [(found, factor) for (_, found), factor in bounded if factor != 1.0]
    else:
        too_long = [(found, factor) for (_, found), factor in zip(weights, factors, strict=True)]
    for found, factor in too_long:
        _multiply(found, factor)


def bounding_lengths(weights: Sequence[Tensor]) -> Lengths:
    """The lengths of weights that their updates are compared with.

    Weights that start at zero, or that shrink to it, may move all the same.
    """
    own: Lengths = {}
    for sharded in (True, False):
        # FSDP may leave some parameters as they are, and torch takes no list of both.
        some = [weight for weight in weights if is_sharded(weight) is sharded]
        if some:
            # Of sharded ones over all parts, in one exchange.
            stacked = whole(torch.stack(on_one_device(torch._foreach_norm(some))))
            own.update(zip(some, stacked.unbind(), strict=True))
    if not own:
        return own
    # Numbers of the host as they are: a tensor of them would have to be sent to the device.
    least = [LEAST_LENGTH * len(weight) ** 0.5 for weight in own]
    longer = torch._foreach_clamp_min(on_one_device(own.values()), least)
    return dict(zip(own, longer, strict=True))


def relative_changes(updates: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The lengths of updates, [] each, divided by those of the weights, [] each."""
    changes = torch.stack(on_one_device(updates))
    return changes / torch.stack(on_one_device(weights)).to(changes)


def _direction(
    curvature: Curvature,
    parameters: Parameters,
    gradient_of_block: Gradient,
    member: Member,
    value: Tensor,
    result: Tensor,
    jacobians: Sequence[dict[Tensor, Any]],
) -> Direction:
    """The direction of one parameter.

    Args:
        curvature: what preconditioned.
        parameters: of the optimizer.
        gradient_of_block: what was preconditioned.
        member: the parameter and its group.
        value: its part of that.
        result: its part of the result.
        jacobians: of every micro-batch.
    """
    group, param = member
    state = gradient_of_block.state
    is_first_of_two = (
        len(gradient_of_block.values) == 2 and param is gradient_of_block.block.params[0]
    )
    return Direction(
        param=param,
        grad=gradient(param),
        value=result,
        # Only some step rules ask for it.
        squared_norm=partial(curvature.squared_norm, state, value.to(result.dtype), result),
        damping=gradient_of_block.damping,
        group=group,
        last=parameters.state[param].get("velocity"),
        jacobians=[batch.get(param) for batch in jacobians],
        damped=partial(curvature.damped, state) if is_first_of_two else None,
    )


def _averaged(parameters: Parameters, members: Sequence[Member]) -> dict[Tensor, Tensor]:
    """The running means of the gradients, kept in the state of each parameter."""
    means = {}
    # By the weight in the mean, which is that of all parameters unless some were left out.
    moving: dict[float, list[Tensor]] = defaultdict(list)
    for group, param in members:
        decay = _decay(group)
        state = parameters.state[param]
        if not decay:
            means[param] = gradient(param)
            continue
        if "gradient" not in state:
            # Running means lose everything in half precision: what is added each step is smaller
            # than its last digit.
            dtype = torch.promote_types(param.dtype, torch.float32)
            state["gradient"] = torch.zeros_like(gradient(param), dtype=dtype)
            state["gradient_weight"] = 0.0
        state["gradient_weight"] = next_weight(state["gradient_weight"], decay)
        moving[state["gradient_weight"]].append(param)
    for weight, params in moving.items():
        former = [parameters.state[param]["gradient"] for param in params]
        updated = updated_means(former, [gradient(param) for param in params], weight)
        for param, mean in zip(params, updated, strict=True):
            means[param] = parameters.state[param]["gradient"] = mean
    return means


def _decay(group: ParamGroup) -> float:
    """The decay of the running mean of the gradients: the first of two `betas`, or its own."""
    # An Adam-like optimizer states both decays together.
    betas = group.get("betas")
    return float(betas[0] if betas else group.get("gradient_decay", 0.0))


@dataclass(frozen=True)
class Moved:
    """What a step has done, of which the host may know the numbers only later.

    Args:
        step: As the rule made it.
        changes: The lengths of the updates of weights, divided by those of the weights.
    """

    step: Step
    changes: Answer | None

    def finish(self, region: TrustRegion) -> Step:
        """The step as the region has shortened it, which remembers it; the numbers are known."""
        changes = self.changes.numbers if self.changes is not None else []
        shrink = region.shrink(changes)
        step = self.step.scaled(shrink)
        moved = shrink * sum(sorted(changes)[:-1])
        region.took(moved, -(step.predicted or 0.0), shrink * step.used)
        return step


def move(
    parameters: Parameters,
    members: Sequence[Member],
    updates: dict[Tensor, Tensor],
    step: Step,
    region: TrustRegion,
    readings: Readings,
    radius: float | Tensor,
    lengths: Lengths,
    remembers: bool = True,
) -> Moved | None:
    """Add the updates, and Adam's to all other members.

    Args:
        parameters: of the optimizer.
        members: parameters that move.
        updates: of those with curvature.
        step: what they come from.
        region: Bounds how far layers move together.
        readings: Of the step. Where nothing is read at once, nothing moves unless all holds that
            they took to hold.
        radius: Of the region.
        lengths: Of the weights; of use to the region alone.
        remembers: Whether the updates are kept, besides those with momentum.

    Returns:
        What was done; None if some updates are known not to be finite, and nothing moves.
    """
    state = parameters.state
    # All updates are computed before any parameter moves: one that is not finite stops the step.
    fallback = {p: adam_direction(state[p], gradient(p)) for _, p in members if p not in updates}
    movers = {**updates, **fallback}
    norms = torch._foreach_norm([*movers.values()]) if movers else []
    changes = None
    if region.enabled:
        of_weights = [
            (norm, lengths[param])
            for param, norm in zip(updates, norms, strict=False)
            if param.dim() > 1
        ]
        if of_weights:
            changes = readings.ask(relative_changes(*zip(*of_weights, strict=True)))
    warn_of = partial(parameters.warn_of_skipped, "preconditioned gradients", [*movers])
    flags = readings.finite([*movers.values()], warn_of, norms)
    if not all(flags):
        warn_of(flags)
        return None
    shrink, sound = _known_on_the_device(region, readings, radius, changes)
    if updates and (isinstance(shrink, Tensor) or shrink < 1.0):
        _multiply([*updates.values()], shrink)
    added = []
    for group, param in members:
        update = updates.get(param)
        if update is None:
            # The schedule of the learning rate acts on the fallback's, too.
            scheduled_lr = group["fallback_lr"] * group["lr"] / group["base_lr"]
            update = fallback[param] * -scheduled_lr
        if sound is not None:
            update = torch.where(sound.to(update.device), update, 0.0)
        if remembers or group.get("momentum"):
            state[param]["velocity"] = update
        else:
            state[param].pop("velocity", None)
        if group["weight_decay"]:
            rate = step.rate * shrink if param in updates else 1.0
            _decay_weights(param, rate * group["lr"] * group["weight_decay"], sound)
        added.append(own_part(update, like=param))
    _add([param for _, param in members], added)
    return Moved(step, changes)


def _known_on_the_device(
    region: TrustRegion, readings: Readings, radius: float | Tensor, changes: Answer | None
) -> tuple[float | Tensor, Tensor | None]:
    """The factor of a step, and whether anything may move; None: it is known that it may."""
    if readings.at_once:
        return region.shrink([] if changes is None else changes.numbers), None
    if changes is None:
        return region.shrink([]), readings.sound
    return region.shrink_on_device(changes.tensor, radius), readings.sound


def _add(params: list[Tensor], updates: list[Tensor]) -> None:
    """Add updates in place, all at once unless some parameters are in parts."""
    if any(map(is_sharded, params)):
        for param, update in zip(params, updates, strict=True):
            param.add_(update)
    else:
        torch._foreach_add_(params, updates)


def _multiply(updates: Sequence[Tensor], factor: float | Tensor) -> None:
    """Multiply updates by a factor in place, on whichever devices they are."""
    if isinstance(factor, float):
        torch._foreach_mul_(list(updates), factor)
        return
    for update in updates:
        update.mul_(factor.to(update))


def _decay_weights(param: Tensor, decay: float | Tensor, sound: Tensor | None) -> None:
    """Shrink a parameter; where it is not sure that anything may move only if that is sound."""
    # A learning rate of the quadratic model may be negative, or large.
    if not isinstance(decay, Tensor):
        decay = min(max(decay, 0.0), 1.0)
    else:
        decay = decay.to(param).clamp(0.0, 1.0)
    kept = 1 - decay
    if sound is not None:
        moves = sound.to(param.device)
        kept = torch.full_like(moves, kept, dtype=param.dtype) if isinstance(kept, float) else kept
        kept = torch.where(moves, kept, 1.0)
    param.mul_(kept)


def undo(parameters: Parameters, members: Sequence[Member]) -> None:
    """Take the last update of every member back, and forget it."""
    for _, param in members:
        update = parameters.state[param].pop("velocity", None)
        if update is not None:
            param.sub_(own_part(update, like=param))


def slope_of_last(parameters: Parameters, members: Sequence[Member]) -> float:
    """The derivative of the loss along the last update, at its end."""
    slopes = []
    for _, param in members:
        update = parameters.state[param].get("velocity")
        if update is not None:
            slopes.append((gradient(param) * update).sum(dtype=torch.float32))
    if not slopes:
        return 0.0
    return float(torch.stack(on_one_device(slopes)).sum())
