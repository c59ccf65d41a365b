"""The noise scale of normalization layers alone, against brute force, sample by sample."""

import warnings

import norm_layer_runs
import pytest
import torch
from monitoring import Net, data, events, fit, series
from processes import spawn
from torch import nn

from lightning_curv import BatchL2Grad, CurvatureCallback
from lightning_curv.callbacks.monitoring.norm_layers import NormLayerL2, norm_parameters
from lightning_curv.passes.gradient_hooks import Listener

pytestmark = pytest.mark.filterwarnings("ignore:At step .* are too small:UserWarning")
NAME = "noise_scale_norm_layers"


class LlamaRMSNorm(nn.Module):
    """Written by hand, as in many language models."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.weight


LAYERS = {
    "LayerNorm": lambda: nn.LayerNorm(6),
    "RMSNorm": lambda: nn.RMSNorm(6),
    "by hand": lambda: LlamaRMSNorm(6),
    "GroupNorm": lambda: nn.GroupNorm(2, 6),
    "BatchNorm in evaluation mode": lambda: Evaluated(6).eval(),
}


class Evaluated(nn.BatchNorm1d):
    def train(self, mode=True):
        return super().train(False)


# the class of a layer says what it is
Evaluated.__name__ = "BatchNorm1d"


class Normed(Net):
    def __init__(self, layer="LayerNorm", **kwargs):
        super().__init__(**kwargs)
        self.net.insert(1, LAYERS[layer]() if isinstance(layer, str) else layer)
        self.net.append(nn.LayerNorm(3))


def moments(net, step):
    """tr Σ and |G|² of the normalization layers' parameters, the naive way."""
    seen = [s for s in net.seen if s[0] == step]
    names, rows = list(norm_parameters(net)), []
    for _, params, (x, y) in seen:
        for n in range(len(x)):
            leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
            output = torch.func.functional_call(net, leaves, (x[n : n + 1],))
            found = torch.autograd.grad(
                net.loss(output, y[n : n + 1]), [leaves[name] for name in names]
            )
            rows.append(torch.cat([g.flatten() for g in found]))
    g = torch.stack(rows)
    variance = g.var(0).sum()
    return variance, g.mean(0).square().sum() - variance / len(g)


