"""Collects a run while it lasts, and writes the page at its end."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_curv.callbacks.run_report import description
from lightning_curv.callbacks.run_report.course import MOST_COLUMNS, MOST_POINTS, Course, evenly
from lightning_curv.callbacks.run_report.findings import judged, of_alarms
from lightning_curv.callbacks.run_report.labels import charts_of, split

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

    from lightning_curv.callbacks.monitoring.watch import Raised
    from lightning_curv.callbacks.monitoring.window import BackwardPass
    from lightning_curv.callbacks.run_report.page import Page, Picture

NAME = "curvature_report.html"
MAP_NOTE = "Layers in the order of the model, the first one on top."
MAPPED = ("grad_norm", "noise_scale", "grad_variance", "ggn_trace")  # first


class RunReport:
    """The report of one run.

    Args:
        where: a file's path; True: `curvature_report.html` in the folder of the logger; False: no
            report.

    Raises:
        ValueError: the path does not end in ".html".
        ModuleNotFoundError: plotly is not installed.
    """

    def __init__(self, where: bool | str | Path) -> None:
        self._where = where if isinstance(where, bool) else os.fspath(where)
        if isinstance(self._where, str) and not self._where.endswith(".html"):
            raise ValueError(
                f"`report` must be a bool or a path that ends in '.html', found {self._where!r}."
            )
        if where and find_spec("plotly") is None:
            raise ModuleNotFoundError(
                "`report` needs plotly, which is not installed: "
                "pip install 'lightning-curv[report]'."
            )
        self._course = Course()
        self._path = ""
        self._started: float | None = None
        self.layers: list[str] = []  # to be measured for it

    def __bool__(self) -> bool:
        return self._where is not False

    def state_dict(self) -> dict[str, Any]:
        return self._course.state_dict() | {"seconds": self._seconds()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._course = Course()
        self._course.load_state_dict(state)

    def forget(self) -> None:
        """Start a new run."""
        self._course, self._started = Course(), None

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """At the start of a fit, in all processes: `Trainer.log_dir` lets them talk."""
        self.layers = []
        if not self or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._started = time.perf_counter()
        self.layers = evenly([*description.layer_sizes(pl_module)])
        folder = trainer.log_dir if self._where is True else None
        if not isinstance(folder, str):  # none, or a mock's
            folder = trainer.default_root_dir
        self._path = self._where if isinstance(self._where, str) else f"{folder}/{NAME}"

    def add(
        self,
        trainer: Trainer,
        values: Mapping[str, float],
        layers: Mapping[str, Mapping[str, float]],
        passes: Sequence[BackwardPass],
        automatic: bool,
    ) -> None:
        """Take the numbers of a logged step, if there are any.

        Args:
            trainer: of the run.
            values: by series.
            layers: by layer and quantity.
            passes: that made its gradient.
            automatic: whether each of them has samples of its own, as in automatic optimization.
        """
        if self._started is None or not values:
            return
        more = {}
        if automatic or len(passes) == 1:
            # As the user returned them: without what Lightning and a scaler multiplied.
            losses = [float(p.loss / p.factor) for p in passes if p.loss is not None]
            # As the graph tells it, or else the batch.
            sizes = [p.samples or p.size or 0 for p in passes]
            if losses:
                more["loss"] = statistics.fmean(losses)
            if all(sizes):
                more["samples"] = float(sum(sizes) * trainer.world_size)
        rate = _learning_rate(trainer)
        if rate is not None:
            more["learning_rate"] = rate
        mapped = {layer: own for layer, own in layers.items() if layer in self.layers}
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        self._course.add(step, {**more, **values}, mapped)

    def end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        raised: Sequence[Raised] = (),
        error: BaseException | None = None,
    ) -> None:
        """Write the page, if this is the process that does.

        What goes wrong does not concern the run.

        Args:
            trainer: of the run.
            pl_module: that was trained.
            raised: alarms that went off.
            error: that ended the run.
        """
        if self._started is None:
            return
        # Not running any more: a second call writes nothing.
        seconds, self._started = self._seconds(), None
        self._course.seconds = seconds
        if not trainer.is_global_zero:
            return
        if not any(
            name not in ("loss", "samples", "learning_rate") for name in self._course.series
        ):
            rank_zero_warn(
                "CurvatureCallback writes no report: no step was logged. Log more often "
                "(`every_n_steps`)."
            )
            return
        try:
            page = self._page(trainer, pl_module, seconds, raised, error)
            write(self._path, page.html())
        except Exception as failure:
            rank_zero_warn(
                f"CurvatureCallback cannot write its report to {self._path} "
                f"({type(failure).__name__}: {failure}) and goes on without."
            )
            return
        rank_zero_info(f"CurvatureCallback has written a report of this run: {self._path}")

    def _seconds(self) -> float:
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        return self._course.seconds + running

    def _page(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        seconds: float,
        raised: Sequence[Raised],
        error: BaseException | None,
    ) -> Page:
        from lightning_curv.callbacks.run_report.page import Page

        sizes = description.layer_sizes(pl_module)
        momentum = description.sgd_momentum(trainer)
        findings, checked = judged(self._course, sizes, momentum)
        return Page(
            title=type(pl_module).__name__,
            subtitle=description.ending(error, datetime.now()),
            facts=description.facts(trainer, pl_module, self._course, seconds),
            versions=description.versions(),
            findings=[*of_alarms(raised), *findings],
            checked=checked,
            curves=curves(self._course),
            maps=maps(self._course, [*sizes]),
            remark=self._remark(len(sizes)),
        )

    def _remark(self, layers: int) -> str:
        thinned = any(len(series) > MOST_POINTS // 2 for series in self._course.series.values())
        parts = ["Pale lines are the values, strong ones their running mean."]
        if thinned:
            parts.append(f"Of long series, up to {MOST_POINTS:,} evenly spaced steps are kept.")
        if self._course.layers:
            parts.append(f"Maps have up to {MOST_COLUMNS} steps.")
        if layers > len(self.layers):
            parts.append(f"They show {len(self.layers)} of {layers} layers, evenly spaced.")
        return " ".join(parts)


def curves(course: Course) -> list[Picture]:
    """A picture per chart, and per optimizer if there are several."""
    from lightning_curv.callbacks.run_report.figures import curves as draw
    from lightning_curv.callbacks.run_report.page import Picture

    pictures = []
    for optimizer, series in by_optimizer(course).items():
        constant = series.get("learning_rate")
        if constant is not None and len({*constant.values}) == 1:  # is at the head of the page
            series = {name: points for name, points in series.items() if name != "learning_rate"}
        for chart in charts_of(series):
            title = f"{chart.title}, {optimizer}" if optimizer else chart.title
            pictures.append(Picture(title, chart.note, draw(chart, series)))
    return pictures


def by_optimizer(course: Course) -> dict[str, dict[str, Any]]:
    """Series by name, for every optimizer; "" has those that all share, or the only one's."""
    groups: dict[str, dict[str, Any]] = {}
    for name, series in course.series.items():
        base, optimizer = split(name)
        groups.setdefault(optimizer, {})[base] = series
    return groups


