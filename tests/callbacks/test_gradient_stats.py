"""The entries of gradients: mean, spread, largest magnitude and zeros, per step, per layer and per epoch."""

import math

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from monitoring import ManualNet, Net, Scaled, events, fit, series
from torch import nn

from lightning_curv import CurvatureCallback
from lightning_curv.callbacks.monitoring.entries import entry_rows, pooled_entries, stored

pytestmark = pytest.mark.filterwarnings("ignore:At step .* are too small:UserWarning")
STATS = ["gradient_stats", "sparsity"]


def truth(entries):
    """Of all entries in one vector, the naive way."""
    return {
        "grad_norm": entries.norm().item(),
        "grad_mean": entries.mean().item(),
        "grad_std": entries.std().item(),
        "grad_max": entries.abs().max().item(),
        "sparsity": (entries == 0).double().mean().item(),
    }


def real(p):
    """The gradient as real numbers in float64."""
    dense = p.grad.to_dense()
    dense = torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense
    return dense.double().flatten()


class Watch(pl.Callback):
    """What the gradients are like before the step: `all` of them, and those of each layer."""

    def __init__(self):
        self.seen, self.of_layers = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        held = {n: real(p) for n, p in pl_module.named_parameters() if p.grad is not None}
        layers = {}
        for name, entries in held.items():
            layers.setdefault(name.rpartition(".")[0] or "root", []).append(entries)
        self.seen.append(truth(torch.cat([*held.values()])))
        self.of_layers.append({name: truth(torch.cat(found)) for name, found in layers.items()})


def assert_stats(tmp_path, watch, rel=1e-5):
    for name in ("grad_norm", "grad_mean", "grad_std", "grad_max", "sparsity"):
        found = series(tmp_path, name)
        assert len(found) == len(watch.seen)
        for step, values in enumerate(watch.seen):
            expected = pytest.approx(values[name], rel=rel, abs=1e-9)
            assert found[step] == expected, (name, step)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_clip_val": 1e-3},
        {"accumulate_grad_batches": 2},
        {"precision": "16-true"},
        {"precision": "bf16-mixed"},
    ],
    ids=str,
)
def test_values_are_those_of_the_gradient_that_the_step_gets(tmp_path, settings):
    watch = Watch()
    fit(Net(), CurvatureCallback(STATS), watch, tmp_path=tmp_path, **settings)
    assert_stats(tmp_path, watch, rel=1e-3 if "precision" in settings else 1e-5)


def test_values_carry_no_factor_of_a_scaler(tmp_path):
    plain, scaled = tmp_path / "plain", tmp_path / "scaled"
    fit(Net(), CurvatureCallback(STATS), tmp_path=plain, precision="32-true")
    fit(Net(), CurvatureCallback(STATS), tmp_path=scaled, precision=None, plugins=[Scaled()])
    for name in ("grad_mean", "grad_std", "grad_max"):
        assert series(plain, name) == pytest.approx(series(scaled, name), rel=1e-4)


def test_the_last_window_of_an_epoch_may_be_shorter(tmp_path):
    """Three batches, two to a step: the second step has one, which Lightning divides by two all the same."""
    fit(Net(), CurvatureCallback(STATS), tmp_path=tmp_path / "a", size=18, epochs=1,
        accumulate_grad_batches=2)  # fmt: skip
    watch = Watch()
    fit(Net(), CurvatureCallback(["grad_norm"]), watch, size=18, epochs=1,
        accumulate_grad_batches=2)  # fmt: skip
    for name in ("grad_norm", "grad_mean", "grad_std", "grad_max"):
        assert series(tmp_path / "a", name)[1] == pytest.approx(2 * watch.seen[1][name], rel=1e-5)


def test_every_layer_has_series_of_its_own(tmp_path):
    watch = Watch()
    fit(Net(), CurvatureCallback(STATS, layers=True), watch, tmp_path=tmp_path)
    for layer, values in watch.of_layers[3].items():
        for name, value in values.items():
            assert of_layer(tmp_path, name, layer)[3] == pytest.approx(value, rel=1e-5, abs=1e-9)


def of_layer(tmp_path, name, layer):
    return {e.step: e.value for e in events(tmp_path).Scalars(f"curvature_layers/{name}/{layer}")}


def test_each_layer_has_a_noise_scale(tmp_path):
    fit(Net(), CurvatureCallback(["noise_scale"], layers=True), tmp_path=tmp_path, size=200,
        batch_size=50)  # fmt: skip
    assert of_layer(tmp_path, "noise_scale", "net.0")
    assert of_layer(tmp_path, "noise_scale", "net.3")


