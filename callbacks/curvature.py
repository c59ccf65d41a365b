"""The callback that feeds second-order optimizers and logs gradient noise and curvature."""

from collections.abc import Sequence
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_curv.backprop import Backprop
from lightning_curv.callbacks.import_names import Callback
from lightning_curv.callbacks.measure import RunningNoiseScale, measure
from lightning_curv.callbacks.publish import publish
from lightning_curv.callbacks.recorded_step import record_training_step, restore_training_step
from lightning_curv.callbacks.window import BackwardPass, Window
from lightning_curv.extensions import BatchL2Grad, Extension, GGNTraceMC


class CurvatureCallback(Callback):
    r"""Feed second-order optimizers and log gradient noise and curvature, on an unmodified `LightningModule`.

    On the steps that need it, and only on those, `training_step` is recorded and the user's own backward pass also
    computes

    - what each optimizer asks for by `optimizer.required_extensions()`, left on the parameters until the batch ends;
    - on logging steps, the series below. No per-sample gradient is materialised.

    ============================================= ==================================================================
    ``curvature/grad_norm``                       $\|\bar g\|$, norm of the gradient before clipping
    ``curvature/grad_variance``                   $\mathrm{tr}\,\Sigma$ of the per-sample gradients, unbiased
    ``curvature/sample_norm_median|p5|p95|max``   quantiles of the per-sample gradient norms $\|g_n\|$
    ``curvature/sample_norms``                    their histogram (TensorBoard)
    ``curvature/grad_signal``                     $\|G\|^2$ of the gradient without its noise, unbiased; it is negative
                                                  now and then where the batches are too small to resolve it
    ``curvature/noise_scale``                     $\mathrm{tr}\,\Sigma / \|G\|^2$, ratio of exponential averages of the
                                                  two; absent, with a warning, while the average of $\|G\|^2$ is not
                                                  positive
    ``curvature/ggn_trace``                       trace of the generalized Gauss-Newton matrix, Monte-Carlo estimate
    ============================================= ==================================================================

    $g_n$ is scaled such that the mean over the samples of a step is the gradient, under any loss reduction, gradient
    accumulation and gradient scaler. A step is the union of the micro-batches that it accumulates. With several
    optimizers each gets its own series, `curvature/grad_norm/optimizer_0` and so on. Every value is written once, at
    the trainer's own step count, and goes to `trainer.callback_metrics` for `monitor=`. In distributed training the
    quantiles are those of rank 0.

    With gradient accumulation the optimizers get the curvature of the last micro-batch, that of the loss as
    `training_step` returned it: on average the curvature of the accumulated mean. In manual optimization they get that
    of the last `manual_backward`; if it is one of K that share a mean, set `optimizer.curvature_scale = K`.

    The parameters that training ends with are bit-identical with and without the callback: random labels are drawn from
    a generator of its own, seeded anew for every batch, so that a resumed run draws the same.

    Args:
        every_n_steps: optimizer steps between two logged ones; `None` is the Trainer's `log_every_n_steps`, 0 logs
            nothing. `fast_dev_run` logs every step.
        ema: decay of the exponential averages in the noise scale, per logged step, in [0, 1).
        mc_samples: random labels per sample for the GGN trace; 0 leaves the trace out, for losses without a known
            Hessian.
        histograms: write the histogram of the per-sample norms to loggers that take one.
        seed: of the random labels.
        strict: raise when a parameter or loss is not supported; otherwise warn once and go on without logging.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> CurvatureCallback(every_n_steps=10).every_n_steps
        10
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        ema: float = 0.9,
        mc_samples: int = 1,
        histograms: bool = True,
        seed: int = 0,
        strict: bool = True,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 0:
            raise ValueError(f"`every_n_steps` must be None, 0 or positive, found {every_n_steps}.")
        if not 0 <= ema < 1:
            raise ValueError(f"`ema` must be in [0, 1), found {ema}.")
        if mc_samples < 0:
            raise ValueError(f"`mc_samples` must be 0 or positive, found {mc_samples}.")
        self.every_n_steps = every_n_steps
        self.ema = ema
        self.mc_samples = mc_samples
        self.histograms = histograms
        self.seed = seed
        self.strict = strict
        self._noise: dict[str, RunningNoiseScale] = {}  # per series
        self._unsupported = False
        self._checked = False
        self._noisy = False
        self._window = Window()
        self._rest()

    def _rest(self) -> None:
        """Forget everything that belongs to one batch."""
        self._logging = False
        self._supplied: list[Extension] = []
        self._logged: list[Extension] = []
        self._generator: torch.Generator | None = None
        self._backprop: Backprop | None = None
        self._factor: Tensor | float = 1.0
        self._partial: set[Tensor] = set()
        self._values: dict[str, float] = {}
        self._histograms: dict[str, Tensor] = {}

    @property
    def state_key(self) -> str:
        return self._generate_state_key(every_n_steps=self.every_n_steps, ema=self.ema, mc_samples=self.mc_samples)

    def state_dict(self) -> dict[str, Any]:
        return {"noise": {name: noise.state_dict() for name, noise in self._noise.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._noise = {name: RunningNoiseScale(self.ema, **state) for name, state in state_dict["noise"].items()}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._unsupported = self._checked = self._noisy = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._rest()
        self._logging = not self._unsupported and self._is_logging_step(trainer)
        self._supplied = self._required(trainer)
        if self._logging:
            self._logged = [*([GGNTraceMC(self.mc_samples)] if self.mc_samples else []), BatchL2Grad()]
        else:
            self._window = Window()
        if not self._logged and not self._supplied:
            return
        # A hash spreads neighbouring batches and ranks; nothing needs to be saved to draw the same after a restart.
        seed = hash((self.seed, trainer.global_rank, trainer.fit_loop.total_batch_idx))
        self._generator = torch.Generator(pl_module.device).manual_seed(seed)
        record_training_step(pl_module)

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._window = Window()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if not self._logged and not self._supplied:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._factor = 1.0 if scaler is None else scaler.scale(torch.ones((), device=loss.device))
        if pl_module.automatic_optimization:
            self._factor = self._factor / trainer.accumulate_grad_batches
        if self._logging and not pl_module.automatic_optimization:
            self._follow_zero_grad(pl_module)
        try:
            self._backprop = self._begin(trainer, loss)
        except RuntimeError as error:
            self._stop_logging(error)
            self._backprop = self._begin(trainer, loss) if self._supplied else None

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._backprop is None:
            return
        try:
            self._backprop.after()
        except RuntimeError as error:
            self._delete(pl_module, self._logged, keep=self._supplied)
            self._stop_logging(error)
        self._backprop = None
        if self._logging:
            self._checked = True
            self._window.add(self._collect(pl_module))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not self._logging:
            return
        suffix = "" if len(trainer.optimizers) == 1 else f"/optimizer_{trainer.optimizers.index(optimizer)}"
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        passes = max(len(self._window), 1) if pl_module.automatic_optimization else 1
        statistics = self._window.statistics(params, share=1 / passes)
        if statistics is None:
            return
        # Lightning divides by the full number of passes, but the last window of an epoch may hold fewer.
        divisor = passes / trainer.accumulate_grad_batches
        noise = self._noise.setdefault(suffix, RunningNoiseScale(self.ema))
        values = measure(statistics, {p: p.grad for p in params}, divisor, trainer.strategy, noise)
        self._values |= {f"{name}{suffix}": value for name, value in values.items()}
        if noise.unresolved:
            self._warn_of_noise(trainer, len(statistics.sample_norms))
        self._histograms[f"sample_norms{suffix}"] = statistics.sample_norms

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._values:
            publish(trainer, self._values, self._histograms if self.histograms else {})
        self._release(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._release(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._window = Window()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._window = Window()
        self._release(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._window = Window()
        self._release(pl_module)

    def _is_logging_step(self, trainer: Trainer) -> bool:
        # From counters only, which are equal on all ranks and constant while gradients accumulate.
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return self.every_n_steps != 0
        interval = self.every_n_steps
        if interval is None:
            interval = trainer.log_every_n_steps  # type: ignore[attr-defined]
        return interval > 0 and (trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % interval == 0

    def _required(self, trainer: Trainer) -> list[Extension]:
        """What the optimizers need from this batch; the first of several callbacks supplies it."""
        callbacks = [callback for callback in trainer.callbacks if isinstance(callback, CurvatureCallback)]  # type: ignore[attr-defined]
        if callbacks[0] is not self or trainer.fit_loop._should_accumulate():
            return []
        by_field: dict[str, Extension] = {}
        for optimizer in trainer.optimizers:
            for extension in getattr(optimizer, "required_extensions", tuple)():
                by_field.setdefault(extension.savefield, extension)
        return list(by_field.values())

    def _stop_logging(self, error: RuntimeError) -> None:
        if not self._logging:
            raise error
        if self.strict:
            raise type(error)(
                f"{error} (In CurvatureCallback `mc_samples=0` leaves out the GGN trace; `strict=False` trains on "
                "without logging.)"
            ) from error
        rank_zero_warn(f"CurvatureCallback stops logging: {error}")
        self._unsupported, self._logging, self._logged = True, False, []

    def _begin(self, trainer: Trainer, loss: Tensor) -> Backprop:
        fields = {extension.savefield for extension in self._supplied}
        extensions = [*self._supplied, *(e for e in self._logged if e.savefield not in fields)]
        # Curvature is that of the loss as the user returned it, not as Lightning scaled it: the seed undoes the factor
        # for backpropagated columns. First-order quantities come from the main backward pass and carry it.
        seed = torch.ones_like(loss) / self._factor
        # Once: do the per-sample gradients add up to the gradient? TF32 and bfloat16 differ by more than rounding.
        check = self._logging and not self._checked and loss.device.type == "cpu" and "true" in trainer.precision
        backprop = Backprop(loss, extensions, generator=self._generator, gradient=seed, check=check, defer=True)
        try:
            backprop.before()
        except BaseException:
            backprop.abort()
            raise
        return backprop

    def _warn_of_noise(self, trainer: Trainer, samples: int) -> None:
        if not self._noisy:
            self._noisy = True
            step = trainer.fit_loop.epoch_loop._batches_that_stepped
            rank_zero_warn(
                f"At step {step} the batches of {samples * getattr(trainer.strategy, 'world_size', 1)} samples are too "
                "small to resolve the gradient: `curvature/noise_scale` has gaps where the average of "
                "`curvature/grad_signal` is not positive. Enlarge the batches (`accumulate_grad_batches`) or average "
                f"longer (`ema`, now {self.ema})."
            )

    def _follow_zero_grad(self, pl_module: LightningModule) -> None:
        """In manual optimization nothing announces `zero_grad`: the gradients themselves tell."""
        params = [p for p in pl_module.parameters() if p.requires_grad]
        zero = {p for p in params if p.grad is None or not p.grad.any()}
        self._window.forget(zero)
        self._partial = {p for p in params if p not in zero and p not in self._window}
        if self._partial:
            rank_zero_warn(
                "CurvatureCallback leaves out parameters whose gradient was accumulated over batches that it did not "
                "log. Log every step, `every_n_steps=1`, when you accumulate gradients in manual optimization."
            )

    def _collect(self, pl_module: LightningModule) -> BackwardPass:
        params = [p for p in pl_module.parameters() if p.requires_grad and p not in self._partial]
        norms = {p: p.batch_l2 / self._factor**2 for p in params if hasattr(p, "batch_l2")}
        traces = {p: p.ggn_trace_mc for p in params if hasattr(p, "ggn_trace_mc")}
        self._delete(pl_module, self._logged, keep=self._supplied)
        return BackwardPass(norms, traces)

    def _release(self, pl_module: LightningModule) -> None:
        """Leave nothing of this batch behind."""
        restore_training_step(pl_module)
        if self._backprop is not None:
            self._backprop.abort()
        self._delete(pl_module, [*self._supplied, *self._logged])
        self._rest()

    @staticmethod
    def _delete(pl_module: LightningModule, extensions: Sequence[Extension], keep: Sequence[Extension] = ()) -> None:
        fields = {extension.savefield for extension in extensions} - {extension.savefield for extension in keep}
        for param in pl_module.parameters() if fields else ():
            for field in fields & vars(param).keys():
                delattr(param, field)
