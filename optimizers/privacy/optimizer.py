"""Differentially private steps with any optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_curv.distributed.failures import telling
from lightning_curv.distributed.replicas import refuse_join
from lightning_curv.distributed.shards import (
    find_shards,
    free,
    is_sharded,
    local,
    own_part,
    version,
)
from lightning_curv.errors import UnsupportedError
from lightning_curv.optimizers.linear_algebra.collectives import from_process_0
from lightning_curv.optimizers.packed_state import is_trial_step, packed, unpacked
from lightning_curv.optimizers.privacy.accounting import PrivacyAccountant, require_accountable
from lightning_curv.optimizers.privacy.clipped_sum import ClippedSum
from lightning_curv.optimizers.privacy.clipping import Clipping, clipping_rule
from lightning_curv.optimizers.privacy.group_clipping import PerGroupClipping
from lightning_curv.optimizers.privacy.noise import NoiseSource
from lightning_curv.optimizers.privacy.noisy_sum import summed_over_ranks
from lightning_curv.optimizers.privacy.schedule import Schedule, held_for, value_of
from lightning_curv.optimizers.settings import (
    require_choice,
    require_gatherable,
    require_positive,
)
from lightning_curv.precision import widest


class DPOptimizer(Optimizer):
    r"""Steps of another optimizer on a differentially private gradient.

    $$\tilde g = \frac1{\bar B} \Big(
      \sum_i \min(1, C / \|g_i\|)\, g_i + \sigma C\, \mathcal N(0, I)\Big)$$

    with the gradient $g_i$ of sample i's own loss by all trainable parameters together, and
    the *expected* batch size B̄. Samples are clipped before they are accumulated; noise is added
    once per step, to empty batches too. What the inner optimizer makes of $\tilde g$
    (momentum, Adam, weight decay) costs no privacy. Abadi et al., *Deep Learning with Differential
    Privacy*, CCS 2016.

    In Lightning add `PrivacyCallback()`, which draws the batches and keeps the account. Elsewhere
    draw Poisson batches and run every backward pass inside `curvature(*optimizer.extensions)`;
    without a pass a step is that of an empty batch. One backward pass is all it takes; no
    per-sample gradient is kept.

    Args:
        optimizer: Any torch optimizer whose step needs no closure. Its parameter groups are shared.
        clip_norm: C, or a function of the step's number such as `ExponentialSchedule`.
        noise_multiplier: σ; the standard deviation of the noise in the sum is σC. Or a function of
            the step's number, accounted value by value. `None`: the callback sets it.
        expected_batch_size: B̄, samples per step over all processes: sampling rate × data set size,
            not the size of the batch that was drawn. `None`: the callback sets it.
        clipping: `"flat"`, `"per_layer"`, `"automatic"` (normalisation), `"adaptive"` (C
            follows the median of the norms), `"per_group"` (every parameter group by its own
            `clip_norm`), or a `Clipping` with settings of your own.
        loss_reduction: Whether the loss of a backward pass is the `"mean"` or the `"sum"` of
            the losses of its samples. Any other factor on the loss goes to
            `optimizer.loss_scale`.
        accountant: Is told of every step.
        noise_seed: Makes the noise repeatable, for tests only.
        secure: Draw the noise from the operating system's entropy; slower.
        exact_resume: Save the state of the noise in `state_dict`, and go on with it in
            `load_state_dict`, instead of drawing fresh noise after every load. A run then resumes
            bit for bit, and two runs that go on from one checkpoint use the same noise: the
            difference of their weights has none, whatever ε says. Only where exactly one run goes
            on, and the checkpoint is kept secret.

    Attributes:
        steps: Steps so far, each of them a release; in the checkpoint too. Schedules go by it.
        noise_schedule, clip_schedule: The functions, if there are any; `noise_multiplier` and
            `clip_norm` are the values of the next step.

    Cost: a backward pass plus the norms, and about the memory of the activations once more.

    Raises:
        ValueError: An argument is out of range.
        TypeError: The inner optimizer reads the data by another way than the gradient, as
            `KFACOptimizer` does.
        RuntimeError: In `step`: a gradient that is not private, or σ or B̄ unknown.

    Example:
        >>> from lightning_curv import curvature
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> optimizer = DPOptimizer(
        ...     torch.optim.SGD(layer.parameters(), lr=0.1),
        ...     clip_norm=0.5, noise_multiplier=0.0, expected_batch_size=2,
        ... )
        >>> with curvature(*optimizer.extensions):
        ...     layer(torch.tensor([[3.0, 4.0], [0.0, 0.1]])).mean().backward()
        >>> optimizer.step()
        >>> layer.weight.grad  # the first sample has norm 5 and counts as 0.5
        tensor([[0.1500, 0.2500]])
    """

    def __init__(
        self,
        optimizer: Optimizer,
        clip_norm: float | Schedule = 1.0,
        noise_multiplier: float | Schedule | None = None,
        expected_batch_size: float | None = None,
        clipping: str | Clipping = "flat",
        loss_reduction: str = "mean",
        accountant: PrivacyAccountant | None = None,
        noise_seed: int | None = None,
        secure: bool = False,
        exact_resume: bool = False,
    ) -> None:
        _refuse_curvature(optimizer)
        for group in optimizer.param_groups:
            _require_gatherable(group)
        require_choice("loss_reduction", loss_reduction, ("mean", "sum"))
        if expected_batch_size is not None:
            require_positive("expected_batch_size", expected_batch_size)
        self.optimizer = optimizer
        # A torch optimizer itself: schedulers, the Trainer and checkpoints ask for one.
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._share()
        self.noise_schedule = noise_multiplier if callable(noise_multiplier) else None
        self.clip_schedule = clip_norm if callable(clip_norm) else None
        self.noise_multiplier = (
            None if noise_multiplier is None else value_of("noise_multiplier", noise_multiplier, 0)
        )
        if accountant is not None and self.noise_multiplier is not None:
            require_accountable(self.noise_multiplier)
        self.expected_batch_size = expected_batch_size
        first_norm = value_of("clip_norm", clip_norm, 0)
        self.clipping = (
            PerGroupClipping(optimizer, first_norm)
            if clipping == "per_group"
            else clipping_rule(clipping, first_norm)
        )
        self.loss_reduction = loss_reduction
        self.accountant = accountant
        self.exact_resume = exact_resume
        self.steps = 0
        self._schedule()
        self._noise = NoiseSource(noise_seed, secure)
        self._sum = ClippedSum(self._trainable(), self.clipping, loss_reduction == "mean")
        # The gradients that the last step left, and their versions.
        self._own: dict[Tensor, tuple[Tensor, tuple[int, int]]] = {}

    def _share(self) -> None:
        """Share one list of groups and one state.

        So it does not matter which of the two optimizers a scheduler or checkpoint looks at.
        """
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state

    def _schedule(self) -> None:
        """Set σ and C of the next step."""
        if self.noise_schedule is not None:
            self.noise_multiplier = value_of("noise_multiplier", self.noise_schedule, self.steps)
        if self.clip_schedule is not None:
            self.clipping.set_clip_norm(value_of("clip_norm", self.clip_schedule, self.steps))

    def same_noise(self, at_most: float) -> float:
        """For how many steps, from the next one on, σ is what it is now.

        Args:
            at_most: Number of steps to look ahead.

        Returns:
            A number from 1 on; `at_most` if σ does not change before.
        """
        if self.noise_schedule is None:
            return at_most
        return held_for(self.noise_schedule, self.steps, at_most)

    def _all(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _trainable(self) -> list[Tensor]:
        return [p for p in self._all() if p.requires_grad]

    def _refresh(self) -> None:
        """Look up which parameters are trained now: some may have been frozen, unfrozen or added.

        Those of earlier passes of the step stay.
        """
        # What passes were made of is in the sum already, whatever was frozen since.
        passed = self._sum.passes > 0
        self._sum.parameters = [
            p for p in self._all() if p.requires_grad or (passed and self._sum.receives(p))
        ]

    @property
    def extensions(self) -> tuple[ClippedSum, ...]:
        """What every backward pass computes, as `curvature(*optimizer.extensions)`."""
        self._refresh()
        return (self._sum,)

    @property
    def clip_norm(self) -> float:
        """The C of the next step."""
        return self.clipping.clip_norm

    @property
    def loss_scale(self) -> float:
        """The factor on the loss besides the mean over the samples of a pass.

        For example 1 / accumulated passes.
        """
        return self._sum.loss_scale

    @loss_scale.setter
    def loss_scale(self, value: float) -> None:
        self._sum.loss_scale = value

    @property
    def counted(self) -> Tensor | None:
        """Which samples of the next backward pass count, `[N]` of bool; `None`: all of them.

        Samples that do not count stand in: they fill a batch up to a number of rows that does not
        tell how many were drawn. torch may compute the last digits of a row otherwise in a batch of
        another shape, and a network may make much of them; in batches of one shape no sample
        changes a digit of another one. Draw the places of what stands in at random, with each
        batch, and set this anew for every pass.
        """
        return self._sum.counted

    @counted.setter
    def counted(self, value: Tensor | None) -> None:
        if value is not None and (value.dtype != torch.bool or value.ndim != 1):
            raise ValueError(
                f"`counted` must be one bool per sample, [N], found {list(value.shape)} of "
                f"{value.dtype}."
            )
        self._sum.counted = value

    @property
    def statistics(self) -> ClippedSum:
        """What is known of the samples since the last step. Not private."""
        return self._sum

    def add_empty_pass(self) -> None:
        """Count a backward pass that no sample took part in: its gradient is thrown away."""
        self._refresh()
        self._sum.passes += 1
        for parameter in self._all():
            parameter.grad = None

    def _raw_gradients(self) -> list[Tensor]:
        """The parameters with a gradient that no step of this optimizer left."""
        return [
            p
            for p in self._all()
            if p.grad is not None and not self._is_own(p, p.grad) and bool(local(p.grad).any())
        ]

    def renew_noise(self) -> None:
        """Go on with noise from fresh entropy, whatever seed or state there was."""
        self._noise = NoiseSource(secure=self._noise.secure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients and the sum since the last step."""
        self.optimizer.zero_grad(set_to_none)
        self._sum.forget()
        self._own = {}

    @torch.no_grad()
    @telling()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Privatise the gradient, tell the accountant, and let the inner optimizer step.

        Args:
            closure: Computes the loss and its gradients inside `curvature(*extensions)`; called
                once, before anything else.

        Returns:
            What the closure returned, else None.

        Raises:
            RuntimeError: A gradient comes from elsewhere and is not private, or σ or B̄ is unknown.
            UnsupportedError: A model is in `join`, where some processes take no part in the step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Parameters that a forward pass has left gathered would stay what they are now.
        free(find_shards(self._all()).values())
        # Before noise is drawn: a step that is refused releases nothing.
        refuse_join(self)
        self._refuse_unprivatised()
        if is_trial_step(self) and not self._sum.passes and not self._own:
            # Of gradients that are zeros, see above, and of no sample: nothing is released.
            self.optimizer.step()
            return loss
        sigma, size = self._settings()
        if self.accountant is not None:
            require_accountable(sigma)
        self._privatise(sigma, size)
        # Before the inner step: what can be seen is paid for, whatever happens next.
        if self.accountant is not None:
            self.accountant.step(sigma)
        self.steps += 1
        self._schedule()
        # All that follows is post-processing: it reads nothing but what was released.
        self.optimizer.step()
        return loss

    def _settings(self) -> tuple[float, float]:
        """The σ and B̄ of the step, both of which must be known by now."""
        for name in ("noise_multiplier", "expected_batch_size"):
            if getattr(self, name) is None:
                raise RuntimeError(
                    f"`{name}` must be known before the first step, found None; pass it to the "
                    "optimizer, or add `PrivacyCallback(...)`, which sets it, to the Trainer."
                )
        return (
            # both were compared with None above, by name, which no type checker follows
            float(self.noise_multiplier),  # type: ignore[arg-type]
            float(self.expected_batch_size),  # type: ignore[arg-type]
        )

    def _refuse_unprivatised(self) -> None:
        """Refuse gradients that no recorded pass explains; the sum replaces all others."""
        if self._sum.passes or not self._raw_gradients():
            return
        raise RuntimeError(
            "Expected gradients from backward passes inside `curvature(*optimizer.extensions)`, "
            "found one from elsewhere, which is not private. Use that context around "
            "`loss.backward()`, or add `PrivacyCallback` to the Trainer; an empty batch needs no "
            "backward pass at all."
        )

    def _is_own(self, parameter: Tensor, grad: Tensor) -> bool:
        """Whether the last step left this gradient, and nobody has added to it in place since."""
        own, its_version = self._own.get(parameter, (None, None))
        return own is grad and its_version == version(grad)

    def _privatise(self, sigma: float, size: float) -> None:
        self._refresh()
        totals, counts = self._sum.totals(), self.clipping.counts()
        # Asked first: a rule that counts learns from it how much noise its count gets.
        gradient_sigma = self.clipping.noise_multiplier(sigma, size)
        released = list(totals)
        stds = [gradient_sigma * self.clip_norm] * len(totals)
        # By the expected B̄: how many were drawn is private itself.
        divisors = [size] * len(totals)
        if counts is not None:
            device = totals[0].device
            released.append(counts.to(device, widest(device), copy=True))
            stds.append(self.clipping.count_noise(size))
            divisors.append(1.0)
        released = summed_over_ranks(released, stds, self._noise, divisors)
        noisy_counts = None if counts is None else released.pop()
        self._own = {}
        # Also where nothing was summed: the inner optimizer applies whatever it finds.
        for parameter in self._all():
            parameter.grad = None
        for parameter, total in zip(self._sum.parameters, released, strict=True):
            # The noisy sum is whole, and the same in all processes: each takes its part.
            parameter.grad = own_part(total.to(parameter.dtype), parameter)
            # An empty batch makes no pass: its step must not take this gradient for one from
            # elsewhere.
            self._own[parameter] = parameter.grad, version(parameter.grad)
        self.clipping.end_step(noisy_counts, size)
        self._sum.forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to both optimizers, between steps.

        Raises:
            UnsupportedError: A parameter is in parts that nobody gathers.
        """
        # The constructor of the base class calls this with groups that are shared already.
        if not hasattr(self, "_sum"):
            super().add_param_group(param_group)
            return
        self.optimizer.add_param_group(param_group)
        try:
            _require_gatherable(self.optimizer.param_groups[-1])
        except UnsupportedError:
            self.optimizer.param_groups.pop()
            raise
        self._share()

    def state_dict(self) -> dict[str, Any]:
        """The state of the inner optimizer, and what privacy needs besides.

        Returns:
            The inner optimizer's state; under `"privacy"` the account, the state of the clipping,
            the steps, and with `exact_resume` that of the noise. Of sharded parameters the latter
            is packed for `torch.distributed.checkpoint`, and all processes call this.
        """
        privacy: dict[str, Any] = {"clipping": self.clipping.state_dict(), "steps": self.steps}
        if self.exact_resume:
            privacy["noise"] = self._noise.state_dict()
        if self.accountant is not None:
            privacy["accountant"] = self.accountant.state_dict()
        state, params = self.optimizer.state_dict(), self._all()
        if not any(map(is_sharded, params)):
            return {**state, "privacy": privacy}
        if self.exact_resume:
            # Process 0 draws the noise: its state goes into the checkpoint, whoever writes that.
            noise = privacy["noise"].items()
            privacy["noise"] = {n: from_process_0(state, params[0].device) for n, state in noise}
        return packed(state, params, [privacy] * len(params), self.steps)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        What was spent stays spent, and the noise is fresh unless `exact_resume`.

        Args:
            state_dict: What `state_dict` returned.

        Raises:
            KeyError: It is the state of another optimizer, or lacks the state of the noise that
                `exact_resume` needs.
            RuntimeError: Some of the state of the inner optimizer is not there.
        """
        state, values = unpacked(dict(state_dict), type(self).__name__)
        # Every parameter has it.
        privacy = next(iter(values.values())) if values else state.pop("privacy", None)
        if privacy is None:
            raise KeyError(
                "Expected the state of a DPOptimizer with an entry 'privacy', found none: it was "
                "saved by another optimizer, and what that spent is unknown. Load it into "
                "`optimizer.optimizer` to go on regardless."
            )
        if self.exact_resume and not privacy.get("noise"):
            raise KeyError(
                "Expected the state of the noise for `exact_resume=True`, found none: it was saved "
                "without that option, before the first step, or with noise without a `noise_seed`. "
                "Leave `exact_resume` out to go on with fresh noise."
            )
        self.optimizer.load_state_dict(state)
        self._share()
        if self.exact_resume:
            self._noise.load_state_dict(privacy["noise"])
        else:
            self.renew_noise()
        self.clipping.load_state_dict(privacy["clipping"])
        self.steps = privacy.get("steps", 0)  # older versions kept none
        self._schedule()
        if self.accountant is not None and "accountant" in privacy:
            self.accountant.load_state_dict(privacy["accountant"])

    def __getstate__(self) -> dict[str, Any]:
        # A copy draws fresh noise: with the same noise the difference of two copies' weights would
        # have none. Its gradients are other tensors than those that the last step left.
        fresh_noise = NoiseSource(secure=self._noise.secure)
        return {**self.__dict__, "_noise": fresh_noise, "_own": {}}

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(clip_norm={self.clip_norm:.4g}, "
            f"noise_multiplier={self.noise_multiplier}, "
            f"expected_batch_size={self.expected_batch_size}, optimizer={self.optimizer!r})"
        )


