"""What `CurvatureCallback` leaves in TensorBoard's event files: tags, steps, values, layers, layout and histograms."""

import math

import numpy as np
import pytest
from monitoring import NORMS, Net, data, fit, per_sample_gradients
from packages import needs
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch import nn
from torch.utils.data import DataLoader

from lightning_curv import CurvatureCallback
from lightning_curv.callbacks.monitoring import publish
from lightning_curv.callbacks.monitoring.layers import choose
from lightning_curv.callbacks.monitoring.publish import binned, heat_map

pytestmark = pytest.mark.filterwarnings(
    "ignore:At step .* are too small:UserWarning"
)  # they are, for speed
PER_LAYER = ["grad_norm", "grad_variance", "norm_test", "noise_scale", "ggn_trace_exact"]
HISTOGRAMS, IMAGES = ["curvature/sample_norms"], ["curvature_layers/all"]
SLICES = {"net.0": slice(0, 30), "net.3": slice(30, None)}


def events(tmp_path):
    sizes = dict.fromkeys(("scalars", "histograms", "images", "tensors"), 0)
    return EventAccumulator(str(tmp_path), size_guidance=sizes).Reload()


def tags(logged, group):
    return {
        tag.removeprefix(f"{group}/")
        for tag in logged.Tags()["scalars"]
        if tag.startswith(f"{group}/")
    }


def test_series_of_layers_equal_autograd(tmp_path):
    net = Net()
    fit(
        net, CurvatureCallback(PER_LAYER, layers=True), tmp_path=tmp_path, accumulate_grad_batches=2
    )
    logged = events(tmp_path)
    assert tags(logged, "curvature_layers") >= {
        f"{q}/{layer}" for q in PER_LAYER[:3] for layer in SLICES
    }
    for layer, columns in SLICES.items():
        for step in range(4):
            g = per_sample_gradients(net, step)[:, columns]
            truth = {"grad_norm": g.mean(0).norm(), "grad_variance": g.var(0).sum()}
            truth["norm_test"] = (truth["grad_variance"] / len(g)).sqrt() / truth["grad_norm"]
            for name, value in truth.items():
                found = [
                    e.value
                    for e in logged.Scalars(f"curvature_layers/{name}/{layer}")
                    if e.step == step
                ]
                assert found == [pytest.approx(value.item(), rel=1e-6)]
    whole = logged.Scalars("curvature/ggn_trace_exact")
    parts = [logged.Scalars(f"curvature_layers/ggn_trace_exact/{layer}") for layer in SLICES]
    assert [e.value for e in whole] == pytest.approx(
        [a.value + b.value for a, b in zip(*parts)], rel=1e-6
    )


@pytest.mark.parametrize(
    ("layers", "most", "names"),
    [
        (False, 20, []),
        (True, 20, ["0", "1", "2.0", "3"]),
        (True, 2, ["0", "1"]),
        ("topk", 2, ["1", "3"]),
        ("^[13]$", 20, ["1", "3"]),
        (r"\.", 20, ["2.0"]),
        ("none", 20, []),
    ],
)
def test_layers_are_chosen_by_order_size_or_name(layers, most, names):
    model = nn.Sequential(
        nn.Linear(2, 3), nn.Linear(3, 9), nn.Sequential(nn.Linear(9, 1)), nn.Linear(1, 50)
    )
    assert choose(model, layers, most) == names


def test_layers_beyond_the_cap_make_one_image_per_logged_step(tmp_path):
    fit(Net(), CurvatureCallback(layers=True, max_layers=1), tmp_path=tmp_path, log_every_n_steps=2)
    logged = events(tmp_path)
    assert {tag.partition("/")[2] for tag in tags(logged, "curvature_layers")} == {"net.0"}
    assert [event.step for event in logged.Images("curvature_layers/all")] == [1, 3, 5, 7]


def test_no_layers_by_default(tmp_path):
    fit(Net(), CurvatureCallback(), tmp_path=tmp_path)
    logged = events(tmp_path)
    assert not tags(logged, "curvature_layers")
    assert not logged.Tags()["images"]
    assert len(tags(logged, "curvature")) <= 10