def maps(course: Course, layers: Collection[str]) -> list[Picture]:
    """A picture per quantity, the gradient norm first."""
    from lightning_curv.callbacks.run_report.figures import heat_map
    from lightning_curv.callbacks.run_report.labels import name_of
    from lightning_curv.callbacks.run_report.page import Picture

    order = {name: i for i, name in enumerate(MAPPED)}
    pictures = []
    for quantity in sorted(course.layers, key=lambda name: order.get(name, len(order))):
        figure = heat_map(course.layers[quantity], [*layers])
        if figure is not None:
            name = name_of(quantity)
            pictures.append(Picture(name[0].upper() + name[1:], MAP_NOTE, figure))
    return pictures


def write(path: str, text: str) -> None:
    """All of a file or nothing of it, on the disk or wherever fsspec leads."""
    if "://" in path:
        import fsspec

        with fsspec.open(path, "w", encoding="utf-8") as file:
            file.write(text)
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        # In one step: nobody finds half a page.
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _learning_rate(trainer: Trainer) -> float | None:
    """Of the only optimizer, if it has one that means something."""
    if len(trainer.optimizers) != 1 or getattr(trainer.optimizers[0], "relative_lr", False):
        return None
    rate = trainer.optimizers[0].param_groups[0].get("lr")
    return None if rate is None else float(rate)
