"""The callback that makes training differentially private: batches, clipping, accounting, budget."""

from __future__ import annotations

import math
import secrets
from typing import Any

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import GradientAccumulationScheduler
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_curv.callbacks.import_names import Callback
from lightning_curv.callbacks.independence import refuse_coupled_samples
from lightning_curv.callbacks.poisson import PoissonBatchSampler
from lightning_curv.callbacks.private_loader import (
    ConvertedSource,
    dataset_size,
    require_plain_loader,
    with_batches,
)
from lightning_curv.callbacks.recorded_step import record_training_step, restore_training_step
from lightning_curv.context import curvature
from lightning_curv.optimizers.dp import DPOptimizer
from lightning_curv.optimizers.privacy_accounting import (
    METHODS,
    EpochSampling,
    PoissonSampling,
    PrivacyAccountant,
    Sampling,
    TruncatedPoissonSampling,
    calibrated_noise,
)
from lightning_curv.optimizers.settings import require_choice, require_positive

SAMPLINGS = ("poisson", "truncated_poisson", "epoch")


class PrivacyCallback(Callback):
    r"""Differentially private training of an ordinary `LightningModule` whose optimizer is a `DPOptimizer`.

    `training_step`, its scalar loss and the DataLoader stay as they are. The callback

    - draws Poisson batches from the loader's data set: every sample takes part in a step with probability
      q = B̄ / N, where B̄ = ``batch_size`` × ``accumulate_grad_batches`` × processes of the loader as written; each
      batch is split into exactly ``accumulate_grad_batches`` parts, so that `global_step`, schedulers and the length
      of an epoch are what they were;
    - listens to the user's own backward passes, so that the optimizer clips and adds noise;
    - accounts for every step with ``dp-accounting``, in the checkpoint too, and stops when the budget is spent.

    The guarantee is (ε, δ)-differential privacy of all weights that training ends with and passes through, for
    neighbouring data sets that differ by one sample. It does not cover statistics of the training data that you log
    or select by (a checkpoint by training loss). See `docs/privacy.md`.

    - ``privacy/epsilon``: ε spent, on the progress bar too
    - ``privacy/noise_multiplier``: σ
    - ``privacy/clip_norm``: C
    - ``privacy/noised_grad_norm``: ‖g̃‖
    - ``non_private/sample_norm_median|max``: quantiles of ‖g_i‖; only with ``log_non_private=True``
    - ``non_private/clipped_fraction``: share of samples with ‖g_i‖ > C; the same
    - ``non_private/discarded``: samples whose gradient was not finite; the same

    Args:
        epsilon: The budget ε; gives σ when the optimizer has none. ``None``: no budget.
        delta: δ, well below 1 / N.
        sampling: ``"poisson"``; ``"truncated_poisson"``, of whose batches at most ``max_batch_size`` samples are kept;
            ``"epoch"``, the loader as it is, accounted as one Gaussian mechanism per epoch without amplification.
        max_batch_size: Samples of the largest truncated batch, all processes and parts together.
        accountant: ``"pld"`` or ``"rdp"``.
        on_budget: ``"stop"`` before the step that would exceed ``epsilon``, or ``"warn"`` once and go on.
        every_n_steps: Steps between two evaluations of ε besides the end of every epoch (each takes up to a second).
        seed: Of the batches. It must be secret; default: from the operating system's entropy.
        check_independence: Compare, on the first batch, gradients in half of it with those in all of it.
        log_non_private: Log statistics of the samples.

    Raises:
        MisconfigurationException: In `fit`: something in the set-up is not private; the message says what to do.

    Example:
        >>> PrivacyCallback(epsilon=3.0, delta=1e-5).sampling
        'poisson'
    """

    def __init__(
        self,
        epsilon: float | None = None,
        delta: float = 1e-5,
        sampling: str = "poisson",
        max_batch_size: int | None = None,
        accountant: str = "pld",
        on_budget: str = "stop",
        every_n_steps: int | None = None,
        seed: int | None = None,
        check_independence: bool = True,
        log_non_private: bool = False,
    ) -> None:
        if epsilon is not None:
            require_positive("epsilon", epsilon)
        if not 0 < delta < 1:
            raise ValueError(f"`delta` must lie in (0, 1), well below 1 / data set size, found {delta}.")
        require_choice("sampling", sampling, SAMPLINGS)
        require_choice("accountant", accountant, METHODS)
        require_choice("on_budget", on_budget, ("stop", "warn"))
        if (max_batch_size is not None) != (sampling == "truncated_poisson"):
            raise ValueError(
                "`max_batch_size` belongs to `sampling='truncated_poisson'`, found "
                f"max_batch_size={max_batch_size} with sampling={sampling!r}."
            )
        self.epsilon, self.delta = epsilon, delta
        self.sampling, self.max_batch_size = sampling, max_batch_size
        self.accountant = PrivacyAccountant(method=accountant)
        self.on_budget, self.every_n_steps = on_budget, every_n_steps
        self.seed = seed
        self.check_independence, self.log_non_private = check_independence, log_non_private
        self.noise_multiplier: float | None = None
        self._forget_fit()

    def _forget_fit(self) -> None:
        """Forget everything that belongs to one `fit`."""
        self._source: ConvertedSource | None = None
        self._sampler: PoissonBatchSampler | None = None
        self._batch_size: int | None = None
        self._left = math.inf  # releases that the budget allows
        self._cost = True
        self._context: curvature | None = None
        self._size: int | None = None
        self._passes = self._expected_passes = 0
        self._checked = False
        self._spent = 0.0
        self._replaced: Any = None
        self._logged: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed, "noise_multiplier": self.noise_multiplier, **self.accountant.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seed, self.noise_multiplier = state_dict["seed"], state_dict["noise_multiplier"]
        self.accountant.load_state_dict(state_dict)

    # --- before training ---------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._restore(trainer)
        self._forget_fit()
        _refuse_trainer(trainer, pl_module)
        if self.sampling == "epoch":
            convert = self._keep_loader
        else:
            connector = trainer._accelerator_connector
            self._replaced, connector.use_distributed_sampler = connector.use_distributed_sampler, False
            convert = self._poisson_loader
        source = trainer.fit_loop._data_source
        self._source = ConvertedSource(source, lambda loader: convert(trainer, loader))
        trainer.fit_loop._data_source = self._source

    def _keep_loader(self, trainer: Trainer, loader: Any) -> Any:
        loader = require_plain_loader(loader)
        if dataset_size(loader) % trainer.world_size:
            raise MisconfigurationException(
                f"`sampling='epoch'` needs a data set that {trainer.world_size} processes can share evenly, found "
                f"{dataset_size(loader)} samples: Lightning would repeat some. Leave some out, or use Poisson sampling."
            )
        self._batch_size = loader.batch_size
        return loader

    def _poisson_loader(self, trainer: Trainer, loader: Any) -> Any:
        loader = require_plain_loader(loader)
        if self.seed is None:
            self.seed = trainer.strategy.broadcast(secrets.randbits(128))
        self._batch_size, size = loader.batch_size, dataset_size(loader)
        expected = self._expected_batch_size(trainer)
        if expected > size:
            raise MisconfigurationException(
                f"Expected no more samples per step than the data set has, {size}, found {expected:g} (batch size × "
                "accumulated batches × processes). Use a smaller `batch_size`."
            )
        self._sampler = PoissonBatchSampler(
            size,
            expected / size,
            steps=max(1, round(size / expected)),
            parts=trainer.accumulate_grad_batches,
            seed=self.seed,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            max_batch_size=self.max_batch_size,
            position=lambda: trainer.global_step,
        )
        return with_batches(loader, self._sampler)

    def _expected_batch_size(self, trainer: Trainer) -> float:
        assert self._batch_size is not None
        return float(self._batch_size * trainer.accumulate_grad_batches * trainer.world_size)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizer = self._optimizer(trainer)
        optimizer.accountant = self.accountant  # before its state is restored
        for name, module in pl_module.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
                raise MisconfigurationException(
                    f"PrivacyCallback needs samples that do not influence each other, found `{name}` "
                    f"({type(module).__name__}) in training mode. Use GroupNorm or LayerNorm, or fix its statistics "
                    "with `.eval()`."
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizer, loop = self._optimizer(trainer), trainer.fit_loop
        accumulate = trainer.accumulate_grad_batches
        if self._sampler is not None and trainer.num_training_batches % accumulate:
            raise MisconfigurationException(
                f"`limit_train_batches` must leave whole steps of {accumulate} accumulated batches, found "
                f"{trainer.num_training_batches} batches: dropping a part of a Poisson batch is not private."
            )
        if self._sampler is not None and self._sampler.first != trainer.global_step:
            iter(loop._data_fetcher)  # type: ignore[arg-type]  # was made before the step number was restored
        self.accountant.sampling = self._sampling(trainer)
        expected = self._expected_batch_size(trainer)
        if optimizer.expected_batch_size not in (None, expected):
            raise MisconfigurationException(
                f"`expected_batch_size` of the optimizer must be batch size × accumulated batches × processes, "
                f"{expected:g}, found {optimizer.expected_batch_size}; leave it out."
            )
        optimizer.expected_batch_size = expected
        optimizer.loss_scale = 1 / accumulate
        optimizer.noise_multiplier = self._noise(trainer, optimizer)
        self._left = math.inf
        fresh = not self.accountant.history and optimizer.noise_multiplier == self.noise_multiplier
        if self.epsilon is not None and not fresh:  # noise that was calibrated just now fits the plan
            planned = max(self._planned(trainer) - self._done(trainer), 1)
            fitting = self.accountant.releases_left(self.epsilon, self.delta, optimizer.noise_multiplier, planned)
            self._left = math.inf if fitting >= planned else fitting
        self._spent = self.accountant.epsilon(self.delta)
        if self.log_non_private:
            rank_zero_warn("PrivacyCallback logs `non_private/...`: these values are not covered by the guarantee.")

    def _sampling(self, trainer: Trainer) -> Sampling:
        if self._sampler is None:
            return EpochSampling(self._steps_per_epoch(trainer))
        if self.max_batch_size is None:
            return PoissonSampling(self._sampler.sampling_rate)
        return TruncatedPoissonSampling(self._sampler.sampling_rate, self._sampler.dataset_size, self.max_batch_size)

    def _noise(self, trainer: Trainer, optimizer: DPOptimizer) -> float:
        if optimizer.noise_multiplier is not None:
            return optimizer.noise_multiplier
        if self.noise_multiplier is None:
            if self.epsilon is None:
                raise MisconfigurationException(
                    "The noise is unknown: pass `noise_multiplier=` to the optimizer, or `epsilon=` to PrivacyCallback."
                )
            planned = self._planned(trainer)
            if math.isinf(planned):
                raise MisconfigurationException(
                    "The noise for a budget depends on the number of steps, found neither `max_epochs` nor `max_steps` "
                    "in the Trainer; set one, or pass `noise_multiplier=` to the optimizer."
                )
            assert self.accountant.sampling is not None
            self.noise_multiplier = calibrated_noise(
                self.epsilon, self.delta, self.accountant.sampling, int(planned), self.accountant.method
            )
            rank_zero_info(
                f"PrivacyCallback: noise multiplier {self.noise_multiplier:.4g} for ε={self.epsilon}, δ={self.delta}."
            )
        return self.noise_multiplier

    def _planned(self, trainer: Trainer) -> float:
        """Releases until training ends by itself; may be infinite."""
        steps = self._steps_per_epoch(trainer)
        by_steps = trainer.max_steps if trainer.max_steps and trainer.max_steps > 0 else math.inf
        epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs > 0 else math.inf
        planned = min(by_steps, epochs * steps)
        if math.isinf(planned):
            return planned
        return math.ceil(planned / steps) if self._sampler is None else int(planned)

    @staticmethod
    def _steps_per_epoch(trainer: Trainer) -> int:
        return math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)

    def _done(self, trainer: Trainer) -> int:
        """Releases of the plan that lie behind."""
        return trainer.current_epoch if self._sampler is None else trainer.global_step

    @staticmethod
    def _optimizer(trainer: Trainer) -> DPOptimizer:
        if len(trainer.optimizers) != 1 or not isinstance(trainer.optimizers[0], DPOptimizer):
            found = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers) or "none"
            raise MisconfigurationException(
                f"PrivacyCallback expects one `DPOptimizer`, found {found}; return `DPOptimizer(your_optimizer, "
                "clip_norm=...)` from `configure_optimizers`."
            )
        return trainer.optimizers[0]

    # --- one batch ---------------------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.accountant.start_epoch()
        self._passes = self._expected_passes = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        part = batch_idx % trainer.accumulate_grad_batches
        if part == 0:
            self._passes = self._expected_passes = 0
            self._check_budget(trainer)
            self._cost = self.accountant.next_step_costs
        self._expected_passes += 1
        self._size = None if self._sampler is None else self._sampler.part_size(trainer.global_step, part)
        if self.check_independence and not self._checked and (self._size is None or self._size >= 2):
            self._check(trainer, pl_module, batch, batch_idx)
        if self._size != 0:
            record_training_step(pl_module)

    def _check_budget(self, trainer: Trainer) -> None:
        if self._left > 0 or not self.accountant.next_step_costs:
            return
        message = f"The privacy budget ε = {self.epsilon} (δ = {self.delta}) is spent after {trainer.global_step} steps"
        if self.on_budget == "stop":
            rank_zero_warn(f"{message}: training stops.")
            trainer.should_stop = True
            raise StopIteration  # ends the epoch before the step
        rank_zero_warn(f"{message}; training goes on (`on_budget='warn'`).")
        self._left = math.inf

    def _check(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._checked = True
        size = self._size if self._size is not None else _size(batch)
        if size is not None and size >= 2:
            mean = self._optimizer(trainer).loss_reduction == "mean"
            refuse_coupled_samples(pl_module, batch, batch_idx, size, mean)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._size != 0:
            extensions = self._optimizer(trainer).extensions
            self._context = curvature(*extensions, batch_size=self._size)
            self._context.__enter__()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._passes += 1
        if self._context is None:
            self._optimizer(trainer).add_empty_pass()
        self._leave()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._passes != self._expected_passes:
            raise MisconfigurationException(
                f"Expected a loss from each of {self._expected_passes} calls of `training_step`, found {self._passes}: "
                "leaving out a batch depends on the data and is not private. Return a loss, for example of zero weight."
            )
        statistics = self._optimizer(trainer).statistics
        if self.log_non_private and statistics.norms:
            norms = torch.cat(statistics.norms)
            finite = norms[norms.isfinite()]
            clipped = (norms > self._optimizer(trainer).clip_norm).float().mean()
            self._logged = {
                "non_private/sample_norm_median": float(finite.median()) if len(finite) else math.nan,
                "non_private/sample_norm_max": float(finite.max()) if len(finite) else math.nan,
                "non_private/clipped_fraction": float(clipped),
                "non_private/discarded": float(statistics.discarded),
            }
        statistics.keep_norms = self.log_non_private

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._release(pl_module)
        accumulated = self._expected_passes == trainer.accumulate_grad_batches
        if not accumulated and not trainer.is_last_batch:
            return
        if self._cost:
            self._left -= 1
        steps = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
        if self.every_n_steps is not None and steps % self.every_n_steps == 0:
            self._spent = self.accountant.epsilon(self.delta)
        if not trainer.barebones:
            pl_module.log("epsilon", self._spent, prog_bar=True, logger=False)
            if steps % trainer.log_every_n_steps == 0 or trainer.fast_dev_run:  # type: ignore[attr-defined]
                self._publish(trainer, steps - 1)

    def _publish(self, trainer: Trainer, step: int) -> None:
        optimizer = self._optimizer(trainer)
        grads = [
            p.grad.norm().float() for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        values = {
            "privacy/noise_multiplier": optimizer.noise_multiplier or 0.0,
            "privacy/clip_norm": optimizer.clip_norm,
            "privacy/noised_grad_norm": float(torch.stack(grads).norm()),
            **self._logged,
        }
        if self.every_n_steps is not None:
            values["privacy/epsilon"] = self._spent
        for logger in trainer.loggers:
            named = {name.replace("/", logger.group_separator): value for name, value in values.items()}
            logger.log_metrics(named, step=step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._spent = self.accountant.epsilon(self.delta)
        trainer.callback_metrics["privacy/epsilon"] = torch.tensor(self._spent)
        if not trainer.barebones:
            pl_module.log("epsilon", self._spent, prog_bar=True, logger=False)
            step = trainer.fit_loop.epoch_loop._batches_that_stepped
            for logger in trainer.loggers:
                logger.log_metrics({f"privacy{logger.group_separator}epsilon": self._spent}, step=step)

    # --- afterwards --------------------------------------------------------------------------------------------------

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release(pl_module)
        self._restore(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release(pl_module)
        self._restore(trainer)

    def _release(self, pl_module: LightningModule) -> None:
        restore_training_step(pl_module)
        self._leave()

    def _leave(self) -> None:
        context, self._context = self._context, None
        if context is not None:
            context.__exit__(None, None, None)

    def _restore(self, trainer: Trainer) -> None:
        """Give the Trainer back its own source of batches."""
        if self._source is not None and trainer.fit_loop._data_source is self._source:
            trainer.fit_loop._data_source = self._source.source
            trainer.fit_loop._combined_loader = None
        self._source = None
        if self._replaced is not None:
            trainer._accelerator_connector.use_distributed_sampler = self._replaced
            self._replaced = None


def _refuse_trainer(trainer: Trainer, pl_module: LightningModule) -> None:
    strategy = type(trainer.strategy).__name__
    scheduled = any(isinstance(c, GradientAccumulationScheduler) for c in trainer.callbacks)  # type: ignore[attr-defined]
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    refusals = {
        "automatic optimization, found manual; use `DPOptimizer` with `curvature(...)` in a loop of your own": (
            not pl_module.automatic_optimization
        ),
        "`gradient_clip_val=None`, found a value: `DPOptimizer(clip_norm=...)` clips every sample instead": (
            trainer.gradient_clip_val is not None
        ),
        "no gradient scaler, found precision '16-mixed': skipped steps depend on the data; use 'bf16-mixed' or 32": (
            scaler is not None
        ),
        f"a strategy that keeps whole parameters, found {strategy}; use one device or 'ddp'": (
            any(name in strategy for name in ("FSDP", "DeepSpeed", "ModelParallel"))
        ),
        "a constant `accumulate_grad_batches`, found a GradientAccumulationScheduler; remove it": scheduled,
        "`overfit_batches=0`, found another value; limit the data set itself": bool(trainer.overfit_batches),  # type: ignore[attr-defined]
    }
    for message, refused in refusals.items():
        if refused:
            raise MisconfigurationException(f"PrivacyCallback needs {message}.")


def _size(batch: Any) -> int | None:
    """The number of samples: the length of the first tensor."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else None
    entries = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (list, tuple)) else ()
    return next((size for size in map(_size, entries) if size is not None), None)
