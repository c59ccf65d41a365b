"""What else of Lightning a run has: a logger, a profiler, callbacks that change what is trained and when."""

import re
import sys
import warnings
from collections import Counter
from types import ModuleType, SimpleNamespace

import pytest
from monitoring import (
    Net,
    assert_logged_values_are_true,
    assert_same_parameters,
    expected,
    fit,
    per_sample_gradients,
    series,
    sgd,
)
from pytorch_lightning.callbacks import BackboneFinetuning, GradientAccumulationScheduler
from pytorch_lightning.loggers import CSVLogger, MLFlowLogger
from pytorch_lightning.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler

from lightning_curv import CurvatureCallback


class MLflow:
    """A client that takes what MLflow takes."""

    def __init__(self):
        self.seen = {}

    def log_batch(self, run_id, metrics=(), params=()):
        for metric in metrics:
            assert re.fullmatch(r"[\w./ -]+", metric.key)
            assert type(metric.value) is float
            assert (metric.key, metric.step) not in self.seen
            self.seen[metric.key, metric.step] = metric.value

    def get_run(self, run_id):
        return None


class Offline(MLFlowLogger):
    """Lightning's logger, whose server is here."""

    def __init__(self, client):
        super(MLFlowLogger, self).__init__()
        self._mlflow_client, self._run_id, self._experiment_id = client, "run", "experiment"
        self._initialized, self._prefix, self._log_batch_kwargs = True, "", {}
        self._tracking_uri, self._checkpoint_callback, self._log_model = "file:", None, False


def test_mlflow_gets_the_scalars(monkeypatch, tmp_path):
    entities = ModuleType("mlflow.entities")
    entities.Metric = entities.Param = SimpleNamespace
    monkeypatch.setitem(sys.modules, "mlflow", ModuleType("mlflow"))
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    client = MLflow()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="MLFlow only allows")
        net = Net()
        fit(net, CurvatureCallback(layers=True, layout=True), logger=Offline(client), epochs=1)
    for step in range(4):
        truth = expected(per_sample_gradients(net, step))["grad_norm"]
        assert client.seen["curvature/grad_norm", step] == pytest.approx(truth)
        assert client.seen["curvature_layers/grad_norm/net.0", step] > 0


def test_a_csv_file_has_the_scalars(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    net = Net()
    fit(net, CurvatureCallback(layers=True), logger=logger, epochs=1)
    header, *rows = (
        line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()
    )
    column = header.index("curvature/grad_norm")
    values = [float(row[column]) for row in rows]
    truth = [expected(per_sample_gradients(net, step))["grad_norm"] for step in range(4)]
    assert values == pytest.approx(truth)
    assert [int(row[header.index("step")]) for row in rows] == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", [SimpleProfiler, AdvancedProfiler, PyTorchProfiler])
def test_a_profiler_names_what_the_callback_does(tmp_path, kind):
    profiler, callback = kind(tmp_path, "found"), CurvatureCallback("grad_variance")
    plain, profiled = Net(), Net()
    fit(plain, epochs=1)
    fit(profiled, callback, profiler=profiler, epochs=1)
    assert_same_parameters(plain, profiled)
    if kind is SimpleProfiler:
        names = Counter({name: len(times) for name, times in profiler.recorded_durations.items()})
    elif kind is AdvancedProfiler:
        [report] = tmp_path.glob("*found.txt")
        names = re.findall(r"^Profile stats for: (.*?)(?: rank: \d+)?$", report.read_text(), re.M)
    else:
        events = profiler.function_events.key_averages()
        names = [event.key.removeprefix("[pl][profile]") for event in events]
    ours = f"[Callback]{callback.state_key}"
    assert {f"{ours}.on_before_backward", f"{ours}.during_backward"} <= {*names}
    if kind is SimpleProfiler:  # two layers in each of four steps
        assert names[f"{ours}.during_backward"] >= 8


class Backbone(Net):
    def __init__(self):
        super().__init__()
        self.backbone = self.net[0]

    def configure_optimizers(self):
        return sgd(self.net[3].parameters())


def test_a_backbone_has_values_once_it_is_trained(tmp_path):
    nets = [Backbone(), Backbone()]
    finetuning = [BackboneFinetuning(2, backbone_initial_lr=0.01) for _ in nets]
    fit(nets[0], finetuning[0], epochs=4)
    callback = CurvatureCallback(["default", "distance"], mc_samples=0)
    fit(nets[1], finetuning[1], callback, epochs=4, tmp_path=tmp_path)
    assert_same_parameters(*nets)
    for step in range(16):
        gradients = per_sample_gradients(nets[1], step)
        trained = gradients[:, 30:] if step < 8 else gradients  # the backbone has 30 parameters
        for name, value in expected(trained).items():
            assert series(tmp_path, name)[step] == pytest.approx(value, rel=1e-5), (name, step)


def test_accumulation_may_change_from_epoch_to_epoch(tmp_path):
    nets = [Net(), Net()]
    schedules = [GradientAccumulationScheduler({0: 1, 1: 2, 2: 3}) for _ in nets]
    fit(nets[0], schedules[0], epochs=3)
    fit(nets[1], schedules[1], CurvatureCallback(mc_samples=0), epochs=3, tmp_path=tmp_path)
    assert_same_parameters(*nets)
    steps = sorted({step for step, *_ in nets[1].seen})
    assert steps == list(range(4 + 2 + 2))
    assert_logged_values_are_true(nets[1], tmp_path, steps)
