"""`CurvatureCallback(report=...)`: one page about a run, whatever becomes of the run."""

import json
import math
import re
import warnings
from pathlib import Path

import fsspec
import pytest
import pytorch_lightning as pl
import torch
from browser import open_page
from monitoring import (
    CONSTANT,
    ManualNet,
    Net,
    Scaled,
    assert_nothing_left_behind,
    assert_same_parameters,
    data,
    fit,
    per_sample_gradients,
    sgd,
)
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_curv import CurvatureCallback
from lightning_curv.callbacks import Alarm
from lightning_curv.callbacks.run_report import course, run_report
from lightning_curv.callbacks.run_report.course import Course, Series, evenly
from lightning_curv.callbacks.run_report.figures import curves, heat_map
from lightning_curv.callbacks.run_report.labels import CHARTS, Chart

pytestmark = pytest.mark.filterwarnings("ignore:At step .* are too small:UserWarning")


def figures(page):
    """What the page draws, by place."""
    text = Path(page).read_text()
    return json.loads(re.search(r"const FIGURES=(\{.*\});\n?// Draws", text)[1])


def drawn(page, name):
    """Steps and values of a series, as they are, in the chart whose legend says so."""
    for figure in figures(page).values():
        for trace in figure["data"]:
            if f"<br>{name} %{{y" in trace.get("hovertemplate", ""):
                return trace["x"], trace["y"]
    raise AssertionError(f"no trace of {name}")


def words(page):
    """Text outside of scripts and styles."""
    text = re.sub(r"<(script|style)>.*?</\1>", " ", Path(page).read_text(), flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text))


# Series


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 16, 17, 100, 1000])
def test_series_are_bounded_evenly_spaced_and_have_both_ends(count):
    series = Series(8)
    for step in range(count):
        series.add(step, -step)
        assert len(series) <= 8
    assert series.values == [-step for step in series.steps]
    assert series.steps[0] == 0
    assert series.steps[-1] == count - 1
    gaps = {b - a for a, b in zip(series.steps, series.steps[1:-1])}
    assert len(gaps) <= 1
    assert len(series) >= min(count, 4)


def test_a_series_goes_on_after_its_state_was_saved():
    for stop in range(1, 40):
        whole, part = Series(8), Series(8)
        for step in range(stop):
            part.add(step, float(step))
        other = Series(8)
        other.load_state_dict(json.loads(json.dumps(part.state_dict())))
        for step in range(60):
            whole.add(step, float(step))
            if step >= stop:
                other.add(step, float(step))
        assert other.steps == whole.steps


def test_series_that_are_measured_rarely_keep_their_points():
    found = Course()
    for step in range(5000):
        found.add(step, {"often": 1.0} | ({"rarely": 2.0} if step % 10 == 9 else {}), {})
    assert 500 <= len(found.series["often"]) <= course.MOST_POINTS
    assert len(found.series["rarely"]) == 500


def test_a_spike_is_remembered_where_its_step_is_dropped():
    found = Course()
    for step in range(5000):
        found.add(step, {"grad_norm": 1.0 + 99 * (step == 1001)}, {})
    assert 1001 not in found.series["grad_norm"].steps
    assert found.largest["grad_norm"] == (1001, 100.0)


def test_numbers_that_are_none_are_left_out():
    found = Course()
    found.add(0, {"loss": math.nan, "grad_norm": math.inf, "alpha": 1.0}, {})
    assert list(found.series) == ["alpha"]


def test_layers_are_chosen_evenly():
    assert evenly(list("abc"), 5) == list("abc")
    names = [str(i) for i in range(500)]
    assert len({*evenly(names, 60)}) == 60
    assert evenly(names, 60)[::59] == ["0", "499"]


# Runs


