"""The step that all curvature optimizers share: measure, precondition, bound, move."""

import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lightning_curv.extensions import Extension

from .adam import adam_direction
from .curvature import Curvature, ParamGroup
from .distributed import averaged_over_ranks
from .fields import Inbox
from .finite import finite_flags
from .restore import restored_state
from .schedule import Schedule
from .settings import require_non_negative, require_positive
from .step_rules import StepRule

Member = tuple[ParamGroup, Tensor]


class SecondOrderOptimizer(Optimizer):
    r"""Gradient descent preconditioned by curvature × damping × step, three objects that know nothing of each other.

    With $d_p$ from `curvature` (damped by the group's `damping`) and bounded by `step_rule`, a step is

    $$v_p \leftarrow \mu v_p - \eta_t d_p, \qquad \theta_p \leftarrow (1 - \eta_t w) \theta_p + v_p.$$

    A parameter without curvature moves by Adam's direction at `fallback_lr` $\cdot \, \eta_t / \eta_0$ instead.
    Frozen parameters and those without a gradient are left alone. A step with inf or NaN is rejected with a warning.

    Args:
        params: parameters, or dicts of parameter groups with settings of their own.
        defaults: settings of the groups; at least `lr`, `damping`, `weight_decay` and `fallback_lr`.
        curvature: what preconditions a gradient.
        schedule: when curvature is measured and inverted.
        step_rule: how far to go.

    Attributes:
        curvature_scale: what the fields on the parameters lack to be the curvature of the loss whose gradient they
            carry. Set it to the number of micro-batches if their losses were divided by it, their gradients accumulated
            and only the last one's curvature is on the parameters.
    """

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], curvature: Curvature, schedule: Schedule, step_rule: StepRule
    ) -> None:
        self.curvature = curvature
        self.schedule = schedule
        self.step_rule = step_rule
        self.steps = 0
        self.curvature_scale = 1.0
        self._inbox = Inbox(curvature.extension.savefield)
        super().__init__(params, defaults)

    @property
    def extensions(self) -> tuple[Extension, ...]:
        """The extensions that this optimizer can need, for `curvature(*optimizer.extensions)`."""
        return (self.curvature.extension,)

    def required_extensions(self) -> tuple[Extension, ...]:
        """The extensions that the upcoming step needs; empty between two measurements."""
        return self.extensions if self.schedule.measure_due(self.steps) else ()

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
        for name in ("lr", "damping", "fallback_lr"):
            require_positive(name, group[name])
        require_non_negative("weight_decay", group["weight_decay"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step from the gradients and curvature on the parameters.

        Args:
            closure: recomputes loss, gradients and curvature; called once, before anything else.

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
        if members:
            # A caller's autocast would run the preconditioning in bfloat16.
            with torch.autocast(members[0][1].device.type, enabled=False):
                self._update(members)
        return loss

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

    def _update(self, members: list[Member]) -> None:
        if not all(finite_flags(_grad(param) for _, param in members)):
            _warn("found inf or NaN in the gradients; this step is skipped.")
            return
        if self.schedule.measure_due(self.steps):
            self._absorb(members)
        self._refresh(members)
        self._move(members)
        self.steps += 1

    def _absorb(self, members: list[Member]) -> None:
        unread = [self._inbox.unread(param) for _, param in members]
        unread = averaged_over_ranks(unread, members[0][1].device)
        fields = [(*member, field) for member, field in zip(members, unread, strict=True) if field is not None]
        if not fields:
            raise RuntimeError(self._missing())
        flags = iter(finite_flags(tensor for _, _, field in fields for tensor in field))
        for group, param, field in fields:
            finite = [next(flags) for _ in field]
            if all(finite):
                if self.curvature_scale != 1.0:
                    field = [field[0] * self.curvature_scale, *field[1:]]
                self.curvature.absorb(self.state[param], param, field, group)
            else:
                _warn(f"found inf or NaN in the curvature of {self._name(param)}; its former curvature stays in use.")
            self._inbox.mark_read(param)

    def _refresh(self, members: list[Member]) -> None:
        due = self.schedule.invert_due(self.steps)
        for group, param in members:
            state = self.state[param]
            if (due or not self.curvature.ready(state)) and not self.curvature.refresh(state, group):
                use = "its former inverse" if self.curvature.ready(state) else "the fallback update"
                _warn(
                    f"could not invert the damped curvature of {self._name(param)}; {use} stays in use. "
                    f"Raise `damping`, now {group['damping']}, if this repeats."
                )

    def _move(self, members: list[Member]) -> None:
        known = [(group, param) for group, param in members if self.curvature.ready(self.state[param])]
        directions = [self.curvature.direction(self.state[param], _grad(param), group) for group, param in known]
        values = dict(zip((param for _, param in known), self.step_rule(directions), strict=True))
        fallback = {p: adam_direction(self.state[p], _grad(p)) for _, p in members if p not in values}
        if not all(finite_flags([*values.values(), *fallback.values()])):
            _warn("found inf or NaN in the preconditioned gradients; this step is skipped.")
            return
        for group, param in members:
            if param in values:
                delta = self._with_momentum(param, values[param] * -group["lr"], group.get("momentum", 0.0))
            else:
                delta = fallback[param] * (-group["fallback_lr"] * group["lr"] / group["base_lr"])
            if group["weight_decay"]:
                param.mul_(1 - group["lr"] * group["weight_decay"])
            param.add_(delta)

    def _with_momentum(self, param: Tensor, delta: Tensor, momentum: float) -> Tensor:
        if not momentum:
            return delta
        state = self.state[param]
        if "velocity" in state:
            delta.add_(state["velocity"], alpha=momentum)
        state["velocity"] = delta
        return delta

    def summary(self) -> dict[str, str]:
        """Which update each parameter gets: "curvature", "fallback", "frozen", or "not seen" before its first step."""
        return {self._name(p): self._kind(p) for group in self.param_groups for p in group["params"]}

    def _kind(self, param: Tensor) -> str:
        state = self.state.get(param, {})
        if not param.requires_grad:
            return "frozen"
        return "curvature" if self.curvature.ready(state) else "fallback" if "adam" in state else "not seen"

    def _name(self, param: Tensor) -> str:
        for number, group in enumerate(self.param_groups):
            for index, other in enumerate(group["params"]):
                if other is param:
                    names = group.get("param_names")
                    return f"`{names[index]}`" if names else f"parameter {index} of group {number}"
        return "a parameter"

    def _missing(self) -> str:
        name, field = type(self).__name__, self._inbox.savefield
        return (
            f"{name} needs new curvature for step {self.steps}, found no parameter whose `.{field}` was written since "
            "the last step. In Lightning add `CurvatureCallback()` to the Trainer's callbacks; elsewhere write "
            "`with curvature(*optimizer.extensions): loss.backward()` before `optimizer.step()`."
        )

    def state_dict(self) -> dict[str, Any]:
        """Settings, state and step count: tensors and plain types only."""
        return {**super().state_dict(), "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, every tensor in the dtype that it was saved in.

        Raises:
            ValueError: the state is another optimizer's.
        """
        if "steps" not in state_dict:
            raise ValueError(f"A state of {type(self).__name__} has the key 'steps', found {sorted(state_dict)}.")
        super().load_state_dict(state_dict)
        self.state.update(restored_state(state_dict, self.param_groups))
        self.steps = state_dict["steps"]

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("curvature", "schedule", "step_rule", "steps", "curvature_scale")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_inbox" not in self.__dict__:  # weak references are neither copied nor pickled
            self._inbox = Inbox(self.curvature.extension.savefield)


def _grad(param: Tensor) -> Tensor:
    assert param.grad is not None
    return param.grad


def _check_param(param: Tensor) -> None:
    if param.is_complex() or param.layout != torch.strided:
        kind = "complex" if param.is_complex() else "sparse"
        raise TypeError(f"Curvature needs real dense parameters, found a {kind} one of shape {tuple(param.shape)}.")


def _warn(message: str) -> None:
    warnings.warn(f"The optimizer {message}", RuntimeWarning, stacklevel=2)
