"""Write values to the loggers of a trainer, once and at the right step."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor

from lightning_curv.callbacks.sketch import Numbers

GROUP = "curvature"
LAYERS = "curvature_layers"
BINS = 30
NORM_BAND = ["sample_norm_median", "sample_norm_p5", "sample_norm_p95"]


def publish(
    trainer: Trainer,
    pl_module: LightningModule,
    values: Mapping[str, float],
    layers: Mapping[str, float],
    histograms: Mapping[str, Numbers],
    image: Tensor | None = None,
    prog_bar: Collection[str] = (),
) -> None:
    """Log to the groups "curvature" and "curvature_layers" at the current optimizer step.

    `LightningModule.log` would write the values again at every later logging step of the epoch.
    """
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    for logger in trainer.loggers:
        separator = logger.group_separator
        metrics = {f"{GROUP}{separator}{name}": value for name, value in values.items()}
        metrics |= {f"{LAYERS}{separator}{name.replace('/', separator)}": value for name, value in layers.items()}
        experiment = getattr(logger, "experiment", None)
        with _as_one_event(experiment, step):
            logger.log_metrics(metrics, step=step)
            add_histogram = getattr(experiment, "add_histogram_raw", None)
            if add_histogram is not None:
                for name, samples in histograms.items():
                    if counts := binned(samples):
                        add_histogram(f"{GROUP}{separator}{name}", **counts, global_step=step)
            add_image = getattr(experiment, "add_image", None)
            if image is not None and add_image is not None:
                add_image(f"{LAYERS}{separator}all", image, global_step=step)
    tagged = dict(zip([f"{GROUP}/{name}" for name in values], torch.tensor([*values.values()]).unbind(), strict=True))
    trainer.callback_metrics.update(tagged)
    for name in prog_bar:
        if f"{GROUP}/{name}" in tagged:
            pl_module.log(f"{GROUP}/{name}", tagged[f"{GROUP}/{name}"], prog_bar=True, logger=False)


class _Gathering:
    """Stands for the file writer of a `SummaryWriter` and keeps the values that it is given."""

    def __init__(self, writer: Any) -> None:
        self.writer, self.summary = writer, None

    def add_summary(self, summary: Any, *_: Any) -> None:
        if self.summary is None:
            self.summary = summary
        else:
            self.summary.value.extend(summary.value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.writer, name)


@contextmanager
def _as_one_event(experiment: Any, step: int) -> Iterator[None]:
    """All that is written to TensorBoard as one event: half the time of one per value, each of which wakes a thread."""
    tensorboard = sys.modules.get("torch.utils.tensorboard")  # 0.1 s to import, for loggers that do not need it
    if tensorboard is None or not isinstance(experiment, tensorboard.SummaryWriter):
        yield
        return
    gathering = _Gathering(experiment._get_file_writer())
    vars(experiment)["_get_file_writer"] = lambda: gathering
    try:
        yield
    finally:
        del vars(experiment)["_get_file_writer"]
        if gathering.summary is not None:
            gathering.writer.add_summary(gathering.summary, step)


def binned(samples: Numbers) -> dict[str, Any]:
    """A histogram of equal bins of ascending samples, 0.6 kB in an event file; empty if there is nothing to count."""
    if not len(samples) or not math.isfinite(squares := float(samples @ samples)):
        return {}
    low, high = float(samples[0]), float(samples[-1])
    limits = low + np.arange(1, BINS + 1) * ((high - low) / BINS or abs(high) / BINS or 1.0)
    upto = samples.searchsorted(limits[:-1], side="right").tolist()
    return {
        "min": low,
        "max": high,
        "num": len(samples),
        "sum": float(samples.sum()),
        "sum_squares": squares,
        "bucket_limits": limits.tolist(),
        "bucket_counts": [b - a for a, b in zip([0, *upto], [*upto, len(samples)], strict=True)],
    }


def add_layout(trainer: Trainer, series: Collection[str]) -> None:
    """Describe the charts of TensorBoard's "Custom Scalars": the norms as a band, every other series by itself."""
    charts: dict[str, list[object]] = {}
    if set(NORM_BAND) <= set(series):
        charts["sample norms"] = ["Margin", [f"{GROUP}/{name}$" for name in NORM_BAND]]
    charts |= {name: ["Multiline", [f"{GROUP}/{name}$"]] for name in series if name not in NORM_BAND}
    for logger in trainer.loggers:
        add = getattr(getattr(logger, "experiment", None), "add_custom_scalars", None)
        if add is not None:
            add({GROUP: charts})


def heat_map(rows: Mapping[str, Mapping[str, float]], pixels: int = 8) -> Tensor | None:
    """An image [3, H, W]: a row per layer, a column per quantity; log scale from a column's least value to its largest.

    Black: no value; dark blue to yellow: small to large.
    """
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    if not columns:
        return None
    table = torch.tensor([[_log(row.get(name)) for name in columns] for row in rows.values()])
    low = table.nan_to_num(nan=math.inf).amin(0)
    high = table.nan_to_num(nan=-math.inf).amax(0)
    shade = (table - low) / (high - low).clamp(min=1e-9)
    dark, bright = torch.tensor([0.15, 0.15, 0.45]), torch.tensor([1.0, 0.9, 0.2])
    image = torch.lerp(dark[:, None, None], bright[:, None, None], shade[None])
    image = torch.where(shade.isnan(), torch.zeros(()), image)
    return image.repeat_interleave(pixels, 1).repeat_interleave(4 * pixels, 2)


def _log(value: float | None) -> float:
    return math.log10(value) if value is not None and value > 0 else math.nan
