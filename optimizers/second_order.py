"""The step that all curvature optimizers share: measure, precondition, bound, move."""

import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lightning_curv.extensions import Extension, GraphExtension

from .adam import adam_direction
from .curvature import Block, Curvature, Direction, Member, ParamGroup
from .distributed import averaged, averaged_over_ranks
from .fields import Inbox
from .finite import finite_flags
from .levenberg_marquardt import LevenbergMarquardt
from .loss_limits import LossLimits
from .restore import restored_state
from .schedule import Schedule
from .settings import require_non_negative, require_positive
from .step_rules import Step, StepRule
from .trial import Trial

SAVED = ("steps", "relative_damping", "loss_floor", "full_batch", "tried", "_after")
SETTINGS = ("curvature", "schedule", "step_rule", "adaptation", "curvature_scale")
TINY = torch.finfo(torch.float32).tiny  # keeps the damping of a block without any curvature positive


class SecondOrderOptimizer(Optimizer):
    r"""Gradient descent preconditioned by curvature × damping × step, three objects that know nothing of each other.

    Updates come from `step_rule` for the directions that `curvature` makes of the gradients with the damping of the
    group; decoupled weight decay comes on top.

    A parameter without curvature moves by Adam's direction at `fallback_lr` $\cdot \, \eta_t / \eta_0$ instead.
    Frozen parameters and those without a gradient are left alone. A step with inf or NaN is rejected with a warning.

    Args:
        params: parameters, or dicts of parameter groups with settings of their own.
        defaults: settings of the groups; at least `lr`, `damping`, `weight_decay` and `fallback_lr`.
        curvature: what preconditions a gradient.
        schedule: when curvature is measured and inverted.
        step_rule: how far to go.
        adaptation: of the relative damping, where a group's `damping` is "auto".

    Attributes:
        loss_fn: what `step` takes as `loss_fn` if it is not given any; set it where `step` is called by others.
        last_step: numbers of the last step, for logs.
        curvature_scale: what the fields on the parameters lack to be the curvature of the loss whose gradient they
            carry. Set it to the number of micro-batches if their losses were divided by it, their gradients accumulated
            and only the last one's curvature is on the parameters.
    """

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        curvature: Curvature,
        schedule: Schedule,
        step_rule: StepRule,
        adaptation: LevenbergMarquardt,
    ) -> None:
        self.curvature = curvature
        self.schedule = schedule
        self.step_rule = step_rule
        self.adaptation = adaptation
        self.steps = 0
        self.relative_damping = adaptation.start
        self.loss_floor = 0.0
        self.curvature_scale = 1.0
        self.full_batch: bool | None = None  # unknown
        self.tried = False
        self.loss_fn: Callable[[], Any] | None = None
        self.last_step: dict[str, float] = {}
        self._after: float | None = None
        self._room = math.inf
        self._inboxes: dict[str, Inbox] = {}
        super().__init__(params, defaults)

    @property
    def extensions(self) -> tuple[Extension | GraphExtension, ...]:
        """The extensions that this optimizer can need, for `curvature(*optimizer.extensions)`."""
        return self._extensions(measure=True)

    def required_extensions(self) -> tuple[Extension | GraphExtension, ...]:
        """The extensions that the upcoming step needs; none between two measurements with a given learning rate."""
        return self._extensions(measure=self.schedule.measure_due(self.steps))

    def _extensions(self, measure: bool) -> tuple[Extension | GraphExtension, ...]:
        found: list[Extension | GraphExtension | None] = [self.step_rule.extension]
        if measure:
            found.append(self.curvature.extension)
        if self._adapts and any(found):
            found.append(LossLimits())
        return tuple({extension.savefield: extension for extension in found if extension is not None}.values())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; its learning rate now is the one that schedules are relative to.

        Raises:
            ValueError: a setting is out of range, or is one that holds for the whole optimizer.
            TypeError: a parameter is complex or sparse.
        """
        for name in inspect.signature(type(self)).parameters.keys() & param_group.keys() - self.defaults.keys():
            if name != "params":
                raise ValueError(f"`{name}` holds for all parameter groups; pass it to {type(self).__name__}.")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            for param in group["params"]:
                _check_param(param)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        group.setdefault("base_lr", group["lr"])

    def _check_group(self, group: ParamGroup) -> None:
        for name in ("lr", "fallback_lr"):
            require_positive(name, group[name])
        if group["damping"] != "auto":
            require_positive("damping", group["damping"])
        require_non_negative("weight_decay", group["weight_decay"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, loss_fn: Callable[[], Any] | None = None) -> Any:
        """Take one step from the gradients and curvature on the parameters.

        Args:
            closure: recomputes loss, gradients and curvature; called once, before anything else.
            loss_fn: computes the loss of this step's batch once more, without gradients and without side effects (on
                running statistics, logs). Every fifth step calls it before and after the update, both times with the
                same random numbers, to adapt the damping; without it the damping stays relative but is not adapted.

        Returns:
            What the closure returned, else None.

        Raises:
            RuntimeError: curvature is due and no parameter has any that was not used before; a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        members = list(self._members())
        if not members:
            return loss
        trial = self._trial(self.loss_fn if loss_fn is None else loss_fn, members[0][1].device)
        # A caller's autocast would run the preconditioning in bfloat16.
        with torch.autocast(members[0][1].device.type, enabled=False):
            step = self._update(members)
        if step is not None:
            self._adapt(step, trial)
        return loss

    def _trial(self, loss_fn: Callable[[], Any] | None, device: torch.device) -> Trial | None:
        """Evaluate the loss where the damping is to be adapted, and once more after that to know the batch again."""
        if loss_fn is None or not self._adapts:
            return None
        after, self._after = (None if self.full_batch is False else self._after), None
        if after is None and not self.adaptation.due(self.steps):
            return None
        trial = Trial(loss_fn, device)
        if after is not None:
            self.full_batch = math.isclose(trial.before, after, rel_tol=1e-6)
        return trial

    def _adapt(self, step: Step, trial: Trial | None) -> None:
        if trial is not None and self.adaptation.due(self.steps - 1) and step.predicted is not None:
            ratio = trial.change() / step.predicted if step.predicted else math.nan
            self.relative_damping = self.adaptation.adapted(self.relative_damping, ratio, bool(self.full_batch))
            self.last_step["reduction_ratio"] = ratio
            self.tried, self._after = True, trial.after
        elif not self.tried and not self.adaptation.due(self.steps - 1):
            self.relative_damping = self.adaptation.annealed(self.relative_damping)

    @property
    def _adapts(self) -> bool:
        return any(group["damping"] == "auto" for group in self.param_groups)

    def _members(self) -> Iterator[Member]:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None and param.requires_grad and param.numel():
                    if param.grad.layout != torch.strided:
                        raise RuntimeError(
                            f"{type(self).__name__} needs dense gradients, found a sparse one on {self._name(param)}; "
                            "build the layer with `sparse=False`."
                        )
                    yield group, param

    def _update(self, members: list[Member]) -> Step | None:
        if not all(finite_flags(_grad(param) for _, param in members)):
            _warn("found inf or NaN in the gradients; this step is skipped.")
            return None
        jacobians = self._taken(self.step_rule.extension, members) if self.step_rule.extension else {}
        self._read_limits(members)
        if self.schedule.measure_due(self.steps):
            self._measure(members, jacobians)
        blocks = self._blocks(members)
        dampings = {block.params[0]: self._damping(block) for block in blocks if self._known(block)}
        self._refresh(blocks, dampings)
        step = self._move(members, blocks, dampings, jacobians)
        if step is not None:
            self.steps += 1
        return step

    def _taken(self, extension: Extension, members: list[Member]) -> dict[Tensor, Any]:
        """The new fields of an extension, each only once."""
        inbox = self._inboxes.setdefault(extension.savefield, Inbox(extension.savefield))
        fields = {param: field for _, param in members if (field := inbox.unread(param)) is not None}
        for param in fields:
            inbox.mark_read(param)
        if not fields:
            raise RuntimeError(self._missing(extension))
        return fields

    def _measure(self, members: list[Member], jacobians: dict[Tensor, Any]) -> None:
        extension, rule = self.curvature.extension, self.step_rule.extension
        shared = rule is not None and rule.savefield == extension.savefield
        fields = jacobians if shared else self._taken(extension, members)
        self._pair(members, self.curvature.pairs(fields))
        blocks = [block for block in self._blocks(members) if block.params[0] in fields or len(block.params) == 1]
        measured = [self._measured(block, fields) for block in blocks]
        measured = averaged_over_ranks(measured, members[0][1].device)
        flags = iter(finite_flags(_witness(tensor) for statistics in measured for tensor in statistics or ()))
        for block, statistics in zip(blocks, measured, strict=True):
            if statistics is None:
                continue
            finite = [next(flags) for _ in statistics]
            if all(finite):
                self.curvature.absorb(self.state[block.params[0]], block, statistics, self.curvature_scale)
            else:
                name = self._name(block.params[0])
                _warn(f"found inf or NaN in the curvature of {name}; its former curvature stays in use.")

    def _read_limits(self, members: list[Member]) -> None:
        limits = next((p.loss_limits for _, p in members if hasattr(p, "loss_limits")), None)
        self._room = math.inf
        if limits is not None and self._adapts:
            self.loss_floor, self._room = (number * self.curvature_scale for number in averaged(limits).tolist())
            for _, param in members:
                vars(param).pop("loss_limits", None)

    def _measured(self, block: Block, fields: dict[Tensor, Any]) -> list[Tensor] | None:
        if any(param not in fields for param in block.params):
            return None
        state = self.state[block.params[0]]
        return self.curvature.measure(state, block, [fields[param] for param in block.params], self.steps)

    def _pair(self, members: list[Member], pairs: dict[Tensor, Tensor]) -> None:
        """Remember by number, which survives saving, the bias that shares a block with each weight."""
        numbers = {param: number for number, param in enumerate(self._params())}
        for _, param in members:
            if param in pairs:
                self.state[param]["bias"] = numbers[pairs[param]]
            else:
                self.state[param].pop("bias", None)

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _blocks(self, members: list[Member]) -> list[Block]:
        groups = {param: group for group, param in members}
        params = self._params()
        joint = {p: params[self.state[p]["bias"]] for p in groups if "bias" in self.state[p]}
        joint = {weight: bias for weight, bias in joint.items() if bias in groups}
        partners = set(joint.values())
        return [
            Block(((group, p), (groups[joint[p]], joint[p])) if p in joint else ((group, p),))
            for group, p in members
            if p not in partners
        ]

    def _known(self, block: Block) -> bool:
        """Whether the curvature of the block was ever measured."""
        return "weight" in self.state[block.params[0]]

    def _damping(self, block: Block) -> Tensor:
        damping = block.group["damping"]
        if damping != "auto":
            param = block.params[0]
            return torch.as_tensor(damping, dtype=torch.promote_types(param.dtype, torch.float32), device=param.device)
        mean = self.curvature.mean_eigenvalue(self.state[block.params[0]])
        return self.relative_damping * mean + self.loss_floor + TINY

    def _refresh(self, blocks: list[Block], dampings: dict[Tensor, Tensor]) -> None:
        states = [self.state[block.params[0]] for block in blocks]
        counts = [self.curvature.units(state) for state in states]
        due, owners, number = [], [], 0
        for block, state, count in zip(blocks, states, counts, strict=True):
            for unit in range(count):
                if self.schedule.invert_due(self.steps, number, sum(counts)) or not self.curvature.ready(state):
                    due.append((state, unit, dampings[block.params[0]]))
                    owners.append(block)
                number += 1
        successes = self.curvature.refresh(due)
        failed = {block.params[0]: block for block, success in zip(owners, successes, strict=True) if not success}
        for block in failed.values():
            former = self.curvature.ready(self.state[block.params[0]])
            _warn(
                f"could not invert the damped curvature of {self._name(block.params[0])}; "
                f"{'its former inverse' if former else 'the fallback update'} stays in use. "
                f"Raise `damping`, now {block.group['damping']}, if this repeats."
            )

    def _directions(self, block: Block, damping: Tensor, jacobians: dict[Tensor, Any]) -> list[Direction]:
        state = self.state[block.params[0]]
        grads = [_grad(param) for param in block.params]
        values = self.curvature.precondition(state, block, grads, damping)
        return [
            Direction(
                param,
                grad,
                value,
                partial(self.curvature.squared_norm, state, grad.to(value.dtype), value),
                damping,
                group,
                self.state[param].get("velocity"),
                jacobians.get(param),
            )
            for (group, param), grad, value in zip(block.members, grads, values, strict=True)
        ]

    def _move(
        self, members: list[Member], blocks: list[Block], dampings: dict[Tensor, Tensor], jacobians: dict[Tensor, Any]
    ) -> Step | None:
        ready = [block for block in blocks if self.curvature.ready(self.state[block.params[0]])]
        directions = [d for block in ready for d in self._directions(block, dampings[block.params[0]], jacobians)]
        step = self.step_rule(directions, self.curvature_scale, self._room)
        updates = {d.param: update for d, update in zip(directions, step.updates, strict=True)}
        fallback = {p: adam_direction(self.state[p], _grad(p)) for _, p in members if p not in updates}
        if not all(finite_flags([*updates.values(), *fallback.values()])):
            _warn("found inf or NaN in the preconditioned gradients; this step is skipped.")
            return None
        for group, param in members:
            update = updates.get(param)
            if update is None:
                update = fallback[param] * (-group["fallback_lr"] * group["lr"] / group["base_lr"])
            elif self.keeps_updates or group.get("momentum", 0.0):
                self.state[param]["velocity"] = update
            if group["weight_decay"]:
                rate = step.rate if param in updates else 1.0
                param.mul_(1 - min(max(rate * group["lr"] * group["weight_decay"], 0.0), 1.0))
            param.add_(update)
        self.last_step = {**step.report, "damping": self.relative_damping}
        return step

    @property
    def keeps_updates(self) -> bool:
        """Whether the step rule looks at the last update, whatever `momentum` is."""
        return self.step_rule.extension is not None

    def summary(self) -> dict[str, str]:
        """Which update each parameter gets: "curvature", "fallback", "frozen", or "not seen" before its first step."""
        return {self._name(p): self._kind(p) for group in self.param_groups for p in group["params"]}

    def _kind(self, param: Tensor) -> str:
        state = self.state.get(param, {})
        if not param.requires_grad:
            return "frozen"
        if param in self._partners() or self.curvature.ready(state):
            return "curvature"
        return "fallback" if "adam" in state else "not seen"

    def _partners(self) -> set[Tensor]:
        params = self._params()
        return {params[state["bias"]] for state in self.state.values() if "bias" in state}

    def _name(self, param: Tensor) -> str:
        for number, group in enumerate(self.param_groups):
            for index, other in enumerate(group["params"]):
                if other is param:
                    names = group.get("param_names")
                    return f"`{names[index]}`" if names else f"parameter {index} of group {number}"
        return "a parameter"

    def _missing(self, extension: Extension) -> str:
        return (
            f"{type(self).__name__} needs new curvature for step {self.steps}, found no parameter whose "
            f"`.{extension.savefield}` was written since the last step. In Lightning add `CurvatureCallback()` to the "
            "Trainer's callbacks; elsewhere write `with curvature(*optimizer.extensions): loss.backward()` before "
            "`optimizer.step()`."
        )

    def state_dict(self) -> dict[str, Any]:
        """Settings, state and step count: tensors and plain types only."""
        return {**super().state_dict(), **{name: getattr(self, name) for name in SAVED}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, every tensor in the dtype that it was saved in.

        Raises:
            ValueError: the state is another optimizer's.
        """
        if "steps" not in state_dict:
            raise ValueError(f"A state of {type(self).__name__} has the key 'steps', found {sorted(state_dict)}.")
        super().load_state_dict(state_dict)
        self.state.update(restored_state(state_dict, self.param_groups))
        for name in SAVED:
            setattr(self, name, state_dict[name])

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in (*SETTINGS, *SAVED)}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_inboxes" not in self.__dict__:  # weak references are neither copied nor pickled
            self._inboxes, self.last_step, self.loss_fn, self._room = {}, {}, None, math.inf


def _grad(param: Tensor) -> Tensor:
    assert param.grad is not None
    return param.grad


def _witness(tensor: Tensor) -> Tensor:
    """Entries that are finite only if all are: a positive semi-definite matrix has its largest ones on the diagonal."""
    square = tensor.dim() > 1 and tensor.shape[-1] == tensor.shape[-2]
    return tensor.diagonal(dim1=-2, dim2=-1) if square else tensor


def _check_param(param: Tensor) -> None:
    if param.is_complex() or param.layout != torch.strided:
        kind = "complex" if param.is_complex() else "sparse"
        raise TypeError(f"Curvature needs real dense parameters, found a {kind} one of shape {tuple(param.shape)}.")


def _warn(message: str) -> None:
    warnings.warn(f"The optimizer {message}", RuntimeWarning, stacklevel=2)