def test_all_series_have_one_finite_point_per_logged_step(tmp_path):
    fit(Net(), CurvatureCallback("all", layers=True, every_n_steps=3), tmp_path=tmp_path)
    logged = events(tmp_path)
    for tag in logged.Tags()["scalars"]:
        if tag.startswith("curvature"):
            found = logged.Scalars(tag)
            assert all(math.isfinite(event.value) for event in found), tag
            assert (
                [e.step for e in found] == [2, 5]
                or "noise_scale" in tag
                or "suggested_batch_size" in tag
            ), tag


def test_heat_map_has_a_row_per_layer_and_a_column_per_quantity():
    image = heat_map(
        {"a": {"x": 1.0, "y": 2.0}, "b": {"x": 10.0}, "c": {"x": 100.0, "y": -1.0}}, pixels=1
    )
    assert image.shape == (3, 3, 8)
    assert (image >= 0).all()
    assert (image <= 1).all()
    assert image[0, :, 0].diff().gt(0).all()  # brighter
    assert (image[:, 1:, 4] == 0).all()  # no value, no logarithm
    assert heat_map({}) is None


def test_histogram_counts_every_sample():
    samples = np.sort(np.random.default_rng(0).random(1000))
    found = binned(samples)
    assert sum(found["bucket_counts"]) == found["num"] == 1000
    assert found["bucket_limits"][-1] == pytest.approx(samples.max().item())
    assert found["sum"] == pytest.approx(samples.sum().item())
    limit = found["bucket_limits"][9]
    assert sum(found["bucket_counts"][:10]) == (samples <= limit).sum()
    for equal in (np.ones(7), np.zeros(7)):
        assert sum(binned(equal)["bucket_counts"]) == 7
    assert binned(np.array([1.0, math.inf])) == binned(np.ones(0)) == {}


def test_histograms_can_be_left_out(tmp_path):
    fit(Net(), CurvatureCallback(histograms=False), tmp_path=tmp_path)
    assert not events(tmp_path).Tags()["histograms"]


@pytest.mark.parametrize("layout", [False, True])
def test_layout_shows_the_norms_as_a_band(tmp_path, layout):
    fit(Net(), CurvatureCallback(layout=layout), tmp_path=tmp_path)
    logged = events(tmp_path)
    assert ("custom_scalars__config__" in logged.Tags()["tensors"]) == layout
    if layout:
        [event] = logged.Tensors("custom_scalars__config__")
        [category] = Layout.FromString(event.tensor_proto.string_val[0]).category
        [band] = category.chart[0].margin.series
        names = [
            f"curvature/{name}$"
            for name in ("sample_norm_median", "sample_norm_p5", "sample_norm_p95")
        ]
        assert [band.value, band.lower, band.upper] == names
        assert set(NORMS) >= {name.removeprefix("curvature/").removesuffix("$") for name in names}


def test_one_event_holds_all_of_a_step(tmp_path):
    fit(Net(), CurvatureCallback(PER_LAYER, layers=True, max_layers=1), tmp_path=tmp_path)
    (file,) = tmp_path.rglob("events.out.*")
    written = [
        e
        for e in EventFileLoader(str(file)).Load()
        if any("curvature" in v.tag for v in e.summary.value)
    ]
    steps = [event.step for event in written]
    assert steps == sorted({*steps})
    logged = events(tmp_path)
    assert [e.step for e in logged.Images("curvature_layers/all")] == steps


def test_a_logger_of_the_users_own_leaves_the_same_file(tmp_path):
    class Own(TensorBoardLogger):
        def log_metrics(self, metrics, step=None):
            super().log_metrics(metrics, step)

    found = []
    for i, logger in enumerate([TensorBoardLogger, Own]):
        path = tmp_path / str(i)
        fit(
            Net(),
            CurvatureCallback(layers=True, max_layers=1),
            logger=logger(path, name="", version=""),
        )
        logged = events(path)
        values = {
            tag: [(e.step, e.value) for e in logged.Scalars(tag)]
            for tag in logged.Tags()["scalars"]
        }
        values |= {
            tag: [(e.step, e.histogram_value) for e in logged.Histograms(tag)] for tag in HISTOGRAMS
        }
        values |= {
            tag: [(e.step, e.encoded_image_string) for e in logged.Images(tag)] for tag in IMAGES
        }
        found.append(values)
    assert all(len(events) == 8 for tag, events in found[0].items() if tag in HISTOGRAMS + IMAGES)
    assert found[0] == found[1]


