"""The numbers of one batch: measured at its steps, completed after them, published once."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_curv.callbacks.monitoring.histograms import ONE, TWO, histogram_1d, image_2d
from lightning_curv.callbacks.monitoring.layers import parameters_by_layer
from lightning_curv.callbacks.monitoring.measure import Job, RunningNoiseScale, measure
from lightning_curv.callbacks.monitoring.measurement import Measurement
from lightning_curv.callbacks.monitoring.norm_layers import NORM_LAYERS
from lightning_curv.callbacks.monitoring.parts import PARTS
from lightning_curv.callbacks.monitoring.publish import GROUP, LAYERS, Events, heat_map, publish
from lightning_curv.callbacks.monitoring.quantiles import Numbers
from lightning_curv.callbacks.monitoring.quantities import ENTRIES, QUANTITIES, Quantity
from lightning_curv.callbacks.monitoring.trajectory import Trajectory, distance
from lightning_curv.callbacks.monitoring.window import Window

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

NOISE_SCALE = {"noise_scale", "suggested_batch_size"}


@dataclass(frozen=True)
class _Step:
    """What the step of an optimizer is measured from.

    Attributes:
        trainer: of the run.
        optimizer: whose parameters are measured.
        grads: their accumulated gradients.
        window: the backward passes that they come from.
        divisor: of the accumulated gradients, gives those of the window.
        passes: number of backward passes that share the loss' mean.
    """

    trainer: Trainer
    optimizer: Optimizer
    grads: dict[Parameter, Tensor]
    window: Window
    divisor: float
    passes: int

    @cached_property
    def suffix(self) -> str:
        """Of the series of this optimizer."""
        return suffix_of(self.trainer, self.optimizer)

    def measurement(
        self,
        params: Sequence[Parameter],
        fields: Collection[str],
        lost: Collection[str],
        **wanted: bool,
    ) -> Measurement:
        """What some of the parameters are measured by.

        Args:
            params: these.
            fields: savefields that their quantities need.
            lost: those that could not be computed in this process.
            wanted: what is wanted besides, see `Measurement`.
        """
        return Measurement(
            self.window.statistics(params, share=1 / self.passes),
            {p: self.grads[p] for p in params},
            self.divisor,
            self.optimizer.param_groups[0]["lr"],
            self.trainer.strategy,
            fields,
            lost,
            **wanted,
        )


class Report:
    """Numbers of one batch.

    Args:
        quantities: what to measure.
        chosen: layers with series of their own.
        noise: running averages by series, updated.
        ema: decay of the averages.
        trajectory: copies of parameters and gradients, updated.
        off: savefields that cannot be computed.
        more: layers that are measured without series of their own.
        norm_layers: parameters of normalization layers.

    Attributes:
        values: by series, once they are known.
        layers: by layer and quantity.
        fields: savefields that extensions are to compute.
        listens: whether the norms of whole gradients are needed, too.
        failures: savefields or names of quantities that could not be computed in the end, and why.
    """

    def __init__(
        self,
        quantities: Sequence[Quantity],
        chosen: Sequence[str],
        noise: dict[str, RunningNoiseScale],
        ema: float,
        trajectory: Trajectory,
        off: Collection[str] = (),
        more: Collection[str] = (),
        norm_layers: Collection[Parameter] = (),
    ) -> None:
        self._quantities, self._chosen, self._more = quantities, chosen, more
        self._noise, self._ema, self._trajectory = noise, ema, trajectory
        self.values: dict[str, float] = {}
        self.layers: dict[str, dict[str, float]] = {}
        self._updated: dict[str, list[Parameter]] = {}
        self._histograms: dict[str, Numbers | dict[str, Any]] = {}
        self._norm_layers = norm_layers
        self._pictures: dict[str, Tensor] = {}
        self._off: set[str] = set()
        self.failures: list[tuple[set[str], Exception]] = []
        self.too_noisy = 0  # samples of a batch that was too small
        self.turn_off(off)

    def turn_off(self, fields: Collection[str]) -> None:
        """Leave out what needs one of these, which could not be computed in this process.

        Args:
            fields: savefields or names of quantities.
        """
        self._off |= set(fields)
        paths = {quantity.name: quantity.path(self._off) for quantity in self._quantities}
        self._names = {name for name, path in paths.items() if path is not None}
        self._fields = dict.fromkeys(field for path in paths.values() for field in path or ())
        # No extension computes parts; norms of all layers have those of normalization layers, too.
        known = {PARTS, NORM_LAYERS} if "batch_l2" in self._fields else {PARTS}
        self.fields = [field for field in self._fields if field not in known]
        self.listens = PARTS in self._fields

    @torch.no_grad()
    def measure(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        optimizer: Optimizer,
        grads: dict[Parameter, Tensor],
        window: Window,
        divisor: float,
        passes: int,
    ) -> None:
        """Before the step of an optimizer.

        Args:
            trainer: of the run.
            pl_module: has the layers.
            optimizer: whose parameters are measured.
            grads: their accumulated gradients.
            window: the backward passes that they come from.
            divisor: of the accumulated gradients, gives those of the window.
            passes: number of backward passes that share the loss' mean.
        """
        step = _Step(trainer, optimizer, grads, window, divisor, passes)
        jobs = self._jobs(step, pl_module)
        # Together: one reduction and one wait for the device, however many layers.
        values = dict(zip(jobs, measure(list(jobs.values()), trainer.strategy), strict=True))
        self.failures += [failure for one in jobs.values() for failure in one.measurement.failures]
        self.values |= {f"{name}{step.suffix}": value for name, value in values.pop("").items()}
        of_norms = values.pop(NORM_LAYERS, {})
        if "noise_scale" in of_norms:
            self.values[f"noise_scale_norm_layers{step.suffix}"] = of_norms["noise_scale"]
        self.layers |= values
        whole = jobs[""]
        if whole.measurement.unseen:
            return
        if self._names & NOISE_SCALE and whole.noise.unresolved:
            self.too_noisy = whole.measurement.statistics.samples
        self._take_histograms(step, whole.measurement)
        self._follow_trajectory(step)

    def _jobs(self, step: _Step, pl_module: LightningModule) -> dict[str, Job]:
        """What is measured at a step: all parameters, each layer, the normalization layers."""
        jobs = {"": self._job(step, list(step.grads), "")}
        all_layers = parameters_by_layer(pl_module) if self._chosen or self._more else {}
        for layer, params in all_layers.items():
            mine = [p for p in params if p in step.grads]
            # Where some layers have series, the others are measured as well: all are in the heat
            # map.
            if mine and (self._chosen or layer in self._more):
                jobs[layer] = self._job(step, mine, layer)
        if "noise_scale_norm_layers" in self._names:
            mine = [p for p in self._norm_layers if p in step.grads]
            if mine:
                jobs[NORM_LAYERS] = self._norm_job(step, mine)
        return jobs

    def _job(self, step: _Step, params: Sequence[Parameter], layer: str) -> Job:
        """What is measured of a layer, or of all parameters, which have no name."""
        quantities = [q for q in self._quantities if not layer or q.per_layer]
        names = {quantity.name for quantity in quantities}
        fields = dict.fromkeys(
            field for quantity in quantities for field in (*quantity.fields, *quantity.instead)
        )
        # What is lost in this process stays a key of the reduction: others may have it.
        lost = fields.keys() - self._fields.keys()
        measurement = step.measurement(
            params,
            fields,
            lost,
            pool="sample_norms" in names,
            with_loss="cabs" in names,
            with_entries=bool(names & ENTRIES),
        )
        return Job(quantities, measurement, self._noise_of(step, layer))

    def _norm_job(self, step: _Step, params: Sequence[Parameter]) -> Job:
        """The noise scale of normalization layers."""
        lost = []
        if not {"batch_l2", NORM_LAYERS} & {*self._fields}:
            lost.append("batch_l2")
        if PARTS not in self._fields:
            lost.append(PARTS)
        measurement = step.measurement(params, ["batch_l2", PARTS], lost)
        return Job([QUANTITIES["noise_scale"]], measurement, self._noise_of(step, NORM_LAYERS))

    def _noise_of(self, step: _Step, layer: str) -> RunningNoiseScale:
        return self._noise.setdefault(f"{layer}{step.suffix}", RunningNoiseScale(self._ema))

    def _take_histograms(self, step: _Step, measurement: Measurement) -> None:
        """Keep what is no number: norms of samples, and the counts of gradients' entries."""
        if "sample_norms" in self._names:
            self._histograms[f"sample_norms{step.suffix}"] = measurement.norms
        if ONE in self._names and ONE in self._fields:
            unit = measurement.statistics.unit(ONE)
            histogram = histogram_1d(measurement.counts(ONE), unit)
            self._histograms[f"{ONE}{step.suffix}"] = histogram
        if TWO in self._names:
            image = image_2d(measurement.counts(TWO))
            if image is not None:
                self._pictures[f"{TWO}{step.suffix}"] = image

    def _follow_trajectory(self, step: _Step) -> None:
        """Measure what needs the gradient before this one, or the parameters after the update."""
        if "alpha" in self._names:
            alpha = self._trajectory.alpha(step.grads, step.divisor)
            if alpha is not None:
                self._add(f"alpha{step.suffix}", alpha)
        if self._names & {"update_size", "distance"}:
            self._updated[step.suffix] = list(step.grads)
        if "update_size" in self._names:
            self._trajectory.begin_update(step.grads)

    def _add(self, name: str, value: Tensor) -> None:
        if value.isfinite():
            self.values[name] = float(value)

    def follow_updates(self, pl_module: LightningModule) -> None:
        """After the steps of all optimizers."""
        names: Mapping[Tensor, str] = (
            {p: name for name, p in pl_module.named_parameters()} if self._updated else {}
        )
        for suffix, params in self._updated.items():
            size = self._trajectory.update_size(dict(zip(params, params)))
            if size is not None:
                self._add(f"update_size{suffix}", size)
            if "distance" in self._names:
                now = {names[p]: p.detach() for p in params if p in names}
                self._add(f"distance{suffix}", distance(now, self._trajectory.initial))
        self._trajectory.end_update()

    def publish(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        events: Events,
        histograms: bool,
        prog_bar: Collection[str],
    ) -> None:
        """Write the numbers, if there are any."""
        if not self.values and not self._histograms and not self._pictures:
            return
        beyond = self._chosen and len(self.layers) > len(self._chosen)
        image = heat_map(self.layers) if beyond else None
        pictures = self._pictures if histograms else {}
        images = {f"{GROUP}/{name}": picture for name, picture in pictures.items()}
        if image is not None:
            images[f"{LAYERS}/all"] = image
        samples = self._histograms if histograms else {}
        layers = self.values_of_layers
        publish(trainer, pl_module, events, self.values, layers, samples, images, prog_bar)

    def values_of(self, suffix: str) -> dict[str, float]:
        """Series of one of several optimizers, by their names without its suffix."""
        return {
            name.removesuffix(suffix): value
            for name, value in self.values.items()
            if name.endswith(suffix)
        }

    @property
    def values_of_layers(self) -> dict[str, float]:
        """Series of the chosen layers: quantity/layer."""
        return {
            f"{name}/{layer}": value
            for layer in self._chosen
            for name, value in self.layers.get(layer, {}).items()
        }


def suffix_of(trainer: Trainer, optimizer: Optimizer) -> str:
    """Of the series of an optimizer, if there are several."""
    optimizers = trainer.optimizers
    return "" if len(optimizers) == 1 else f"/optimizer_{optimizers.index(optimizer)}"


def warn_of_noise(trainer: Trainer, samples: int, ema: float) -> None:
    """Say why the noise scale has gaps."""
    rank_zero_warn(
        f"At step {trainer.fit_loop.epoch_loop._batches_that_stepped} the batches of "
        f"{samples * getattr(trainer.strategy, 'world_size', 1)} samples are too small to resolve "
        "the gradient: `curvature/noise_scale` has gaps where the average of "
        "`curvature/grad_signal` is not positive. Enlarge the batches (`accumulate_grad_batches`) "
        f"or average longer (`ema`, now {ema})."
    )
