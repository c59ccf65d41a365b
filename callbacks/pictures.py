"""Pictures of what was logged."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_curv.callbacks.monitoring.publish import GROUP

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Course = Mapping[int, float]


def plot_critical_batch_size(
    logged: Course | str | Path,
    batch_size: int | None = None,
    axes: Axes | None = None,
    series: str = "noise_scale",
) -> Axes:
    """Draw the noise scale over training, beside the batch size of the run.

    The noise scale is the critical batch size: far below it a batch twice as large saves almost
    half of the steps, far above it the additional samples are wasted (McCandlish et al., 2018).
    Where the batch is smaller the area between the two is green, where it is larger red. Needs
    matplotlib.

    Args:
        logged: `{step: noise scale}`, or where a logger wrote it: a folder with TensorBoard's
            event files, or the `metrics.csv` of a `CSVLogger`.
        batch_size: Samples per optimizer step of the run.
        axes: Where to draw; new ones by default.
        series: Another noise scale, such as `noise_scale_norm_layers`.

    Returns:
        The axes; `axes.figure.savefig("critical_batch_size.png")` writes the picture.

    Raises:
        ValueError: The series is not there.
        ImportError: Matplotlib is not installed.

    Example:
        >>> axes = plot_critical_batch_size({0: 3.0, 10: 40.0, 20: 90.0}, batch_size=64)
        >>> axes.get_yscale()
        'log'
    """
    from matplotlib.figure import Figure

    course = _read(logged, series)
    # The axis is logarithmic.
    positive = {step: value for step, value in sorted(course.items()) if 0 < value < math.inf}
    if not positive:
        raise ValueError(
            f"`logged` must hold positive values of {GROUP}/{series}, found none. Where batches "
            "are too small to resolve the gradient the noise scale has gaps."
        )
    steps, values = [*positive], [*positive.values()]
    if axes is None:
        # Not by pyplot, which would keep the figure and choose a backend.
        axes = Figure(figsize=(6, 3.6), layout="constrained").add_subplot()
    axes.plot(steps, values, lw=2, color="C0", label=series.replace("_", " "))
    if batch_size is not None:
        axes.axhline(batch_size, color="black", ls=":", lw=1, label="batch size of this run")
        smaller = [value >= batch_size for value in values]
        for where, color in ((smaller, "C2"), ([not s for s in smaller], "C3")):
            axes.fill_between(
                steps, values, batch_size, where=where, interpolate=True, color=color, alpha=0.15
            )
    axes.set(title="critical batch size", xlabel="step", ylabel="samples")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend()
    return axes


def _read(logged: Course | str | Path, series: str) -> Course:
    """The course of a series, from wherever it is."""
    if isinstance(logged, Mapping):
        return logged
    path = Path(logged)
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            # One file has the rows of all metrics: most of them are empty here.
            rows = [row for row in csv.DictReader(file) if row.get(f"{GROUP}/{series}")]
        return {int(row["step"]): float(row[f"{GROUP}/{series}"]) for row in rows}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # 0: all points; of a long series a random sample would be kept.
    accumulator = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
    if f"{GROUP}/{series}" not in accumulator.Tags()["scalars"]:
        return {}
    return {event.step: event.value for event in accumulator.Scalars(f"{GROUP}/{series}")}