def test_the_page_has_all_series_true_values_and_the_run(tmp_path):
    page, net = tmp_path / "report.html", Net()
    settings = {"batch_size": 3, "accumulate_grad_batches": 2, "epochs": 4}
    fit(net, CurvatureCallback("all", report=page), **settings)
    steps, norms = drawn(page, "gradient norm")
    assert steps == list(range(16))
    truth = [per_sample_gradients(net, step).mean(0).norm().item() for step in steps]
    assert norms == pytest.approx(truth, rel=1e-5)
    losses = [
        sum(float(net.loss(functional(net, params, x), y)) for params, x, y in at(net, step)) / 2
        for step in steps
    ]
    assert drawn(page, "loss")[1] == pytest.approx(losses, rel=1e-5)
    assert {*drawn(page, "batch of this run")[1]} == {6.0}
    text = words(page)
    for title in {chart.title for chart in CHARTS} - {"Learning rate", "Batch size by CABS"}:
        assert title in text
    for fact in ("Net", "51", "6 samples (2 accumulated)", "SGD, lr 0.1", "16 in 4 epochs"):
        assert fact in text
    for fact in ("Finished", f"torch {torch.__version__}", "lightning_curv", "CPU", "64-true"):
        assert fact in text
    layers = [f for f in figures(page).values() if f["data"][0]["type"] == "heatmap"]
    assert len(layers) > 4
    assert layers[0]["data"][0]["y"] == ["net.0", "net.3"]
    first = per_sample_gradients(net, 0).mean(0)
    column = [row[0] for row in layers[0]["data"][0]["customdata"]]
    assert column == pytest.approx([first[:30].norm().item(), first[30:].norm().item()], rel=1e-3)


def at(net, step):
    return [(params, *batch) for seen, params, batch in net.seen if seen == step]


def functional(net, params, x):
    return torch.func.functional_call(net, params, (x,))


def test_the_loss_carries_no_scale(tmp_path):
    page, net = tmp_path / "report.html", Net()
    fit(net, CurvatureCallback(report=page), precision=None, plugins=[Scaled()], epochs=1)
    truth = [float(net.loss(functional(net, p, x), y)) for p, x, y in at(net, 0)]
    assert drawn(page, "loss")[1][:1] == pytest.approx(truth, rel=1e-5)


def test_a_report_changes_neither_training_nor_what_loggers_get(tmp_path):
    nets, headers = [Net(dropout=0.5), Net(dropout=0.5), Net(dropout=0.5)], []
    fit(nets[0], logger=CSVLogger(tmp_path / "plain"))
    for net, report in ((nets[1], False), (nets[2], True)):
        logger = CSVLogger(tmp_path / str(report), name="", version="")
        fit(net, CurvatureCallback(report=report), logger=logger)
        headers.append((tmp_path / str(report) / "metrics.csv").read_text())
    assert headers[0] == headers[1]
    assert_same_parameters(nets[0], nets[1])
    assert_same_parameters(nets[0], nets[2])
    assert_nothing_left_behind(nets[2])
    assert (tmp_path / "True" / run_report.NAME).exists()


def test_without_a_logger_it_is_in_the_root_folder(tmp_path):
    fit(Net(), CurvatureCallback(report=True), default_root_dir=tmp_path)
    assert (tmp_path / run_report.NAME).exists()


def test_it_goes_where_fsspec_leads():
    fit(Net(), CurvatureCallback(report="memory://reports/mine.html"))
    with fsspec.open("memory://reports/mine.html") as file:
        assert b"Curvature report" in file.read()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_run_that_ends_by_an_error_has_a_report(tmp_path, error):
    class Fails(Net):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise error("on purpose")
            return super().training_step(batch, batch_idx)

    page = tmp_path / "report.html"
    with pytest.raises((error, SystemExit)):
        fit(Fails(), CurvatureCallback(report=page))
    assert f"Ended early by {error.__name__}" in words(page)
    assert drawn(page, "gradient norm")[0] == [0, 1, 2]


def test_a_run_that_is_stopped_has_a_report(tmp_path):
    class Stops(Net):
        def on_train_batch_end(self, *args):
            self.trainer.should_stop = self.trainer.global_step == 5

    page = tmp_path / "report.html"
    fit(Stops(), CurvatureCallback(report=page), epochs=9)
    assert drawn(page, "gradient norm")[0] == [0, 1, 2, 3, 4]


def test_alarms_that_went_off_are_found(tmp_path):
    page = tmp_path / "report.html"
    alarms = [Alarm("grad_norm", above=0.0), Alarm("grad_norm", above=1e9)]
    with pytest.warns(UserWarning, match="Alarm at step 0"):
        fit(Net(), CurvatureCallback(report=page, alarms=alarms), epochs=1)
    text = words(page)
    assert text.count("Alarm: ") == 1
    assert f"Alarm: {alarms[0]}" in text
    assert "It went off at 4 steps, first at step 0, last at step 3." in text