def _require_gatherable(param_group: dict[str, Any]) -> None:
    """Refuse parameters that are in parts, unless FSDP2 gathers them for a pass."""
    for param in param_group["params"]:
        require_gatherable(param, "Private steps need")


def _refuse_curvature(optimizer: Optimizer) -> None:
    """Raise if an optimizer, or one inside it, reads more of the data than the gradient.

    Raises:
        TypeError: It does.
    """
    inner: Any = optimizer
    while isinstance(inner, Optimizer):
        measures = hasattr(inner, "required_extensions") or hasattr(inner, "extensions")
        if measures or isinstance(inner, DPOptimizer):
            raise TypeError(
                "DPOptimizer expects an optimizer that reads the data by the gradient alone, found "
                f"{type(inner).__name__}, which measures more on the batch (`extensions`): no "
                "noise covers that. Use SGD, Adam or another optimizer of gradients."
            )
        attributes = [value for name, value in vars(inner).items() if name != "self"]
        inner = next((value for value in attributes if isinstance(value, Optimizer)), None)


class DPSGD(DPOptimizer):
    """`DPOptimizer` around `torch.optim.SGD`.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate.
        momentum: Momentum; costs no privacy.
        weight_decay: Weight decay; costs no privacy.
        nesterov: Nesterov momentum.
        privacy: Arguments of `DPOptimizer`.

    Example:
        >>> DPSGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1, clip_norm=0.5).clip_norm
        0.5
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        **privacy: Any,
    ) -> None:
        inner = torch.optim.SGD(
            params, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov
        )
        super().__init__(inner, **privacy)


class DPAdam(DPOptimizer):
    """`DPOptimizer` around `torch.optim.AdamW`.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate.
        betas: Decay of the averages.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        privacy: Arguments of `DPOptimizer`.

    Example:
        >>> DPAdam([torch.nn.Parameter(torch.zeros(2))], clipping="automatic").clip_norm
        1.0
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **privacy: Any,
    ) -> None:
        inner = torch.optim.AdamW(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(inner, **privacy)