def expected(net, steps, ema=0.9):
    variance, signal, found = 0.0, 0.0, {}
    for step in range(steps):
        new = moments(net, step)
        variance, signal = ema * variance + (1 - ema) * new[0], ema * signal + (1 - ema) * new[1]
        if signal > 0:
            found[step] = (variance / signal).item()
    return found


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("layer", LAYERS)
def test_it_is_that_of_brute_force(tmp_path, layer, accumulate):
    net = Normed(layer)
    fit(net, CurvatureCallback([NAME]), tmp_path=tmp_path, size=96, batch_size=12,
        accumulate_grad_batches=accumulate)  # fmt: skip
    truth = expected(net, 16 // accumulate)
    assert len(truth) > 3
    assert series(tmp_path, NAME) == pytest.approx(truth, rel=1e-4)


def test_it_is_the_same_beside_the_noise_scale_of_all_layers(tmp_path):
    alone, beside = tmp_path / "alone", tmp_path / "beside"
    fit(Normed(), CurvatureCallback([NAME]), tmp_path=alone)
    fit(Normed(), CurvatureCallback(["default", NAME]), tmp_path=beside)
    assert series(alone, NAME) == pytest.approx(series(beside, NAME), rel=1e-6)
    assert "curvature/noise_scale" in events(beside).Tags()["scalars"]
    assert "curvature/noise_scale" not in events(alone).Tags()["scalars"]


def test_some_of_the_samples(tmp_path):
    fit(Normed(), CurvatureCallback([NAME], max_samples=12), tmp_path=tmp_path / "all",
        size=96, batch_size=12)  # fmt: skip
    fit(Normed(), CurvatureCallback([NAME]), tmp_path=tmp_path / "plain", size=96, batch_size=12)
    fit(Normed(), CurvatureCallback([NAME], max_samples=8), tmp_path=tmp_path / "some",
        size=96, batch_size=12)  # fmt: skip
    assert series(tmp_path / "all", NAME) == pytest.approx(
        series(tmp_path / "plain", NAME), rel=1e-5
    )
    assert series(tmp_path / "some", NAME)


def test_ops_of_other_parameters_are_not_listened_to(monkeypatch):
    counts, add = [], Listener._add
    monkeypatch.setattr(
        Listener,
        "_add",
        lambda self, node, use, g: (counts.append(use.name), add(self, node, use, g)),
    )
    callback = CurvatureCallback([NAME])
    callback._checked = True
    callback.on_fit_start = lambda *args: (
        CurvatureCallback.on_fit_start(callback, *args),
        setattr(callback, "_checked", True),  # the check of the first step needs all of them
    )
    fit(Normed(), callback, epochs=1)
    assert set(counts) == {"layer_norm"}


def test_batch_norm_in_training_mode_is_left_out_with_one_sentence(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        net = Normed(nn.BatchNorm1d(6))
        fit(net, CurvatureCallback([NAME, "grad_norm"], strict=False), tmp_path=tmp_path)
    told = [str(w.message) for w in caught if "leaves out" in str(w.message)]
    assert len(told) == 1
    assert f"leaves out {NAME}" in told[0]
    assert "batch_norm" in told[0]
    assert not series(tmp_path, NAME)
    assert len(series(tmp_path, "grad_norm")) == 8


def test_with_batch_norm_it_comes_from_micro_batches(tmp_path):
    fit(Normed(nn.BatchNorm1d(6)), CurvatureCallback([NAME]), tmp_path=tmp_path, size=192,
        batch_size=12, accumulate_grad_batches=4)  # fmt: skip
    assert series(tmp_path, NAME)


def test_a_model_without_them_says_so(tmp_path):
    with pytest.warns(UserWarning, match=r"needs normalization layers .*, found none"):
        fit(Net(), CurvatureCallback([NAME, "grad_norm"], strict=False), tmp_path=tmp_path)
    assert len(series(tmp_path, "grad_norm")) == 8
    with pytest.raises(RuntimeError, match=r"needs normalization layers .*, found none"):
        fit(Net(), CurvatureCallback([NAME]))
    fit(Net(), CurvatureCallback("all", every_n_steps=3))


def test_a_preview_knows_it():
    batch = tuple(t[:6].float() for t in data().tensors)
    batch = (batch[0], data().tensors[1][:6])

    class Previewed(Normed):
        def training_step(self, batch, batch_idx):
            return self.loss(self(batch[0]), batch[1])

    class Plain(Net):
        training_step = Previewed.training_step

    table = CurvatureCallback.preview(Previewed(), batch, quantities=[NAME])
    assert [row.path for row in table.rows] == ["exact"]
    table = CurvatureCallback.preview(Plain(), batch, quantities=[NAME])
    assert "found none" in table.rows[0].reason


def test_which_layers_are_meant():
    class PreNormBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))
            self.norm = nn.LayerNorm(2)

    net = nn.ModuleDict(
        {
            "block": PreNormBlock(),
            "weight": nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
            "plain": nn.LayerNorm(2, elementwise_affine=False),
            "image": nn.InstanceNorm2d(3, affine=True),
            "frozen": nn.GroupNorm(1, 2).requires_grad_(False),
        }
    )
    assert set(norm_parameters(net)) == {
        "block.norm.weight",
        "block.norm.bias",
        "image.weight",
        "image.bias",
    }


def test_it_is_its_own_field():
    assert NormLayerL2([]).savefield != BatchL2Grad.savefield


def test_two_processes_log_what_one_logs_on_the_union_batch(tmp_path):
    """Histograms and means of the epoch, too."""
    spawn(norm_layer_runs.work, str(tmp_path))
    expected = norm_layer_runs.run(tmp_path, world=1)
    assert f"curvature/{NAME}_epoch" in expected
    for rank in range(2):
        assert torch.load(tmp_path / f"values-{rank}") == pytest.approx(expected, rel=1e-6)
    one, two = (events(tmp_path / world).Histograms("curvature/grad_hist_1d") for world in "12")
    assert [e.histogram_value.bucket for e in one] == [e.histogram_value.bucket for e in two]
    one, two = (events(tmp_path / world).Images("curvature/grad_hist_2d") for world in "12")
    assert [e.encoded_image_string for e in one] == [e.encoded_image_string for e in two]