def test_the_prefix_of_a_logger_is_kept(tmp_path):
    fit(
        Net(),
        CurvatureCallback(),
        logger=TensorBoardLogger(tmp_path, name="", version="", prefix="mine"),
    )
    assert "mine-curvature/grad_norm" in events(tmp_path).Tags()["scalars"]


class Validated(Net):
    def validation_step(self, batch, batch_idx):
        pass

    def val_dataloader(self):
        return DataLoader(data(6), batch_size=6)


@pytest.mark.parametrize(
    ("hook", "held", "steps"),
    [
        ("on_train_batch_end", 2, [0, 1, 2]),
        ("on_save_checkpoint", 1000, [0, 1, 2]),
        ("on_validation_start", 1000, [0, 1, 2, 3]),
        ("on_train_end", 1000, [0, 1, 2, 3]),
    ],
)
def test_events_that_are_written_together_are_not_held_back_for_long(
    tmp_path, monkeypatch, hook, held, steps
):
    monkeypatch.setattr(publish, "HELD", held)
    monkeypatch.setattr(publish, "HELD_SECONDS", 1000.0)

    class Reads(Callback):
        steps = None

    def read(self, trainer, *_):
        trainer.logger.experiment.flush()
        self.steps = [event.step for event in events(tmp_path).Scalars("curvature/grad_norm")]

    setattr(Reads, hook, read)
    reads, saves = Reads(), ModelCheckpoint(tmp_path / "saved", every_n_train_steps=3)
    settings = {
        "tmp_path": tmp_path,
        "epochs": 1,
        "enable_checkpointing": True,
        "num_sanity_val_steps": 0,
    }
    fit(Validated(), CurvatureCallback(), reads, saves, **settings)
    assert reads.steps == steps
    assert [event.step for event in events(tmp_path).Scalars("curvature/grad_norm")] == [0, 1, 2, 3]


def test_events_survive_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "HELD", 1000)
    monkeypatch.setattr(publish, "HELD_SECONDS", 1000.0)

    class Fails(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 3:
                raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fit(Net(), CurvatureCallback(), Fails(), tmp_path=tmp_path)
    assert [event.step for event in events(tmp_path).Scalars("curvature/grad_norm")] == [0, 1, 2]


def test_other_loggers_get_the_scalars(tmp_path):
    trainer = fit(
        Net(), CurvatureCallback(layers=True, max_layers=1, layout=True), logger=CSVLogger(tmp_path)
    )
    assert "curvature-noise_scale" in {
        key.replace("/", "-") for key in trainer.logger.experiment.metrics_keys
    }


def test_weights_and_biases_gets_the_scalars(tmp_path, monkeypatch):
    needs("wandb")
    from pytorch_lightning.loggers import WandbLogger

    class Reads(WandbLogger):
        def log_metrics(self, metrics, step=None):
            super().log_metrics(metrics, step)
            seen.append((step, set(metrics)))

    seen = []
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = Reads(save_dir=tmp_path, offline=True)
    fit(Net(), CurvatureCallback(layers=True, layout=True), logger=logger, epochs=1)
    logger.experiment.finish()
    assert [step for step, _ in seen] == list(range(4))
    assert all(
        {"curvature/grad_norm", "curvature_layers/grad_norm/net.0"} <= names for _, names in seen
    )


def test_chosen_series_are_on_the_progress_bar():
    trainer = fit(Net(), CurvatureCallback(prog_bar=["grad_norm"]))
    assert trainer.progress_bar_metrics.keys() == {"curvature/grad_norm"}


def test_user_extensions_are_left_for_other_callbacks():
    from lightning_curv import Variance

    class Reads(Callback):
        seen = 0

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.seen += sum(hasattr(p, "variance") for p in pl_module.parameters())

    reads, net = Reads(), Net()
    fit(net, reads, CurvatureCallback("grad_norm", every_n_steps=2, extensions=[Variance()]))
    assert reads.seen == 4 * 4
    assert not any(hasattr(p, "variance") for p in net.parameters())