def full(self, *args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("fault", ["full", "no folder", "drawing"])
def test_a_page_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch, fault):
    page = tmp_path / "report.html"
    if fault == "full":
        monkeypatch.setattr(Path, "write_text", full)
    if fault == "drawing":
        monkeypatch.setattr(run_report, "curves", full)
    if fault == "no folder":
        (tmp_path / "file").write_text("")
        page = tmp_path / "file" / "report.html"
    net, plain = Net(), Net()
    with pytest.warns(UserWarning, match="cannot write its report to .* and goes on without"):
        trainer = fit(net, CurvatureCallback(report=page))
    assert trainer.state.finished
    fit(plain)
    assert_same_parameters(plain, net)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == (
        [tmp_path / "file"] if fault == "no folder" else []
    )


def test_a_run_without_a_logged_step_says_so(tmp_path):
    page = tmp_path / "report.html"
    with pytest.warns(UserWarning, match="writes no report: no step was logged"):
        fit(Net(), CurvatureCallback(report=page, every_n_steps=1000))
    assert not page.exists()


def test_a_trial_run_has_none(tmp_path):
    page = tmp_path / "report.html"
    fit(Net(), CurvatureCallback(report=page), fast_dev_run=True)
    assert not page.exists()


def test_plotly_is_asked_for_before_the_run(monkeypatch):
    monkeypatch.setattr(run_report, "find_spec", lambda name: None)
    CurvatureCallback()
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-curv\[report\]'"):
        CurvatureCallback(report=True)


def test_another_kind_of_file_is_refused():
    with pytest.raises(ValueError, match=r"`report` must .* ends in '.html', found 'page.pdf'"):
        CurvatureCallback(report="page.pdf")


