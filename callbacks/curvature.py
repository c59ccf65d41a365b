"""The callback that feeds second-order optimizers and logs gradient noise and curvature."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_curv.callbacks import recorded_step
from lightning_curv.callbacks.import_names import Callback
from lightning_curv.callbacks.monitoring.accumulation import Accumulation, backward_pass
from lightning_curv.callbacks.monitoring.alarm import Alarm, alarms_of, refuse_alarms
from lightning_curv.callbacks.monitoring.alarm_checks import check_after_updates, check_before_step
from lightning_curv.callbacks.monitoring.availability import Availability
from lightning_curv.callbacks.monitoring.epochs import EpochMeans
from lightning_curv.callbacks.monitoring.histograms import GradientHistogram
from lightning_curv.callbacks.monitoring.layers import choose
from lightning_curv.callbacks.monitoring.measure import RunningNoiseScale
from lightning_curv.callbacks.monitoring.norm_layers import norm_parameters
from lightning_curv.callbacks.monitoring.observation import (
    AnyExtension,
    Observation,
    for_optimizers,
    required_extensions,
    seed_of_batch,
)
from lightning_curv.callbacks.monitoring.parts import PARTS, PartNorms
from lightning_curv.callbacks.monitoring.preview import Preview, preview
from lightning_curv.callbacks.monitoring.prices import clock, warning_of_price
from lightning_curv.callbacks.monitoring.publish import Events, add_layout, publish
from lightning_curv.callbacks.monitoring.quantities import FIELDS, SAMPLED, named, select
from lightning_curv.callbacks.monitoring.report import Report, warn_of_noise
from lightning_curv.callbacks.monitoring.scaled_loss import ScaledLoss, held_factor, scaled_loss
from lightning_curv.callbacks.monitoring.schedule import Schedule, step_of
from lightning_curv.callbacks.monitoring.step_lengths import restore_monitors, show_steps
from lightning_curv.callbacks.monitoring.trajectory import Trajectory
from lightning_curv.callbacks.monitoring.watch import Raised, Watch
from lightning_curv.callbacks.run_report.run_report import RunReport
from lightning_curv.callbacks.settings import check, find_output, key_of, require_whole_parameters
from lightning_curv.callbacks.user_batch import BatchSize
from lightning_curv.distributed.failures import explain, processes, tell, telling
from lightning_curv.distributed.shards import whole

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

Extensions = Sequence[AnyExtension]


class CurvatureCallback(Callback):
    r"""Feed second-order optimizers and log gradient noise and curvature.

    The `LightningModule` stays as it is. On the steps that need it, and only on those,
    `training_step` is recorded and the user's own backward pass also computes

    - what each optimizer asks for by `optimizer.required_extensions()`, left on the parameters
      until the batch ends;
    - on logging steps, the series below. No per-sample gradient is materialised.

    - `curvature/grad_norm`: $\|\bar g\|$, norm of the gradient before clipping
    - `curvature/grad_variance`: $\mathrm{tr}\,\Sigma$ of the per-sample gradients, unbiased
    - `curvature/sample_norm_median|p5|p95|max`: quantiles of the per-sample gradient norms
      $\|g_n\|$
    - `curvature/sample_norms`: their histogram (TensorBoard)
    - `curvature/grad_signal`: $\|G\|^2$ of the gradient without its noise, unbiased; it is
      negative now and then where the batches are too small to resolve it
    - `curvature/noise_scale`: $\mathrm{tr}\,\Sigma / \|G\|^2$, ratio of exponential averages of
      the two; absent, with a warning, while the average of $\|G\|^2$ is not positive
    - `curvature/suggested_batch_size`: the power of two next to the noise scale
    - `curvature/ggn_trace`: trace of the generalized Gauss-Newton matrix, Monte-Carlo estimate;
      needs a loss that can be differentiated twice; not with `mc_samples=0`. It takes a backward
      pass of its own: from step 20 on at most every tenth step, unless `quantities` names it

    Not in the default: `gradient_stats` (`grad_norm|mean|std|max`) and `sparsity` of the
    gradient, `noise_scale_norm_layers` (of normalization layers alone, for large models; see the
    concepts), `grad_hist_1d` and `grad_hist_2d` (all entries of the per-sample gradients, alone
    and with the parameters' values, for loggers that take histograms and images),
    `ggn_trace_exact`, `hessian_trace`, `ggn_max_eigenvalue`,
    `hessian_max_eigenvalue`, `mean_gsnr`, `grad_diversity`, `norm_test`,
    `inner_product_test`, `orthogonality_test`, `cabs`, `early_stopping`, `tic_trace`,
    `tic_diag`, `update_size`, `distance` and `alpha`: formulas and sources are in
    `lightning_curv.callbacks.monitoring.quantities` and
    `lightning_curv.callbacks.monitoring.trajectory`.

    What is there by default and cannot be computed for a model is left out, with one warning before
    the first step. Where samples influence each other (BatchNorm in training mode, a contrastive
    loss) or have no rows of their own, variance, signal and noise scale come from the gradients of
    micro-batches and processes, if there are several (`accumulate_grad_batches`, several devices),
    and the GGN trace is that of the whole batch. `preview` tells it before a run.

    $g_n$ is scaled such that the mean over the samples of a step is the gradient, under any loss
    reduction, gradient accumulation and gradient scaler. A step is the union of the micro-batches
    that it accumulates; eigenvalues are averages over them. With several optimizers each gets its
    own series, `curvature/grad_norm/optimizer_0` and so on. Every value is written once, at the
    trainer's own step count, and goes to `trainer.callback_metrics` for `monitor=`. Values for
    TensorBoard are written up to eight logged steps at a time, and at least every second while
    steps follow. In distributed training all are those of the global batch, by one reduction per
    logged step; what is promised and refused is listed in `docs/guarantees.md`.

    With gradient accumulation the optimizers average the curvature of the micro-batches, each that
    of the loss as `training_step` returned it: the curvature of the accumulated mean. In manual
    optimization they get that of the last `manual_backward`; if it is one of K that share a mean,
    set `optimizer.curvature_scale = K`.

    Where an op has no rule, a per-sample quantity costs a pass through this op for every sample, of
    which a warning tells once. `max_samples=S` caps that price for the series of this callback: of
    a batch of N > S samples, and of every micro-batch and process alone, S are drawn uniformly
    without replacement and only these are measured. Moments, variances, diversity, the squares of
    the three tests, CABS and GGN traces are then unbiased estimates of their values for the whole
    batch; norms, their quantiles and histogram are those of the S samples; what is a ratio of
    estimates is not unbiased (`lightning_curv.callbacks.monitoring.quantities`). The gradient
    itself, Hessian traces and eigenvalues take no samples apart and are those of the whole batch.
    So is all that optimizers and `extensions` ask for, and with it what shares a backward pass with
    these. The check of the first logged step, whether the gradients of the samples add up to the
    gradient, needs all of them and is left out.

    The parameters that training ends with are bit-identical with and without the callback: random
    labels are drawn from a generator of its own, seeded anew for every batch, so that a resumed run
    draws the same.

    Args:
        quantities: What to log: "default", "all", or names, among which "default" stands for those
            of the table. The four sample norms are `sample_norms`.
        every_n_steps: Optimizer steps between two logged ones; `None` is the Trainer's
            `log_every_n_steps`, 0 logs nothing. `fast_dev_run` logs every step.
        layers: Series `curvature_layers/<quantity>/<layer>` for up to `max_layers` layers, chosen
            once at the start: True for the first ones, "topk" for those with most parameters, or a
            regular expression that is searched in their names. All layers, if there are more, make
            one heat-map image per logged step.
        histograms: Write histograms, and images of them, to loggers that take some.
        mc_samples: Random labels or signs per Monte-Carlo quantity; 0 leaves these out, for losses
            without a second derivative.
        output: The module where the network ends, or its name in the `LightningModule`, instead of
            where the last parameters enter; for losses that torch has no function for, see
            `curvature`.
        strict: Raise when a quantity that `quantities` names, or an extension, cannot be computed:
            a parameter or a loss is not supported, or memory runs out. What the graph tells is told
            before the first step. False, and for what is there by default or with "all": warn once
            and go on without.
        extensions: What is computed on logged steps too and left on the parameters until the batch
            ends, for other callbacks.
        ema: Decay of the exponential averages in the noise scale, per logged step, in [0, 1).
        seed: Seed of the random labels, and of the random samples.
        max_layers: The most layers with series of their own.
        prog_bar: Series to show on the progress bar.
        layout: Describe charts for TensorBoard's "Custom Scalars", with the sample norms as a band.
            TensorBoard reads one such description per run: leave it out if you write your own.
        batch_size: The number of samples in a batch, or a function from the batch to it, for
            instance `lambda batch: batch[0].shape[1]` for sequences first; `None`: the number that
            Lightning itself extracts, the leading size of the batch's tensors. Where these have
            several, or where the graph contradicts, it is found from the graph. A number that is
            given is verified, and an error if the graph contradicts; so it has to fit a smaller
            last batch too, which a function does. With several processes it is that of one.
        max_samples: Measure at most that many samples of a backward pass, at random: see above.
            `None`: all.
        budget: The share of the time of training steps that this callback may take, in (0, 1):
            steps are logged more rarely than `every_n_steps` says where they would take more. Which
            ones then depends on the clock. `None`: no limit.
        on_epoch: Also log, at the end of every epoch, the mean of every series over its logged
            steps: `curvature/grad_norm_epoch` and so on.
        alarms: Bounds and what to do beyond them: `Alarm`s, or "exploding" (the gradient's norm is
            above 10 times its running average), "vanishing" (the largest entry of a layer's
            gradient is below 1e-8), "nonfinite" (inf or NaN), which warn. Only an alarm whose
            action is "skip" or "stop" ever changes a run.
        report: Write one HTML page about the run when it ends, by an error too: all series, a map
            over layers and steps, findings in words. True: `curvature_report.html` in the folder of
            the logger, or else in `default_root_dir`; or a path. Layers are then measured, up to 60
            evenly spaced ones, with or without `layers`. Needs plotly: the extra `report`. Of long
            runs up to 1,000 evenly spaced values of a series are kept (200 of the layers), in
            checkpoints too.

    Raises:
        ValueError: An argument is out of range, or a name is unknown.
        ModuleNotFoundError: `report` needs plotly.
        MisconfigurationException: In `setup`: the strategy makes parameters flat, or the pass.

    Example:
        >>> CurvatureCallback(["default", "norm_test"], every_n_steps=10).every_n_steps
        10
    """

    def __init__(
        self,
        quantities: str | Sequence[str] = "default",
        every_n_steps: int | None = None,
        layers: bool | str = False,
        histograms: bool = True,
        mc_samples: int = 1,
        output: nn.Module | str | None = None,
        strict: bool = True,
        extensions: Extensions = (),
        ema: float = 0.9,
        seed: int = 0,
        max_layers: int = 20,
        prog_bar: Sequence[str] = (),
        layout: bool = False,
        batch_size: BatchSize = None,
        max_samples: int | None = None,
        budget: float | None = None,
        on_epoch: bool = False,
        alarms: Sequence[str | Alarm] = (),
        report: bool | str | Path = False,
    ) -> None:
        # `mc_samples=0`, for losses without a second derivative, leaves out what draws labels.
        chosen = [q for q in select(quantities) if mc_samples > 0 or not SAMPLED & set(q.fields)]
        self._quantities = (
            chosen if max_samples is None else [quantity.of_some for quantity in chosen]
        )
        self._names = {quantity.name for quantity in self._quantities}
        self._series = [series for quantity in self._quantities for series in quantity.series]
        check(
            every_n_steps,
            ema,
            mc_samples,
            layers,
            max_layers,
            prog_bar,
            self._series,
            batch_size,
            max_samples,
            budget,
        )
        self.quantities = quantities
        self.every_n_steps = every_n_steps
        self.layers = layers
        self.histograms = histograms
        self.mc_samples = mc_samples
        self.output = output
        self.strict = strict
        self.extensions = extensions
        self.ema = ema
        self.seed = seed
        self.max_layers = max_layers
        self.prog_bar = prog_bar
        self.layout = layout
        self.batch_size = batch_size
        self.max_samples = max_samples
        self.budget = budget
        self.on_epoch = on_epoch
        self.alarms = alarms
        # The Trainer refuses two callbacks with the same key: settings that make other series are
        # in it.
        names = quantities if isinstance(quantities, str) else list(quantities)
        self._state_key = key_of(
            type(self).__name__, (names, every_n_steps, layers, ema, mc_samples)
        )
        self.report = report
        self._run = RunReport(report)
        self._noise: dict[str, RunningNoiseScale] = {}  # per series
        self._chosen: list[str] = []  # layers
        self._named = named(quantities)
        self._available = Availability()
        self._schedule = Schedule(budget)
        self._accumulation = Accumulation()
        self._parts = PartNorms()
        self._trajectory = Trajectory()
        self._events = Events()
        self._epoch, self._epoch_of_layers = EpochMeans(), EpochMeans()
        self._watch = Watch(alarms_of(alarms, self._series))
        self._priced = False  # the first logged step
        self._checked = False
        self._noisy = False
        self._loaded = False  # from a checkpoint
        self._rest()

    @classmethod
    def preview(cls, module: LightningModule, batch: Any, **settings: Any) -> Preview:
        """What would be logged for a model, by which path and at what price; `print` it.

        `training_step` runs three times on the batch, without a Trainer, where the module and the
        batch are; nothing of that stays in the module or in the random state.

        Args:
            module: A module with a `training_step` that returns a loss.
            batch: A batch as `training_step` gets it.
            settings: Arguments of this class.

        Returns:
            The table: a row for every quantity, its path ("exact", "fallback" or none) and its
            price in steps.

        Example:
            >>> import torch, pytorch_lightning as pl
            >>> class Net(pl.LightningModule):
            ...     def __init__(self):
            ...         super().__init__()
            ...         self.net = torch.nn.Linear(2, 1)
            ...     def training_step(self, batch, batch_idx):
            ...         return (self.net(batch) ** 2).mean()
            >>> table = CurvatureCallback.preview(Net(), torch.ones(4, 2))
            >>> [row.path for row in table.rows if row.quantity == "grad_variance"]
            ['exact']
        """
        # An instance: its arguments are checked as those of a run are.
        own = cls(**settings)
        output = find_output(module, own.output)

        def observe(considered: Sequence[AnyExtension]) -> Observation:
            # Seeds of a run count the Trainer's batches, of which there are none here.
            seed = partial(int, own.seed)
            return Observation((), (), seed, output, own.batch_size, own.max_samples, considered)

        return preview(module, batch, own._quantities, observe, output, own.mc_samples)

    def _rest(self) -> None:
        """Forget everything that belongs to one batch."""
        self._observation = Observation()
        self._looking = False  # at the first graph
        self._parts.stop()
        self._report: Report | None = None  # on logging steps
        self._loss: ScaledLoss | None = None
        self._refusal: Exception | None = None  # before a pass that other processes take part in
        self._accumulation.end_batch()
        self._required_fields: set[str] = set()  # by optimizers

    @property
    def raised(self) -> Sequence[Raised]:
        """The alarms that went off in this run, the last thousand."""
        return self._watch.raised

    @property
    def state_key(self) -> str:
        return self._state_key

    def state_dict(self) -> dict[str, Any]:
        return {
            # Plain types only: torch's safe loading refuses arrays, NumPy's numbers and classes.
            "noise": {name: noise.state_dict() for name, noise in self._noise.items()},
            "initial": self._trajectory.initial,
            "alarms": self._watch.state_dict(),
            "epoch": self._epoch.state_dict(),
            "epoch_of_layers": self._epoch_of_layers.state_dict(),
            **({"run": self._run.state_dict()} if self._run else {}),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        noise = state_dict.get("noise", {})
        self._noise = {name: RunningNoiseScale(self.ema, **state) for name, state in noise.items()}
        self._trajectory.initial = dict(state_dict.get("initial", {}))
        self._watch.load_state_dict(state_dict.get("alarms", {}))
        self._epoch.load_state_dict(state_dict.get("epoch", {}))
        self._epoch_of_layers.load_state_dict(state_dict.get("epoch_of_layers", {}))
        self._run.load_state_dict(state_dict.get("run", {}))
        self._loaded = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # The strategy shards parameters between this hook and `on_fit_start`.
        require_whole_parameters(trainer)
        if stage == "fit":  # before a checkpoint is loaded
            self._trajectory, self._loaded = Trajectory(), False
            self._epoch, self._epoch_of_layers = EpochMeans(), EpochMeans()
            self._watch = Watch(alarms_of(self.alarms, self._series))
            self._run.forget()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Of this fit: a second one may have another model, and a resumed run looks at its own first
        # graph.
        self._available = Availability(
            self._quantities,
            self.extensions,
            self._named,
            self.strict,
            self.mc_samples,
            pl_module,
        )
        self._checked = self._noisy = self._priced = False
        self._schedule = Schedule(self.budget)
        find_output(pl_module, self.output)
        # Optimizers are made after `setup`: here is the first hook that sees them.
        refuse_alarms(self._watch.alarms, trainer.optimizers)
        self._chosen = choose(pl_module, self.layers, self.max_layers)
        self._run.begin(trainer, pl_module)
        if self.every_n_steps != 0:
            self._events.tolerance.guard(trainer.loggers)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Some strategies restore callbacks only after `on_fit_start`; by now all have done so.
        if trainer.ckpt_path is not None and not self._loaded:
            rank_zero_warn(
                "The checkpoint holds no state of CurvatureCallback with these settings: its "
                "averages start anew."
            )
        # A resumed run measures from where the first one began: these came with the checkpoint, by
        # name, as its parameters are other objects.
        if "distance" in self._names and not self._trajectory.initial:
            self._trajectory.initial = {
                name: whole(p.detach()).clone() for name, p in pl_module.named_parameters()
            }
        show_steps(trainer)
        # The number of batches in an epoch is not known before.
        self._schedule.watch(trainer)
        if self.layout:
            add_layout(trainer, self._series, self._events)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # All that follows is decided from counters alone, so that processes decide alike: where one
        # measures and another does not, a reduction waits for ever.
        self._schedule.begin_batch(trainer)
        supplied = self._required(trainer)
        logged: list[AnyExtension] = []
        considered: list[AnyExtension] = []
        self._required_fields = {extension.savefield for extension in supplied}
        interval = self._schedule.interval(trainer, self.every_n_steps)
        if self._schedule.is_logged(trainer, self.every_n_steps):
            self._report = self._new_report(trainer, pl_module, interval)
            logged = [FIELDS[name](self.mc_samples, pl_module) for name in self._report.fields]
            # A savefield is one attribute of a parameter: that of an optimizer comes first.
            known = self._required_fields | self._available.off.keys()
            supplied += [e for e in self.extensions if e.savefield not in known]
        else:
            # Logged passes of an earlier step are no part of this one. Only `zero_grad` resets
            # their count.
            self._accumulation.forget()
        # At the first batch, logged or not: what cannot be computed is told at once, not hours
        # later.
        if not self._available.looked and interval:
            considered = self._available.considered()
            if self._report is None and recorded_step.is_compiled(pl_module):
                considered = []  # this step runs as it would without
        listens = self._report is not None and self._report.listens
        # Most batches end here: no patch, no record, no hook, no cost.
        if logged or supplied or considered or listens:
            self._observe(trainer, pl_module, batch, supplied, logged, considered)

    def _new_report(self, trainer: Trainer, pl_module: LightningModule, interval: int) -> Report:
        """The numbers of a logged batch, those quantities of them that are due."""
        return Report(
            [q for q in self._quantities if q.is_due(step_of(trainer), interval)],
            self._chosen,
            self._noise,
            self.ema,
            self._trajectory,
            self._available.off,
            self._run.layers,
            norm_parameters(pl_module).values(),
        )

    def _observe(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        supplied: list[AnyExtension],
        logged: list[AnyExtension],
        considered: list[AnyExtension],
    ) -> None:
        """Put extensions around the backward passes of a batch, and record its training step."""
        output = find_output(pl_module, self.output)
        seed = partial(seed_of_batch, trainer, self.seed)
        self._observation = Observation(
            supplied, logged, seed, output, self.batch_size, self.max_samples, considered
        )
        # The clock waits for the device, which costs time itself: once per fit.
        if self._report is not None and not self._priced:
            self._observation.clock = clock
        # The profiler has rows for hooks; what runs during the backward pass would be in none of
        # them.
        self._observation.section = partial(
            trainer.profiler.profile,  # type: ignore[attr-defined]
            f"[Callback]{self.state_key}.during_backward",
        )
        # Only norms of whole gradients are wanted: they need no record, but the size of the batch.
        if not self._observation.records:
            self._observation.read(batch)
            return
        observation = self._observation
        recorded_step.record_training_step(pl_module, output, observation.read, observation.fail)

    def on_before_zero_grad(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        # Lightning calls this in automatic optimization alone; `follow_zero_grad` stands in for it
        # else.
        self._accumulation.set_to_zero()

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        try:
            self._begin_pass(trainer, pl_module, loss)
        except Exception as error:
            if processes() == 1:
                raise
            # The pass is made: where it exchanges gradients, the other processes wait for it.
            self._refusal = error

    def _begin_pass(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if not self._report and not self._observation:
            return
        # Now: after the pass its graph is freed.
        start = self._loss = scaled_loss(trainer, pl_module, loss)
        logs = self._report is not None and (self._observation.logged or self._report.listens)
        if logs and not pl_module.automatic_optimization:
            self._accumulation.follow_zero_grad(pl_module)
        # Once: do the per-sample gradients add up to the gradient? TF32 and bfloat16 differ by more
        # than rounding.
        check = bool(
            self._report
            and not self._checked
            and loss.device.type == "cpu"
            and "true" in trainer.precision
        )
        # Before `begin`: what this graph does not have is not tried.
        if self._observation.considered:
            self._look(trainer, pl_module, start)
        for extension in self._observation.logged:
            # Its bins are fixed: entries are unscaled before they are counted, not afterwards.
            if isinstance(extension, GradientHistogram):
                extension.factor = start.factor
        if self._observation:
            self._observation.begin(start.root, start.seed, check)
            self._turn_off_failed()
        if self._report is not None and self._report.listens:
            self._parts.listen(pl_module.parameters())

    @telling()
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._refusal is not None:
            raise self._refusal
        # Logged or not: all passes since `zero_grad` are in the gradient.
        self._accumulation.passes += 1
        results = self._observation.finish()
        # The loss would keep the nodes of its graph, with what they have saved, until the batch
        # ends.
        recorded_step.forget_returned_loss(pl_module)
        self._turn_off_failed()
        # No `step` follows this micro-batch, and its curvature is dropped when the batch ends: the
        # optimizers take it now.
        if self._required_fields and trainer.fit_loop._should_accumulate():
            for optimizer in trainer.optimizers:
                if getattr(optimizer, "accumulated_extensions", tuple)():
                    optimizer.accumulate()  # type: ignore[attr-defined]
        if self._report and self._loss is not None:
            self._checked = True
            if self._report.listens:
                results[PARTS] = self._parts.stop()
            self._accumulation.add(backward_pass(results, self._observation, self._loss))

    @telling()
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        # `alpha` needs the gradient of the step before a logged one, alarms that of every step.
        if not self._report and "alpha" not in self._names and not self._watch:
            return
        # In this hook gradients are accumulated, averaged over processes and unscaled, but not yet
        # clipped.
        # Under FSDP2 they are gathered: a model's size of memory, in these steps.
        grads = {
            p: whole(p.grad)
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        }
        automatic = pl_module.automatic_optimization
        passes, divisor = self._accumulation.divisor(trainer, automatic)
        # For optimizers whose kernel unscales, Lightning leaves the scaler's factor in the
        # gradients.
        divisor = divisor * held_factor(trainer, optimizer)
        if grads:
            self._measure(trainer, pl_module, optimizer, grads, passes, divisor)
        if self._watch:
            check_before_step(
                self._watch, trainer, pl_module, optimizer, grads, divisor, self._report
            )

    def _measure(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        optimizer: Optimizer,
        grads: dict[Parameter, Tensor],
        passes: int,
        divisor: float,
    ) -> None:
        """Before the step of an optimizer."""
        window = self._accumulation.window
        if self._report:
            try:
                self._report.measure(trainer, pl_module, optimizer, grads, window, divisor, passes)
            except Exception as error:
                # What nobody foresaw names no quantity: all of them are left out.
                self._report.failures.append((self._names, error))
            for what, reasoned in self._report.failures:
                self._leave_out(what, reasoned)
            self._report.failures.clear()
            if self._report.too_noisy and not self._noisy:
                self._noisy = True
                warn_of_noise(trainer, self._report.too_noisy, self.ema)
        # The update that ends at the next logged step begins here.
        if "alpha" in self._names and self._schedule.is_logged(
            trainer, self.every_n_steps, ahead=1
        ):
            self._trajectory.remember(grads, divisor)

    @telling()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._report:
            try:
                self._report.follow_updates(pl_module)
            except Exception as error:
                self._leave_out({"update_size", "distance"}, error)
            if self._watch:
                check_after_updates(self._watch, trainer, self._report)
            # Lightning counts this step after the hook: its counter is still that of the measured
            # one.
            self._report.publish(trainer, pl_module, self._events, self.histograms, self.prog_bar)
            if self.on_epoch:
                self._epoch.add(self._report.values)
                self._epoch_of_layers.add(self._report.values_of_layers)
            passes, automatic = self._accumulation.window.passes, pl_module.automatic_optimization
            self._run.add(trainer, self._report.values, self._report.layers, passes, automatic)
        # Before the release, which forgets what the pass has cost.
        self._reckon(trainer)
        self._release(pl_module)

    def _reckon(self, trainer: Trainer) -> None:
        """What this batch has cost."""
        observed, logged = self._observation, self._report is not None
        seconds = self._schedule.stop_clock()
        if logged and not self._priced:
            self._priced = True
            rest = max(seconds - observed.spent, 1e-9)
            text = warning_of_price(self._quantities, observed.seconds, observed.spent, rest)
            # A budget deals with the price by itself.
            if text and self.budget is None:
                rank_zero_warn(text)
        # A batch that only looked at the first graph is neither a plain step nor a logged one.
        if logged or not self._looking:
            self._schedule.reckon(trainer, logged)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Else these would come after validation, which may take long.
        self._events.write()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # A run that goes on from this checkpoint does not log these steps again.
        self._events.write()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if means := self._epoch.take():
            of_layers = self._epoch_of_layers.take()
            # At the last step of the epoch, as Lightning logs its own; the count is one further.
            publish(trainer, pl_module, self._events, means, of_layers, {}, steps_ago=1)
        self._events.write()
        self._release(pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        # An error of the user's, too: the other processes wait for it just as long.
        tell(exception)
        explain(exception)
        # Lightning calls no `teardown` after an error.
        self.teardown(trainer, pl_module, "fit")
        self._run.end(trainer, pl_module, self.raised, exception)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._run.end(trainer, pl_module, self.raised)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._accumulation.forget()
        self._trajectory.forget()
        restore_monitors(trainer)
        self._release(pl_module)
        self._events.write()

    def _release(self, pl_module: LightningModule) -> None:
        """Leave nothing of this batch behind."""
        recorded_step.restore_training_step(pl_module)
        self._observation.release()
        self._rest()

    def _required(self, trainer: Trainer) -> list[AnyExtension]:
        """What the optimizers need from this batch; the first of several callbacks supplies it."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if self is not next((c for c in callbacks if isinstance(c, CurvatureCallback)), None):
            return []
        return required_extensions(trainer.optimizers, trainer.fit_loop._should_accumulate())

    def _turn_off_failed(self) -> None:
        """What could not be computed in a backward pass."""
        for fields, error in self._observation.failures():
            if fields & self._required_fields:
                # Never turned off, `strict` or not: the optimizer cannot step without.
                raise for_optimizers(error)
            self._leave_out(fields, error)

    def _look(self, trainer: Trainer, pl_module: LightningModule, start: ScaledLoss) -> None:
        """At the first graph."""
        self._looking = True
        refused = self._available.look(
            trainer, pl_module, self._observation, start.root, start.seed
        )
        if self._report is not None:
            # What is left may go by another path, with other fields.
            self._report.turn_off(refused)
            self._observation.logged = [
                FIELDS[name](self.mc_samples, pl_module) for name in self._report.fields
            ]

    def _leave_out(self, what: Collection[str], error: Exception) -> None:
        """What fails is not logged in the rest of the run, or stops it."""
        self._available.leave_out(what, error)
        if self._report is not None:
            self._report.turn_off(self._available.off)
