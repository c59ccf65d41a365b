"""Write values to the loggers of a trainer, once and at the right step."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_curv.callbacks.monitoring.quantiles import Numbers
from lightning_curv.callbacks.monitoring.tolerance import Tolerance

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer
    from pytorch_lightning.loggers import Logger

GROUP = "curvature"
LAYERS = "curvature_layers"
BINS = 30
HELD, HELD_SECONDS = 8, 1.0  # events that are written together, at most so long after the last time
NORM_BAND = ["sample_norm_median", "sample_norm_p5", "sample_norm_p95"]


class Events:
    """What is on its way to TensorBoard's files: one event per logged step, written some at a time.

    Alone, each costs more than twice as much: between two steps, the code that makes and writes it
    leaves the processor's caches.

    Attributes:
        tolerance: of what loggers raise.
    """

    def __init__(self) -> None:
        self._held: list[tuple[Any, ...]] = []
        self._due = 0.0
        self.tolerance = Tolerance()

    def add(self, *event: Any) -> None:
        """Take the arguments of `_write_event` without the time."""
        now = time.time()
        self._held.append((*event, now))
        if len(self._held) >= HELD or now >= self._due:
            self.write()

    def write(self) -> None:
        """Write what is held back."""
        while self._held:
            with self.tolerance.tolerating():
                _write_event(*self._held.pop(0))
        self._due = time.time() + HELD_SECONDS


def publish(
    trainer: Trainer,
    pl_module: LightningModule,
    events: Events,
    values: Mapping[str, float],
    layers: Mapping[str, float],
    histograms: Mapping[str, Numbers | dict[str, Any]],
    images: Mapping[str, Tensor] | None = None,
    prog_bar: Collection[str] = (),
    steps_ago: int = 0,
) -> None:
    """Log to the groups "curvature" and "curvature_layers" at the current optimizer step.

    `LightningModule.log` would write the values again at every later logging step of the epoch.

    Args:
        trainer: of the run.
        pl_module: shows the progress bar's.
        events: on their way to TensorBoard.
        values: by series.
        layers: by series/layer.
        histograms: samples by name, ascending, or what `binned` makes of them.
        images: by group/name.
        prog_bar: series to show on the progress bar.
        steps_ago: at how many steps before the current one.
    """
    tagged = {f"{GROUP}/{name}": torch.scalar_tensor(value) for name, value in values.items()}
    trainer._logger_connector._callback_metrics.update(
        tagged
    )  # the public property first collects those of the epoch
    for name in prog_bar:
        if f"{GROUP}/{name}" in tagged:
            # Loggers get it below, once.
            pl_module.log(f"{GROUP}/{name}", tagged[f"{GROUP}/{name}"], prog_bar=True, logger=False)
    # Not `global_step`, which counts the steps of several optimizers one by one.
    step = trainer.fit_loop.epoch_loop._batches_that_stepped - steps_ago
    for logger in trainer.loggers:
        separator = getattr(logger, "group_separator", "/")
        separator = separator if isinstance(separator, str) else "/"  # of a mock
        metrics = {f"{GROUP}{separator}{name}": value for name, value in values.items()}
        metrics |= {
            f"{LAYERS}{separator}{name.replace('/', separator)}": value
            for name, value in layers.items()
        }
        samples = {f"{GROUP}{separator}{name}": numbers for name, numbers in histograms.items()}
        pictures = {name.replace("/", separator): image for name, image in (images or {}).items()}
        with events.tolerance.tolerating():
            write = events.add if _is_plain_tensorboard(logger) else _write
            write(logger, step, metrics, samples, pictures)


def _write(
    logger: Logger,
    step: int,
    metrics: dict[str, float],
    samples: Mapping[str, Numbers | dict[str, Any]],
    images: Mapping[str, Tensor],
) -> None:
    """Through the methods of a logger; histograms and images if its experiment takes them."""
    logger.log_metrics(metrics, step)
    experiment = getattr(logger, "experiment", None)
    if add_histogram := getattr(experiment, "add_histogram_raw", None):
        for name, numbers in samples.items():
            if histogram := binned(numbers):
                add_histogram(name, **histogram, global_step=step)
    if add_image := getattr(experiment, "add_image", None):
        for name, image in images.items():
            add_image(name, image, global_step=step)


def _is_plain_tensorboard(logger: Any) -> bool:
    """Whether a logger only hands metrics on to TensorBoard.

    Lightning's does, in the process that writes.
    """
    tensorboard = sys.modules.get(
        "torch.utils.tensorboard"
    )  # 0.1 s to import, for loggers that do not need it
    if tensorboard is None or not _module_of_log_metrics(logger).endswith(
        "fabric.loggers.tensorboard"
    ):
        return False
    # Elsewhere the experiment is a dummy, and `log_metrics` puts a prefix before names.
    return type(logger.experiment) is tensorboard.SummaryWriter and not logger._prefix


def _module_of_log_metrics(logger: Any) -> str:
    return getattr(getattr(type(logger), "log_metrics", None), "__module__", None) or ""


def _write_event(
    logger: Any,
    step: int,
    metrics: dict[str, float],
    samples: Mapping[str, Numbers | dict[str, Any]],
    images: Mapping[str, Tensor],
    moment: float,
) -> None:
    """What `_write` leaves in TensorBoard's file, as one event: each wakes the writing thread."""
    tensorboard = sys.modules["torch.utils.tensorboard.summary"]
    values = [{"tag": name, "simple_value": value} for name, value in metrics.items()]
    for name, numbers in samples.items():
        if histogram := binned(numbers):
            values += tensorboard.histogram_raw(name, **histogram).value
    for name, image in images.items():
        values += tensorboard.image(name, image, dataformats="CHW").value
    event = sys.modules["torch.utils.tensorboard.writer"].Event(summary={"value": values})
    logger.experiment._get_file_writer().add_event(event, step, moment)