class Odd(pl.LightningModule):
    """Complex, empty, frozen, unused and dead parameters, and a sparse embedding."""

    def __init__(self, sparse=True):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(10, 3, sparse=sparse)
        self.phase = nn.Parameter(torch.randn(3, dtype=torch.complex128))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(2))
        self.dead = nn.Linear(3, 4)
        nn.init.constant_(self.dead.bias, -1e3)  # units that no sample reaches

    def training_step(self, batch, batch_idx):
        x = self.table(torch.tensor([1, 2, 1])) * self.frozen
        x = torch.cat([x, self.empty])
        turned = (x * self.phase).abs().square().mean()
        return turned + self.dead(x).relu().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("sparse", [True, False])
def test_sparse_complex_empty_frozen_and_unused_parameters(tmp_path, sparse):
    watch = Watch()
    fit(Odd(sparse), CurvatureCallback(STATS), watch, tmp_path=tmp_path, epochs=1)
    assert_stats(tmp_path, watch)
    assert 0.5 < watch.seen[0]["sparsity"] < 1


def test_manual_optimization(tmp_path):
    watch = Watch()
    fit(ManualNet(), CurvatureCallback(STATS), watch, tmp_path=tmp_path)
    assert_stats(tmp_path, watch)


def test_a_model_with_batch_norm_needs_no_samples_for_them(tmp_path):
    net, watch = Net(), Watch()
    net.net.insert(1, nn.BatchNorm1d(6))
    fit(net, CurvatureCallback(STATS), watch, tmp_path=tmp_path)
    assert_stats(tmp_path, watch)


def test_gradients_that_are_not_finite_leave_gaps(tmp_path):
    class Broken(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (math.nan if batch_idx == 1 else 1)

    fit(Broken(), CurvatureCallback(STATS), tmp_path=tmp_path, epochs=1)
    assert list(series(tmp_path, "grad_std")) == [0]  # and all parameters are NaN from then on


@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_spread_does_not_cancel(shift):
    generator = torch.Generator().manual_seed(0)
    tensors = [shift + torch.randn(n, generator=generator) for n in (5, 1, 4000, 0)]
    rows = entry_rows([stored(tensor) for tensor in tensors]).numpy()
    found = pooled_entries(rows, [5, 1, 4000, 0], [5, 1, 4000, 0])
    assert found.std == pytest.approx(torch.cat(tensors).double().std().item(), rel=1e-5)


def test_nothing_but_empty_gradients_has_no_numbers():
    found = pooled_entries(entry_rows([torch.zeros(0)]).numpy(), [0], [0])
    assert np.isnan([found.mean, found.std, found.largest, found.zeros]).all()


def test_means_of_an_epoch_are_those_of_its_logged_steps(tmp_path):
    callback = CurvatureCallback(["gradient_stats", "noise_scale"], layers=True, on_epoch=True)
    trainer = fit(Net(), callback, tmp_path=tmp_path)
    for name in ("grad_norm", "grad_mean", "grad_std", "grad_max"):
        steps, means = series(tmp_path, name), series(tmp_path, f"{name}_epoch")
        assert list(means) == [3, 7]  # the last step of each epoch
        first, second = ([steps[t] for t in chosen] for chosen in (range(4), range(4, 8)))
        assert [*means.values()] == pytest.approx([np.mean(first), np.mean(second)], rel=1e-5)
    layer = of_layer(tmp_path, "grad_norm", "net.0")
    assert of_layer(tmp_path, "grad_norm_epoch", "net.0")[3] == pytest.approx(
        np.mean([layer[t] for t in range(4)]), rel=1e-5
    )
    last = trainer.callback_metrics["curvature/grad_norm_epoch"]
    assert last == pytest.approx(series(tmp_path, "grad_norm_epoch")[7], rel=1e-5)


def test_means_of_an_epoch_can_be_watched():
    stop = pl.callbacks.EarlyStopping("curvature/grad_norm_epoch", patience=0, min_delta=1e9,
        check_on_train_epoch_end=True)  # fmt: skip
    trainer = fit(Net(), CurvatureCallback(["grad_norm"], on_epoch=True), stop, epochs=9)
    assert trainer.current_epoch == 2


def test_means_of_an_epoch_survive_a_checkpoint():
    callback = CurvatureCallback(["grad_norm"], on_epoch=True)
    callback._epoch.add({"grad_norm": 1.0})
    other = CurvatureCallback(["grad_norm"], on_epoch=True)
    other.load_state_dict(callback.state_dict())
    other._epoch.add({"grad_norm": 2.0})
    assert other._epoch.take() == {"grad_norm_epoch": 1.5}


def test_without_on_epoch_nothing_else_is_logged(tmp_path):
    trainer = fit(Net(), CurvatureCallback(["grad_norm"]), tmp_path=tmp_path)
    assert not [name for name in trainer.callback_metrics if name.endswith("_epoch")]