def test_the_report_of_a_resumed_run_is_of_all_of_it(tmp_path):
    whole, first, second = (tmp_path / f"{name}.html" for name in ("whole", "first", "second"))
    fit(Net(), CurvatureCallback(report=whole), epochs=4)
    saved = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    fit(Net(), CurvatureCallback(report=first), saved, epochs=2, enable_checkpointing=True)
    trainer = pl.Trainer(
        max_epochs=4,
        callbacks=[CurvatureCallback(report=second)],
        precision="64-true",
        accelerator="cpu",
        logger=False,
        log_every_n_steps=1,
        **CONSTANT,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
        loader = DataLoader(data(), batch_size=6)
        trainer.fit(Net().double(), loader, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    for name in ("gradient norm", "loss"):
        resumed, expected = drawn(second, name), drawn(whole, name)
        assert resumed[0] == expected[0] == list(range(16))
        assert resumed[1] == pytest.approx(expected[1], rel=1e-5)
    assert len(drawn(first, "loss")[0]) == 8


def test_several_optimizers_have_charts_of_their_own(tmp_path):
    class Two(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            return sgd(self.net[0].parameters()), sgd(self.net[3].parameters())

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            for optimizer in self.optimizers():
                optimizer.step()

    page = tmp_path / "report.html"
    fit(Two(), CurvatureCallback(report=page))
    text = words(page)
    assert "Gradient norm, optimizer_0" in text
    assert "Gradient norm, optimizer_1" in text
    assert "SGD, lr 0.1; SGD, lr 0.1" in text


def test_in_manual_optimization_nothing_is_guessed(tmp_path):
    page = tmp_path / "report.html"
    fit(ManualNet(), CurvatureCallback(report=page))
    assert "Training loss" not in words(page)
    assert "Batch unknown" in words(page)


def test_one_of_two_processes_writes(tmp_path):
    page, alone = tmp_path / "report.html", tmp_path / "alone.html"
    fit(Net(), CurvatureCallback(report=alone), epochs=1)
    settings = {"strategy": "ddp_spawn", "devices": 2, "batch_size": 3, "epochs": 1}
    fit(Net(), CurvatureCallback(report=page), **settings)
    assert "6 samples (2 processes)" in words(page)
    assert {path.name for path in tmp_path.iterdir()} == {"alone.html", "report.html"}
    assert len(drawn(page, "gradient norm")[0]) == 4
    maps = [f for f in figures(page).values() if f["data"][0]["type"] == "heatmap"]
    assert maps[0]["data"][0]["y"] == ["net.0", "net.3"]


# Figures


def series_of(values):
    found = Series()
    for step, value in enumerate(values):
        found.add(step, float(value))
    return found


def test_an_axis_is_logarithmic_only_where_that_can_be():
    chart = Chart("title", "unit", ("number",))
    for values, kind in (([1, 2, 3], None), ([1, 1000], "log"), ([-1, 1000], None)):
        figure = curves(chart, {"number": series_of(values)})
        assert figure.layout.yaxis.type == kind
        assert figure.layout.yaxis.title.text == "unit"
        assert figure.layout.xaxis.title.text == "optimizer step"


def test_a_heat_map_has_gaps_where_nothing_was_measured():
    rows = Series()
    rows.add(0, {"a": 10.0})
    rows.add(5, {"a": 1.0, "b": 0.0})
    figure = heat_map(rows, ["b", "a", "never"])
    [trace] = figure.data
    assert list(trace.y) == ["b", "a"]
    assert [list(row) for row in trace.z] == [[None, None], [1.0, 0.0]]
    assert [list(row) for row in trace.customdata] == [[None, 0.0], [10.0, 1.0]]
    assert heat_map(Series(), ["a"]) is None


# The page itself


class Odd(Net):
    """Names that would end a script, or be taken for tags."""

    def __init__(self):
        super().__init__()
        layers = {"</script><b>": self.net[0], "a'\"&": self.net[3]}
        del self.net
        self.odd = nn.ModuleDict(layers)
        self.net = nn.Sequential(layers["</script><b>"], nn.Tanh(), layers["a'\"&"])


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    net = Odd()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(net, CurvatureCallback(["default", "alpha"], report=path), epochs=20)
    return path


def test_the_page_loads_nothing(page):
    text = page.read_text()
    markup = re.sub(r"<script>.*?</script>", "<script></script>", text, flags=re.DOTALL)
    assert not re.search(r"(src|href|srcset|action|data)\s*=", markup.replace("data-", ""))
    assert not re.search(r"@import|url\(", re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1])
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert "default-src 'none'" in policy  # a browser refuses what scripts might ask for
    assert not re.search(r"https?:|\*|'self'", policy)
    assert page.stat().st_size < 6_000_000


@pytest.mark.parametrize(("size", "theme"), [("1280,900", "light"), ("500,900", "dark")])
def test_a_browser_draws_all_curves_without_an_error(page, size, theme):
    dark = ["--blink-settings=preferredColorScheme=0"] if theme == "dark" else []
    shown = open_page(page, f"--window-size={size}", *dark)
    assert shown.messages == []
    places = figures(page)
    maps = sum(figure["data"][0]["type"] == "heatmap" for figure in places.values())
    plots = len(places) - maps + 1  # of the maps the one that is chosen
    assert f'data-drawn="{plots}"' in shown.dom
    assert "data-failed" not in shown.dom
    assert shown.dom.count('class="main-svg"') >= plots
    for card in shown.dom.split('<figure class="card"')[1 : len(places) - maps + 1]:
        paths = re.findall(r'<path class="js-line"[^>]* d="(M[^"]+)"', card)
        points = max(len(re.findall(r"-?[\d.]+,-?[\d.]+", path)) for path in paths)
        assert points > 5
    assert '<image xmlns="http://www.w3.org/2000/svg"' in shown.dom  # the heat map
    assert "&lt;/script&gt;&lt;b&gt;" in shown.dom  # a layer's name on its axis
    assert shown.dom.count('class="map" hidden') == maps - 1
    ink = "rgb(151, 163, 180)" if theme == "dark" else "rgb(91, 102, 117)"
    assert f"fill: {ink}" in shown.dom


def test_another_map_is_drawn_when_it_is_chosen(page, tmp_path):
    choosing = """<script>setTimeout(() => {
    choice.value = "1"; choice.dispatchEvent(new Event("change")); }, 3000)</script>"""
    chosen = tmp_path / "chosen.html"
    chosen.write_text(page.read_text().replace("</body>", f"{choosing}</body>"))
    before, after = (open_page(path).dom for path in (page, chosen))
    for dom, images in ((before, [True, False]), (after, [True, True])):
        maps = dom.split('<div class="map"')[1:]
        assert [bool(re.search(r"<image [^>]*data:image", text)) for text in maps[:2]] == images
    assert [text.startswith(" hidden") for text in after.split('<div class="map"')[1:3]] == [
        True,
        False,
    ]


def test_a_page_that_asks_for_something_is_refused_by_its_own_policy(page, tmp_path):
    """What the other tests rely on: a browser says so in its console."""
    asking = tmp_path / "asking.html"
    more = '<script>fetch("https://example.org/x")</script></body>'
    asking.write_text(page.read_text().replace("</body>", more))
    assert any("Content Security Policy" in message for message in open_page(asking).messages)
