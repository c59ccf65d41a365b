"""Step lengths from curvature for any optimizer: training without a learning rate."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_curv.distributed.failures import telling
from lightning_curv.distributed.replicas import refuse_join
from lightning_curv.distributed.shards import is_sharded
from lightning_curv.extensions import Extension
from lightning_curv.extensions.columns import ExactGGN, MonteCarloGGN
from lightning_curv.optimizers.curvature.base import ParamGroup
from lightning_curv.optimizers.curvature.empirical import curved
from lightning_curv.optimizers.curvature.fields import Inbox, missing
from lightning_curv.optimizers.curvature.part import JacobianPart
from lightning_curv.optimizers.linear_algebra.collectives import averaged
from lightning_curv.optimizers.linear_algebra.readings import Readings
from lightning_curv.optimizers.settings import require_choice, require_count, require_positive
from lightning_curv.optimizers.step.parameters import Parameters, gradient
from lightning_curv.optimizers.step.restore import copied
from lightning_curv.optimizers.step_size.quadratic_model import curvature_along
from lightning_curv.optimizers.step_size.step_length import StepLength
from lightning_curv.optimizers.warn import warn
from lightning_curv.terms.jacobian import Jacobian

# So many intervals at the start have a measurement in every step: the first ones count most.
DENSE_INTERVALS = 2


class CurvatureStepSize(Optimizer):
    r"""Any optimizer's directions, and step sizes from the curvature of the loss along them.

    The optimizers inside make a direction $d$: the change that they would make of the parameters at
    learning rate 1. The update is $u = \alpha_t \eta_t d$, where $\eta_t$ is what a schedule makes
    of `lr`, 1 otherwise, and $\alpha_t$ the minimum of a quadratic model of the loss along the
    directions of the last steps,

    $$\alpha = 1.3 \, \frac{\overline{s}}{\overline{c}}, \qquad
      s = \frac{u^\top G u - g^\top u}{\alpha \eta}, \quad c = \frac{u^\top G u}{(\alpha \eta)^2},$$

    each per $\|d\|^2$. $g$ is the gradient that the *next* batch finds at the end of the update,
    $G$ the generalized Gauss-Newton matrix of a part of that batch, measured every few steps; the
    means span the last half of the run so far. A batch's own gradient promises more than the loss
    will hold, since its noise is in the direction, in the slope and in the curvature: one tenth of
    $\alpha$ comes from such a model, which also bounds it, and gives the first step.

    Updates grow by a tenth per step at most, and promise no more than the loss is worth. The next
    batch shows for free whether one was far too long: a gradient or a loss that is not finite, a
    loss ten mean deviations above its mean, or a slope that rises more than five times as steeply
    as it fell. Such an update is undone, the gradient thrown away, and steps go on half as long.
    Its slope and loss enter the means all the same, no further off than what condemns a step: of
    batches with rare heavy samples none would be heard otherwise.

    Weight decay is decoupled, whatever the optimizer inside makes of it: parameters shrink by
    $\alpha_t \eta_t w$.

    Args:
        optimizer: Makes the directions; a sequence of several, for different parameters, makes one
            direction. Their learning rates are the weights of their parameters in it, and are
            replaced by these weights, the largest being 1: values that schedulers set are factors.
        interval: Measure the curvature every so many steps; at the start in every step.
        max_samples: Measure it on so many samples of a batch, drawn at random.
        curvature: "mc" draws targets from the model, "exact" propagates one column per output,
            which costs the same where there is one. Where the loss has no second derivative or is
            piecewise linear, both take the gradients of the samples, divided by the root of the
            loss, and warn.

    Attributes:
        optimizers: Those inside.
        last_step: "learning_rate" $\alpha$ of the last step, 0 if it was undone; for logs.
        steps: How many steps were taken.
        curvature_scale: What the mean curvature of the backward passes of a step lacks to be that
            of the loss whose gradient the parameters carry, as in `SecondOrderOptimizer`.

    Raises:
        TypeError: An optimizer needs a closure of its own, or reads more of the data than the
            gradient.
        ValueError: A setting is out of range.

    Cost: a backward pass without parameter gradients, and about a forward pass of `max_samples`
        samples for each of two directions, when curvature is measured; else three inner products
        and two copies of the parameters. Memory: two copies of the parameters; the inputs and
        cotangents of the layers for these samples until `step`.

    Example:
        >>> import torch
        >>> from lightning_curv import curvature
        >>> from lightning_curv.optimizers import CurvatureStepSize
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> layer = torch.nn.Linear(1, 1)
        >>> optimizer = CurvatureStepSize(torch.optim.SGD(layer.parameters()), curvature="exact")
        >>> for _ in range(60):
        ...     optimizer.zero_grad()
        ...     with curvature(*optimizer.required_extensions()):
        ...         loss = torch.nn.functional.mse_loss(layer(x), 3 * x + 1)
        ...         loss.backward()
        ...     optimizer.step(loss=loss)
        >>> round(layer.weight.item(), 3), round(layer.bias.item(), 3)
        (3.0, 1.0)

    Source: V. Roulet et al., *Stepping on the Edge: Curvature Aware Learning Rate Tuners*, NeurIPS
        2024, for the ratio of running means of slope and curvature along any optimizer's direction;
        Z. Bu, S. Xu, *Gradient descent with generalized Newton's method*, ICLR 2025, for measuring
        it every few steps. The held-out model and its checks are this project's own.
    """

    # Learning rates of groups and schedulers are factors of one that is found.
    relative_lr = True
    # The momentum of the optimizers inside is what it was.
    finds_momentum = False

    def __init__(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        interval: int = 8,
        max_samples: int = 64,
        curvature: Literal["mc", "exact"] = "mc",
    ) -> None:
        require_count("interval", interval)
        require_count("max_samples", max_samples)
        require_choice("curvature", curvature, ("mc", "exact"))
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        for inner in optimizers:
            _refuse(inner)
        self.optimizers = optimizers
        self.interval = interval
        self.curvature_scale = 1.0
        self.steps = 0
        self.last_step: dict[str, float] = {}
        self.step_length = StepLength()
        source = MonteCarloGGN() if curvature == "mc" else ExactGGN()
        extension: Extension = JacobianPart(source, max_samples)
        curved(extension)
        self._extension = extension
        self._inbox = Inbox(extension.savefield)
        self._micro_batches: list[dict[Tensor, Jacobian]] = []
        self._updates: dict[Tensor, Tensor] = {}
        self._last_rate = 0.0
        groups = [group for inner in optimizers for group in inner.param_groups]
        largest = max(_positive_lr(group) for group in groups)
        for group in groups:
            group["lr"] = _positive_lr(group) / largest
        self._built = False
        # The defaults of one optimizer are nothing to the groups of another.
        super().__init__(groups, {})
        self._built = True
        self.defaults = optimizers[0].defaults
        for inner in optimizers:
            self.state.update(inner.state)
        self._share()

    def _share(self) -> None:
        """Share the groups and one state with the optimizers inside.

        So it does not matter which of them a scheduler or a checkpoint looks at.
        """
        start = 0
        for inner in self.optimizers:
            end = start + len(inner.param_groups)
            inner.param_groups = self.param_groups[start:end]
            inner.state = self.state
            start = end

    @property
    def extensions(self) -> tuple[Extension, ...]:
        """The extension that this optimizer can need, for `curvature(*optimizer.extensions)`."""
        return (self._extension,)

    def required_extensions(self) -> tuple[Extension, ...]:
        """List what the upcoming step reads of the parameters.

        Returns:
            The extension; nothing between two measurements.
        """
        return self.extensions if self._measures else ()

    def accumulated_extensions(self) -> tuple[Extension, ...]:
        """List what `accumulate` reads after a micro-batch of the upcoming step.

        Returns:
            What `required_extensions` returns.
        """
        return self.required_extensions()

    @property
    def _measures(self) -> bool:
        """Whether curvature is measured in the upcoming step."""
        is_start = self.steps < DENSE_INTERVALS * self.interval
        return is_start or self.steps % self.interval == 0

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group between steps; its `lr` is a weight, 1 if left out.

        Raises:
            ValueError: There are several optimizers inside, or a learning rate is not positive.
        """
        # The constructor of the base class calls this with groups that are inside already.
        if self._built and len(self.optimizers) > 1:
            raise ValueError(
                f"Expected one optimizer inside to add parameters to, found "
                f"{len(self.optimizers)}; add the group to one of them and build "
                "CurvatureStepSize anew."
            )
        if self._built:
            self.optimizers[0].add_param_group({"lr": 1.0, **param_group})
            self.param_groups = self.optimizers[0].param_groups
        else:
            super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.setdefault("base_lr", _positive_lr(group))

    @torch.no_grad()
    def accumulate(self) -> None:
        """Take in the curvature of a micro-batch whose gradient is not all of the step's.

        Call it after the backward pass of every micro-batch but the last; `step` averages the
        curvature over all of them.
        """
        self._take_in([param for _, param in self._parameters.members()])

    @torch.no_grad()
    @telling()
    def step(self, closure: Callable[[], Any] | None = None, loss: Any = None) -> Any:
        """Take one step from the gradients and curvature on the parameters, or undo the last one.

        Args:
            closure: Recomputes loss, gradients and curvature; called once, before anything else.
            loss: Of this batch, as the closure would return it: shows whether the last step was far
                too long. In distributed training all processes give one, or none does.

        Returns:
            What the closure returned, else None.

        Raises:
            RuntimeError: Curvature is due and no parameter has any that was not used before; a
                gradient is sparse.
            TypeError: Parameters are sharded.
            UnsupportedError: A model is in `join`, where some processes take no part in the step.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = loss = closure()
        refuse_join(self)
        params = [param for _, param in self._parameters.members()]
        if not params:
            return result
        if any(map(is_sharded, params)):
            raise TypeError(
                "CurvatureStepSize expects whole parameters in every process, found sharded ones "
                "(`DTensor`). Train with DDP, or give the optimizer inside a learning rate."
            )
        # A caller's autocast would run the products in bfloat16.
        with torch.autocast(params[0].device.type, enabled=False):
            self._take_in(params)
            # Taken out before anything is decided: a step that is undone must not leave them for
            # the next one.
            batches, self._micro_batches = self._micro_batches, []
            if self._measures and not batches:
                raise RuntimeError(missing(self, self._extension.savefield, self.steps))
            value = self._value(loss, params[0].device)
            if self._holds(params, batches, value):
                self._move(params, batches, value)
        return result

    def _take_in(self, params: Sequence[Tensor]) -> None:
        """Take what one backward pass left on the parameters."""
        fields = self._inbox.take(params)
        if fields:
            self._micro_batches.append(fields)

    def _value(self, loss: Any, device: torch.device) -> float | None:
        """The loss of all processes, which is their mean."""
        if loss is None:
            return None
        # A copy: the sum over the processes is written into it, and the loss is the user's.
        return float(averaged(torch.as_tensor(loss, device=device).detach().clone()))

    def _holds(
        self,
        params: Sequence[Tensor],
        batches: Sequence[dict[Tensor, Jacobian]],
        loss: float | None,
    ) -> bool:
        """Whether the last step holds on this batch; else it is undone, and no step is made."""
        gradients = [gradient(param) for param in params]
        # Forgotten now: an update is judged once, by the very next batch.
        updates, self._updates = self._updates, {}
        flags = Readings().finite(gradients)
        is_finite = all(flags)
        is_bad = not is_finite or (loss is not None and self.step_length.exploded(loss))
        if loss is not None and math.isfinite(loss):
            self.step_length.add_loss(loss)
        # Where other parameters move now, the two slopes are not along the same direction.
        if is_finite and self._last_rate and updates.keys() == set(params):
            last = [updates[param] for param in params]
            slope, square = _slope_and_square(gradients, last)
            if square > 0:
                self._measure(self.step_length.held_out.measure, params, last, batches, square)
                is_bad |= self.step_length.overshot(slope, square, self._last_rate)
                self.step_length.look_back(slope, square, self._last_rate)
        if is_bad and updates:
            # No copy of the parameters is kept: what was added is subtracted, up to rounding.
            for param, update in updates.items():
                param.sub_(update)
            self.step_length.back_off()
            self.last_step = {"learning_rate": 0.0}
            return False
        if not is_finite:
            self._parameters.warn_of_skipped("gradients", params, flags)
            return False
        return True

    def _measure(
        self,
        model: Callable[[float, float], None],
        params: Sequence[Tensor],
        directions: Sequence[Tensor],
        batches: Sequence[dict[Tensor, Jacobian]],
        square: float,
    ) -> None:
        """Let a model take in the curvature along a direction, if this step measures it."""
        if not batches:
            return
        # By position: the directions are a list in the order of the parameters.
        numbered = [
            {i: batch[param] for i, param in enumerate(params) if param in batch}
            for batch in batches
        ]
        along = curvature_along(numbered, [direction[None] for direction in directions])
        model(float(averaged(along)) * self.curvature_scale, square)

    def _move(
        self,
        params: Sequence[Tensor],
        batches: Sequence[dict[Tensor, Jacobian]],
        loss: float | None,
    ) -> None:
        """Let the optimizers inside make a direction, and go along it."""
        # The optimizers inside write into the parameters: their step of rate one is the direction.
        before = [param.detach().clone() for param in params]
        with self._at_rate_one():
            for inner in self.optimizers:
                inner.step()
        directions = torch._foreach_sub([param.detach() for param in params], before)
        for param, old in zip(params, before, strict=True):
            param.copy_(old)
        slope, square = _slope_and_square([gradient(param) for param in params], directions)
        if not (math.isfinite(slope) and math.isfinite(square)):
            flags = Readings().finite(directions)
            self._parameters.warn_of_skipped("directions", params, flags)
            return
        self._measure(self.step_length.own.measure, params, directions, batches, square)
        rate = self.step_length.next(slope, square, loss)
        groups = {param: group for group, param in self._parameters.members()}
        factors = [float(groups[param]["lr"]) / groups[param]["base_lr"] for param in params]
        for param, update, factor in zip(params, directions, factors, strict=True):
            # Decoupled: the decay is no part of the direction, whose length is measured.
            decay = rate * float(groups[param]["lr"]) * groups[param].get("weight_decay", 0.0)
            if decay:
                param.mul_(1 - min(decay, 1.0))
            param.add_(update.mul_(rate * factor))
        self._updates = dict(zip(params, directions, strict=True))
        # Schedules of several groups are one as a rule.
        self._last_rate = rate * sum(factors) / len(factors)
        self.last_step = {"learning_rate": rate}
        self.steps += 1

    @contextmanager
    def _at_rate_one(self) -> Iterator[None]:
        """Groups as if there were neither schedule nor weight decay."""
        kept: list[dict[str, Any]] = [
            {name: group[name] for name in ("lr", "weight_decay") if name in group}
            for group in self.param_groups
        ]
        try:
            for group, settings in zip(self.param_groups, kept, strict=True):
                # Decay off: optimizers would make it a part of their steps.
                group.update(dict.fromkeys(settings, 0.0))
                group["lr"] = group["base_lr"]
            yield
        finally:
            for group, settings in zip(self.param_groups, kept, strict=True):
                group.update(settings)

    @property
    def _parameters(self) -> Parameters:
        return Parameters(self.param_groups, self.state)

    def state_dict(self) -> dict[str, Any]:
        """The state of the optimizers inside, and the last step.

        Returns:
            State and groups of all optimizers as those of one; under ``"step_size"`` tensors and
            plain types.
        """
        # Checkpoints know parameters by their number, as those of torch do.
        numbers = {param: number for number, param in enumerate(self._parameters.all())}
        own = {
            "steps": self.steps,
            "step_length": self.step_length.state_dict(),
            "last_rate": self._last_rate,
            "updates": {numbers[param]: update for param, update in self._updates.items()},
        }
        return {**super().state_dict(), "step_size": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; a state of the optimizer inside, too."""
        state = dict(state_dict)
        own = state.pop("step_size", None)
        weights = [(group["lr"], group["base_lr"]) for group in self.param_groups]
        super().load_state_dict(state)
        self._share()
        if own is None:
            warn(
                "found a checkpoint without the state of CurvatureStepSize, saved by the optimizer "
                "inside; step sizes start anew."
            )
            for group, (lr, base_lr) in zip(self.param_groups, weights, strict=True):
                group.update(lr=lr, base_lr=base_lr)
            return
        self.steps = own["steps"]
        self.step_length = StepLength.restored(own["step_length"])
        self._last_rate = own["last_rate"]
        params = self._parameters.all()
        self._updates = {
            params[number]: copied(update, params[number].device)
            for number, update in own["updates"].items()
        }

    def __getstate__(self) -> dict[str, Any]:
        # All of it: the base class would keep groups and state alone.
        return dict(self.__dict__)