def binned(samples: Numbers | dict[str, Any]) -> dict[str, Any]:
    """A histogram of equal bins of ascending samples; empty if there is nothing to count.

    0.6 kB in an event file.
    """
    if isinstance(samples, dict):
        return samples
    if not len(samples) or not math.isfinite(squares := float((samples * samples).sum())):
        return {}
    low, high = float(samples[0]), float(samples[-1])
    # Equal samples have no range, zeros no magnitude either.
    width = (high - low) / BINS or abs(high) / BINS or 1.0
    limits = [low + i * width for i in range(1, BINS + 1)]
    upto = samples.searchsorted(limits[:-1], side="right").tolist()
    return {
        "min": low,
        "max": high,
        "num": len(samples),
        "sum": float(samples.sum()),
        "sum_squares": squares,
        "bucket_limits": limits,
        "bucket_counts": [b - a for a, b in zip([0, *upto], [*upto, len(samples)], strict=True)],
    }


def add_layout(trainer: Trainer, series: Collection[str], events: Events) -> None:
    """Describe the charts of TensorBoard's "Custom Scalars".

    The norms are a band, every other series has a chart by itself.
    """
    charts: dict[str, list[object]] = {}
    if set(NORM_BAND) <= set(series):
        # Names are regular expressions there: without an end one would find longer names, too.
        charts["sample norms"] = ["Margin", [f"{GROUP}/{name}$" for name in NORM_BAND]]
    charts |= {
        name: ["Multiline", [f"{GROUP}/{name}$"]] for name in series if name not in NORM_BAND
    }
    for logger in trainer.loggers:
        with events.tolerance.tolerating():
            add = getattr(getattr(logger, "experiment", None), "add_custom_scalars", None)
            if add is not None:
                add({GROUP: charts})


def heat_map(rows: Mapping[str, Mapping[str, float]], pixels: int = 8) -> Tensor | None:
    """An image [3, H, W]: a row per layer, a column per quantity.

    Black: no value; dark blue to yellow: small to large, on a logarithmic scale from a column's
    least value to its largest.
    """
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    if not columns:
        return None
    table = torch.tensor([[_log(row.get(name)) for name in columns] for row in rows.values()])
    low = table.nan_to_num(nan=math.inf).amin(0)
    high = table.nan_to_num(nan=-math.inf).amax(0)
    # A column of equal values has no range.
    shade = (table - low) / (high - low).clamp(min=1e-9)
    dark, bright = torch.tensor([0.15, 0.15, 0.45]), torch.tensor([1.0, 0.9, 0.2])
    image = torch.lerp(dark[:, None, None], bright[:, None, None], shade[None])
    image = torch.where(shade.isnan(), torch.zeros(()), image)
    return image.repeat_interleave(pixels, 1).repeat_interleave(4 * pixels, 2)


def _log(value: float | None) -> float:
    return math.log10(value) if value is not None and value > 0 else math.nan
