"""The step that all curvature optimizers share: measure, precondition, bound, move."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lightning_curv.distributed.failures import telling
from lightning_curv.distributed.replicas import refuse_join
from lightning_curv.distributed.shards import is_sharded
from lightning_curv.extensions import Extension, GraphExtension
from lightning_curv.optimizers.curvature.base import (
    Block,
    Curvature,
    Member,
    ParamGroup,
)
from lightning_curv.optimizers.curvature.fields import Inbox, missing
from lightning_curv.optimizers.linear_algebra.readings import Readings, Surprise
from lightning_curv.optimizers.packed_state import is_trial_step, packed, unpacked
from lightning_curv.optimizers.settings import (
    require_gatherable,
    require_non_negative,
    require_positive,
)
from lightning_curv.optimizers.step.limits import StepLimits
from lightning_curv.optimizers.step.measure import MicroBatches, absorb, statistics
from lightning_curv.optimizers.step.move import (
    Lengths,
    Moved,
    bounding_lengths,
    directions,
    move,
    slope_of_last,
    undo,
)
from lightning_curv.optimizers.step.parameters import Parameters, gradient
from lightning_curv.optimizers.step.pending import Known, Pending, Watch
from lightning_curv.optimizers.step.refresh import Dampings, block_damping, refresh
from lightning_curv.optimizers.step.restore import restored_state
from lightning_curv.optimizers.step.schedule import Schedule
from lightning_curv.optimizers.step.sharded_inverses import keep_own_inverses, with_all_inverses
from lightning_curv.optimizers.step_size.levenberg_marquardt import LevenbergMarquardt
from lightning_curv.optimizers.step_size.loss_limits import LossLimits, LossValue
from lightning_curv.optimizers.step_size.rules import QuadraticModel, Step, StepRule
from lightning_curv.optimizers.step_size.trial import Trial
from lightning_curv.optimizers.step_size.trust_region import TrustRegion
from lightning_curv.optimizers.warn import warn

SAVED = (
    "steps",
    "relative_damping",
    "loss_floor",
    "loss_size",
    "full_batch",
    "tried",
    "_after",
    "memories",
    "interval",
    "next_measurement",
    "batch_size",
)
SCHEDULE = ("steps", "interval", "next_measurement")
REJECTED = 4.0  # what the relative damping is multiplied by when a step is taken back
LOSS_DECAY = 0.9  # of the running mean of the size of an unknown loss
WHOLE_STATE = (
    "`torch.distributed.checkpoint` reads only what a fresh optimizer has, too, and makes a step "
    "of learning rate 0 to see what that is: save `state_dict()`, the same in all processes, whole "
    "(docs/distributed.md shows how)."
)
SETTINGS = ("curvature", "schedule", "step_rule", "adaptation", "region", "curvature_scale")


class SecondOrderOptimizer(Optimizer):
    r"""Gradient descent preconditioned by curvature × damping × step.

    These are three objects that know nothing of each other. Updates come from `step_rule` for the
    directions that `curvature` makes of the gradients with the damping of the group; decoupled
    weight decay comes on top.

    A parameter without curvature moves by Adam's direction at `fallback_lr`
    $\cdot \, \eta_t / \eta_0$ instead. Frozen parameters and those without a gradient are left
    alone. A step with inf or NaN is rejected with a warning.

    Args:
        params: Parameters, or dicts of parameter groups with settings of their own.
        defaults: Settings of the groups; at least `lr`, `damping`, `weight_decay` and
            `fallback_lr`.
        curvature: What preconditions a gradient.
        schedule: When curvature is measured and inverted.
        step_rule: How far to go.
        adaptation: How the relative damping is adapted, where a group's `damping` is "auto".
        safeguards: Whether steps are bounded and taken back, see `TrustRegion`.

    Attributes:
        loss_fn: What `step` takes as `loss_fn` if it is not given any; set it where `step` is
            called by others.
        curvature_scale: What the mean curvature of the backward passes of a step lacks to be that
            of the loss whose gradient the parameters carry. Set it to the number of micro-batches
            whose gradients were accumulated.

    Example:
        >>> import torch
        >>> from lightning_curv import DiagGGNOptimizer
        >>> optimizer = DiagGGNOptimizer(torch.nn.Linear(2, 1).parameters())
        >>> isinstance(optimizer, SecondOrderOptimizer), optimizer.schedule.measure
        (True, 1)
    """

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        curvature: Curvature,
        schedule: Schedule,
        step_rule: StepRule,
        adaptation: LevenbergMarquardt,
        safeguards: bool = True,
    ) -> None:
        self.curvature = curvature
        self.schedule = schedule
        self.step_rule = step_rule
        self.adaptation = adaptation
        self.steps = 0
        self.relative_damping = adaptation.start
        self.loss_floor = 0.0
        self.loss_size = 0.0
        self.curvature_scale = 1.0
        self.full_batch: bool | None = None  # unknown
        self.tried = False
        self.region = TrustRegion(safeguards)
        self.loss_fn: Callable[[], Any] | None = None
        self._last_step: dict[str, float] = {}
        self._pending: Pending | None = None
        self._watch = Watch()
        self._overdue = False
        self._told_relative = False
        self.interval = 1
        self.next_measurement = 0
        self.batch_size = 0.0  # of the first step
        self._after: float | None = None
        self._inboxes: dict[str, Inbox] = {}
        self._micro_batches = MicroBatches()
        super().__init__(params, defaults)

    @property
    def relative_lr(self) -> bool:
        """Whether learning rates of groups and schedulers are factors of one that is found."""
        return isinstance(self.step_rule, QuadraticModel)

    @property
    def last_step(self) -> dict[str, float]:
        """Numbers of the last step, for logs; on a device the host waits for them."""
        self._settle()
        return self._last_step

    @property
    def finds_momentum(self) -> bool:
        """Whether the momentum is found, too."""
        return self.relative_lr

    @property
    def extensions(self) -> tuple[Extension | GraphExtension, ...]:
        """The extensions that this optimizer can need, for `curvature(*optimizer.extensions)`."""
        return self._extensions(measure=True)

    def required_extensions(self) -> tuple[Extension | GraphExtension, ...]:
        """List what the upcoming step reads of the parameters.

        Returns:
            The extensions; between two measurements nothing but the loss where curvature is kept,
            and none with a given learning rate.
        """
        extensions = self._extensions(measure=self._measures)
        if extensions or not self.schedule.keeps or not self._reads_loss:
            return extensions
        return (LossValue(self._parameters.all()),)

    def accumulated_extensions(self) -> tuple[Extension | GraphExtension, ...]:
        """List what `accumulate` reads after a micro-batch of the upcoming step.

        Returns:
            The extensions, those of `required_extensions` unless a subclass needs fewer.
        """
        return self.required_extensions()

    @property
    def _measures(self) -> bool:
        """Whether curvature is measured in the upcoming step."""
        if self.schedule.keeps:
            return self.steps >= self.next_measurement
        return self.schedule.measure_due(self.steps)

    @property
    def _models(self) -> bool:
        """Whether the step rule asks for something in the upcoming step."""
        asks = self.step_rule.extension is not None
        return asks and (self._measures or not self.schedule.keeps)

    @property
    def _reads_loss(self) -> bool:
        """Whether the loss bounds a step."""
        return self._adapts or self.region.enabled

    def _extensions(self, measure: bool) -> tuple[Extension | GraphExtension, ...]:
        wanted: list[Extension | GraphExtension | None] = []
        if measure or not self.schedule.keeps:
            wanted.append(self.step_rule.extension)
        if measure:
            wanted.append(self.curvature.extension)
        if any(wanted) and self._reads_loss:
            wanted.append(LossLimits())
        return tuple(
            {
                extension.savefield: extension for extension in wanted if extension is not None
            }.values()
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; its learning rate now is the one that schedules are relative to.

        Raises:
            ValueError: A setting is out of range, or is one that holds for the whole optimizer.
            TypeError: A parameter is complex or sparse.
        """
        for name in (
            inspect.signature(type(self)).parameters.keys()
            & param_group.keys() - self.defaults.keys()
        ):
            if name != "params":
                raise ValueError(
                    f"`{name}` holds for all parameter groups; pass it to {type(self).__name__}."
                )
        given = param_group.get("lr")
        if self.relative_lr and given not in (None, 1.0) and not self._told_relative:
            self._told_relative = True
            warn(
                f'finds its learning rate itself (`lr="auto"`): {given}, that of a parameter '
                "group, is taken as a factor of it. Leave it out, or give a number to all groups."
            )
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
    @telling()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        loss_fn: Callable[[], Any] | None = None,
    ) -> Any:
        """Take one step from the gradients and curvature on the parameters.

        Args:
            closure: recomputes loss, gradients and curvature; called once, before anything else.
            loss_fn: computes the loss of this step's batch once more, without gradients and without
                side effects (on running statistics, logs). Every fifth step calls it before and
                after the update, both times with the same random numbers, to adapt the damping;
                without it the damping stays relative but is not adapted.

        Returns:
            What the closure returned, else None.

        Raises:
            RuntimeError: Curvature is due and no parameter has any that was not used before; a
                gradient is sparse.
            UnsupportedError: A model is in `join`, where some processes take no part in the step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        refuse_join(self)
        if is_trial_step(self) and not self._has_fields():
            # There is no state to make before curvature is measured.
            return loss
        members = self._parameters.members()
        if not members:
            return loss
        trial = self._trial(self.loss_fn if loss_fn is None else loss_fn, members[0][1].device)
        # A caller's autocast would run the preconditioning in bfloat16.
        with torch.autocast(members[0][1].device.type, enabled=False):
            step = self._update(members)
        if step is not None and trial is not None and self._pending is not None:
            # The trial reads the loss anyway.
            step = self._settle()
        if step is not None:
            self._adapt(step, trial)
        return loss

    @torch.no_grad()
    @telling()
    def accumulate(self) -> None:
        """Take in the curvature of a micro-batch whose gradient is not all of the step's.

        Call it after the backward pass of every micro-batch but the last; `step` averages the
        curvature over all of them. So does the quadratic model of `lr="auto"`, for which inputs and
        cotangents of all layers are kept until then.

        Raises:
            RuntimeError: Curvature is due and no parameter has any that was not used before; or
                FSDP keeps the gradients of a micro-batch to itself.
        """
        members = self._parameters.members()
        parameters = (p for group in self.param_groups for p in group["params"])
        if not members and any(is_sharded(parameter) for parameter in parameters):
            raise RuntimeError(
                "`accumulate` expects gradients on the sharded parameters after every micro-batch, "
                "found none: FSDP keeps those that are not exchanged to itself. Leave out "
                "`set_requires_gradient_sync(False)`, so that every micro-batch is exchanged."
            )
        if members and self.accumulated_extensions():
            with torch.autocast(members[0][1].device.type, enabled=False):
                self._take_in(members)

    def _trial(self, loss_fn: Callable[[], Any] | None, device: torch.device) -> Trial | None:
        """Evaluate the loss before a step after which the damping is to be adapted.

        In the step behind that one it is evaluated, too: if it is what it was after the update, all
        steps have the same batch.
        """
        if loss_fn is None or not self._adapts:
            return None
        after = self._after
        self._after = None
        if self.full_batch is False:
            after = None
        if after is None and not self.adaptation.due(self.steps):
            return None
        trial = Trial(loss_fn, device)
        if after is not None:
            self.full_batch = math.isclose(trial.before, after, rel_tol=1e-6)
        return trial

    def _adapt(self, step: Step, trial: Trial | None) -> None:
        if trial is not None and self.adaptation.due(self.steps - 1) and step.predicted is not None:
            if step.predicted:
                ratio = trial.change() / step.predicted
            else:
                ratio = math.nan
            self.relative_damping = self.adaptation.adapted(
                self.relative_damping,
                ratio,
                bool(self.full_batch),
            )
            self._last_step["reduction_ratio"] = ratio
            self.tried = True
            self._after = trial.after
        elif not self.tried and not self.adaptation.due(self.steps - 1):
            self.relative_damping = self.adaptation.annealed(self.relative_damping)

    @property
    def _adapts(self) -> bool:
        return any(group["damping"] == "auto" for group in self.param_groups)

    def _update(self, members: list[Member]) -> Step | None:
        """Measure, precondition, bound, move; None if something is not finite and nothing moved."""
        self._settle()
        params = [param for _, param in members]
        gradients = [gradient(param) for param in params]
        readings = Readings(self._watch.next(params))
        warn_of = partial(self._parameters.warn_of_skipped, "gradients", params)
        flags = readings.finite(gradients, warn_of)
        if all(flags):
            self._take_in(members)
        else:
            self._take_limits(members)
        micro_batches, self._micro_batches = self._micro_batches, MicroBatches()
        if readings.at_once:
            return self._made(members, micro_batches, readings, flags)
        before = self._known()
        try:
            return self._made(members, micro_batches, readings, flags)
        except Surprise:
            self._go_back(before)
            readings = Readings()
            flags = readings.finite(gradients)
            return self._made(members, micro_batches, readings, flags)

    def _made(
        self,
        members: list[Member],
        micro_batches: MicroBatches,
        readings: Readings,
        flags: list[bool],
    ) -> Step | None:
        """Make a step of what the micro-batches have left; None if nothing moves.

        Args:
            members: parameters that move.
            micro_batches: of the step.
            readings: of the step.
            flags: whether the gradients of the members are finite.

        Raises:
            Surprise: Something does not hold that was taken to hold; no parameter has moved.
        """
        before = None if readings.at_once else self._known()
        former_limits = self.region.memory.get("limits")
        limits = StepLimits(micro_batches.limits, self.curvature_scale, former_limits, readings)
        # Known to the host at once, or when the readings are.
        bounds = cache(lambda: self._bounds(limits.numbers()))
        parameters = self._parameters
        if readings.at_once:
            if self._failed(limits.numbers(), members, all(flags)):
                self._take_back(members)
                return None
            if not all(flags):
                parameters.warn_of_skipped("gradients", [param for _, param in members], flags)
                return None
            bounds()
            floor: float | Tensor = self.loss_floor
            radius: float | Tensor = self.region.radius
        else:
            floor = limits.floor(self.loss_floor)
            radius = limits.radius(self.region, readings)
        is_measured = self._measures
        curvature = self.curvature
        if is_measured:
            parameters.agree(members)
        blocks = parameters.blocks(members)
        if is_measured:
            means = micro_batches.means()
            absorb(curvature, parameters, blocks, means, self.curvature_scale, floor, readings)
        dampings = self._dampings(blocks, floor)
        all_parts, self._overdue = self._overdue, False
        refresh(
            curvature,
            self.schedule,
            parameters,
            blocks,
            dampings,
            self.steps,
            readings,
            all_parts,
            self.interval,
        )
        # Gradients of the whole data have no noise to average away, and the quadratic model has a
        # momentum of its own.
        has_model = self.step_rule.extension is not None
        lengths: Lengths = {}
        if self.region.enabled:
            lengths = bounding_lengths([param for _, param in members if param.dim() > 1])
        average = not (self.full_batch and has_model)
        found_directions = directions(
            curvature,
            parameters,
            blocks,
            dampings,
            micro_batches.jacobians,
            average,
            radius,
            lengths if self.region.enabled else None,
        )
        step = self.step_rule(found_directions, self.curvature_scale, bounds, readings)
        if before is not None and has_model:
            # All was read that there was up to here: if the updates are not finite, it stays.
            before, radius = self._known(), self.region.radius
        moving = [direction.param for direction in found_directions]
        updates = dict(zip(moving, step.updates, strict=True))
        # What the region takes back, and what the model has as its last direction.
        remembers = self.region.enabled or has_model
        moved = move(
            parameters, members, updates, step, self.region, readings, radius, lengths, remembers
        )
        if moved is None:
            return None
        if is_measured and self.schedule.keeps:
            self._plan(bounds()[0])
        self.steps += 1
        if not all(self._fits(block) for block in blocks):
            self.next_measurement = min(self.next_measurement, self.steps)
        report = {**step.report, "damping": self.relative_damping}
        finish = partial(self._finish, bounds, moved, report)
        if before is None:
            return finish()
        readings.send()
        self._pending = Pending(readings, before, finish)
        return step

    def _finish(
        self, bounds: Callable[[], tuple[float, float]], moved: Moved, report: dict[str, float]
    ) -> Step:
        """Remember a step whose numbers are known."""
        bounds()
        step = moved.finish(self.region)
        if step.predicted is not None:
            report["predicted"] = step.predicted
        self._last_step = report
        return step

    def _settle(self) -> Step | None:
        """Read what the last step has left on the device; None if that was nothing, or no step.

        If something does not hold that was taken to hold, no parameter has moved: what the
        optimizer knew before is known again. The step still counts, as `required_extensions` of
        the next one may have been asked.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        if pending.readings.receive():
            return pending.finish()
        self._go_back(pending.before)
        self._last_step = {}
        # Inverses may be missing that were due then.
        self._overdue = True
        self.next_measurement = min(self.next_measurement, self.steps + 1)
        return None

    def _known(self) -> Known:
        """What a step changes besides the parameters and the schedule."""
        return Known.to(self, [name for name in SAVED if name not in SCHEDULE])

    def _go_back(self, known: Known) -> None:
        """Undo what was done since `_known`; for some steps everything is then read at once."""
        known.restore(self)
        self._watch.begin()

    def _plan(self, max_decrease: float) -> None:
        """Decide when curvature is measured next.

        Without a bound the curvature of a loss can grow without warning; whoever pays for `loss_fn`
        has it compared with a model of every step.
        """
        bounded = math.isfinite(max_decrease) and not self.loss_size
        holds = bounded and not self.tried and bool(self.step_rule.memory.get("holds"))
        self.interval = self.schedule.next_interval(self.steps, self.interval, holds)
        self.next_measurement = self.steps + self.interval

    def _fits(self, block: Block) -> bool:
        """Whether curvature that is kept of a block is that of the parameters it has now."""
        state = self.state[block.params[0]]
        return not self.curvature.measured(state) or self.curvature.fits(state, block)

    def _dampings(self, blocks: Sequence[Block], floor: float | Tensor) -> Dampings:
        """What gives the dampings of the blocks with curvature, by their first parameter."""
        dampings: Dampings = {}
        for block in blocks:
            first = block.params[0]
            state = self.state[first]
            if self.curvature.measured(state):
                # Between measurements most of them are not asked for.
                damping = partial(
                    block_damping, self.curvature, state, block, self.relative_damping, floor
                )
                dampings[first] = cache(damping)
        return dampings

    def _has_fields(self) -> bool:
        """Whether a backward pass has left anything for the upcoming step."""
        fields = {extension.savefield for extension in self.extensions}
        return any(not fields.isdisjoint(vars(param)) for param in self._parameters.all())

    def _taken(self, extension: Extension, members: list[Member]) -> dict[Tensor, Any]:
        """The new fields of an extension, each only once."""
        inbox = self._inboxes.setdefault(extension.savefield, Inbox(extension.savefield))
        fields = inbox.take([param for _, param in members])
        if not fields:
            is_trial = not self.state and not any(group["lr"] for group in self.param_groups)
            hint = f" {WHOLE_STATE}" if is_trial else ""
            raise RuntimeError(missing(self, extension.savefield, self.steps) + hint)
        return fields

    def _take_in(self, members: list[Member]) -> None:
        """Take what one backward pass left on the parameters."""
        extension = self.curvature.extension
        rule = self.step_rule.extension
        fields: dict[Tensor, Any] = {}
        if rule is not None and self._models:
            fields = self._taken(rule, members)
            self._micro_batches.jacobians.append(fields)
        if self._measures:
            if rule is None or rule.savefield != extension.savefield:
                fields = self._taken(extension, members)
            blocks = self._parameters.paired(members, self.curvature.pairs(fields), fields)
            self._micro_batches.add(
                statistics(
                    self.curvature, self._parameters, blocks, fields, self.steps, self.batch_size
                )
            )
        elif self.schedule.keeps and rule is not None:
            # Left by `curvature(*optimizer.extensions)` in every step; they hold the activations.
            for _, param in members:
                vars(param).pop(rule.savefield, None)
        self._take_limits(members)

    def _take_limits(self, members: list[Member]) -> None:
        """Take the limits of the loss off the parameters: all have the same, which is kept once."""
        popped = [vars(param).pop("loss_limits", None) for _, param in members]
        self._micro_batches.limits += [limits for limits in popped if limits is not None][:1]

    def _failed(self, limits: list[float], members: list[Member], are_finite: bool) -> bool:
        """Whether the last step led astray: the loss is far too high, and rises towards here.

        One batch may be undefined by itself; after a second one in a row the parameters are to
        blame.
        """
        if not limits:
            return False
        *_, loss, _ = limits
        memory = self.region.memory
        undefined_before = bool(memory["undefined"])
        memory["undefined"] = float(not are_finite)
        if not self.region.suspects(loss):
            return False
        if not are_finite:
            return undefined_before
        return not math.isfinite(loss) or slope_of_last(self._parameters, members) > 0

    def _take_back(self, members: list[Member]) -> None:
        """Undo the last step; the next ones are shorter and more damped."""
        undo(self._parameters, members)
        self.region.reject()
        self.next_measurement = self.steps
        ceiling = self.adaptation.ceiling
        self.relative_damping = min(REJECTED * self.relative_damping, ceiling)
        self._last_step = {"rejected": 1.0, "damping": self.relative_damping}

    def _bounds(self, limits: list[float]) -> tuple[float, float]:
        """How much a step may promise, and how far it may go; keeps the least damping."""
        if not limits:
            return math.inf, math.inf
        self.region.memory.update(limits=limits, undefined=0.0)
        self.loss_floor, bound, size, reach, loss, samples = limits
        self.batch_size = self.batch_size or samples
        is_bounded = math.isfinite(bound)
        # At once an unbounded loss may be zero on its way to negative numbers.
        if self.loss_size:
            self.loss_size = LOSS_DECAY * self.loss_size + (1 - LOSS_DECAY) * size
        else:
            self.loss_size = size
        self.region.accept(loss, is_bounded, samples if self.relative_lr else 0.0)
        max_decrease = self.region.max_decrease(bound, max(size, self.loss_size))
        return max_decrease, reach * self.region.radius if self.region.enabled else math.inf

    @property
    def memories(self) -> list[dict[str, Any]]:
        """What the trust region and the step rule remember, plain numbers."""
        return [self.region.memory, self.step_rule.memory]

    @memories.setter
    def memories(self, memories: list[dict[str, Any]]) -> None:
        self.region.memory, self.step_rule.memory = (dict(memory) for memory in memories)

    @property
    def _parameters(self) -> Parameters:
        return Parameters(self.param_groups, self.state)

    def summary(self) -> dict[str, str]:
        """Tell which update each parameter gets.

        Returns:
            "curvature", "fallback", "frozen", or "not seen" before its first step, by the
            parameter's name.
        """
        self._settle()
        return self._parameters.summary(self.curvature)

    def state_dict(self) -> dict[str, Any]:
        """Settings, state and step count: tensors and plain types only.

        Of sharded parameters it is the same in all processes, packed for
        `torch.distributed.checkpoint`; where inverses are sharded, too, all processes call it.
        """
        self._settle()
        saved = {**super().state_dict(), **{name: getattr(self, name) for name in SAVED}}
        params = self._parameters.all()
        if any(map(is_sharded, params)):
            return self._packed(saved, params)
        saved["state"] = {
            number: self.curvature.saved(state) for number, state in saved["state"].items()
        }
        return saved

    def _packed(self, saved: dict[str, Any], params: Sequence[Tensor]) -> dict[str, Any]:
        """The state as `torch.distributed.checkpoint` takes it, the same in all processes."""
        numbers = {name: saved[name] for name in SAVED}
        values = [
            {
                "numbers": numbers,
                "state": with_all_inverses(self.curvature, saved["state"].get(i, {})),
            }
            for i in range(len(params))
        ]
        return packed({**saved, "state": {}}, params, values, self.steps)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, every tensor in the dtype that it was saved in.

        The state of another optimizer says nothing about curvature, and its settings mean something
        else: it is left out with a warning.

        Raises:
            RuntimeError: Steps were taken, and what they left in the state is not there, or not
                all of it.
        """
        state_dict, values = unpacked(state_dict, type(self).__name__)
        for key, value in values.items():
            state_dict.update(value["numbers"])
            if value["state"]:
                state_dict["state"][key] = value["state"]
        if "steps" not in state_dict:
            warn(
                f"found a checkpoint without the state of {type(self).__name__} (its keys are "
                f"{sorted(state_dict)}); curvature and settings start anew."
            )
            return
        if state_dict["steps"] and not state_dict["state"]:
            raise RuntimeError(
                f"{type(self).__name__} expects the state of its {state_dict['steps']} steps, "
                f"found that of no parameter. {WHOLE_STATE}"
            )
        self._pending = None
        super().load_state_dict(state_dict)
        self.state.update(restored_state(state_dict, self.param_groups))
        keep_own_inverses(self.curvature, self.state.values())
        for name in SAVED:
            setattr(self, name, state_dict.get(name, getattr(self, name)))

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        own = {name: getattr(self, name) for name in (*SETTINGS, *SAVED)}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_inboxes" not in self.__dict__:  # weak references are neither copied nor pickled
            self._inboxes = {}
            self._last_step = {}
            self._pending = None
            self._watch = Watch()
            self._overdue = False
            self.loss_fn = None
            self._micro_batches = MicroBatches()


def _check_param(param: Tensor) -> None:
    require_gatherable(param)
    if param.is_complex() or param.layout != torch.strided:
        kind = "complex" if param.is_complex() else "sparse"
        raise TypeError(
            f"Curvature needs real dense parameters, found a {kind} one of shape "
            f"{tuple(param.shape)}."
        )