def _slope_and_square(gradients: Sequence[Tensor], along: Sequence[Tensor]) -> tuple[float, float]:
    """The slope downhill along a vector, $-g^T d$, and its squared length, read at once."""
    device = along[0].device
    products = []
    for g, d in zip(gradients, along, strict=True):
        wide = torch.promote_types(d.dtype, torch.float32)
        flat = d.flatten().to(wide)
        pair = torch.stack([torch.dot(g.flatten().to(wide), flat), torch.dot(flat, flat)])
        products.append(pair.to(device, torch.promote_types(wide, torch.float32)))
    slope, square = torch.stack(products).sum(0).tolist()
    return -slope, square


def _positive_lr(group: ParamGroup) -> float:
    lr = float(group["lr"])
    require_positive("lr", lr)
    return lr


def _refuse(optimizer: Optimizer) -> None:
    """Raise if the directions of an optimizer are none that a length can be found for.

    Raises:
        TypeError: It needs a closure, or reads more of the data than the gradient.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"CurvatureStepSize expects an optimizer or a sequence of some, found {optimizer!r}."
        )
    name = type(optimizer).__name__
    if hasattr(optimizer, "extensions") or hasattr(optimizer, "required_extensions"):
        raise TypeError(
            f"CurvatureStepSize expects an optimizer that reads the data by the gradient alone, "
            f"found {name}, which measures more on the batch (`extensions`) and would lack it, or "
            "its privacy. Use Muon, AdamW, SGD or another optimizer of gradients."
        )
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"CurvatureStepSize expects an optimizer whose `step` needs no closure, found {name}, "
            "which evaluates the loss several times per step. Use Muon, AdamW, SGD or another "
            "optimizer of one gradient per step."
        )
