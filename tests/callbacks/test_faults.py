"""What goes wrong in a step stays in it: exceptions, memory, inf and NaN, empty and changing batches."""

import gc
import weakref

import pytest
import torch
from monitoring import (
    Net,
    assert_logged_values_are_true,
    assert_nothing_left_behind,
    assert_same_parameters,
    data,
    events,
    fit,
    kfac,
    per_sample_gradients,
    series,
    sgd,
)
from torch import nn

from lightning_curv import CurvatureCallback, DiagGGNOptimizer, KFACOptimizer
from lightning_curv.extensions import GGNTraceMC, JacobianMC, SumGradSquared
from lightning_curv.extensions.spectrum import HessianTraceMC

pytestmark = pytest.mark.filterwarnings(
    "ignore:At step .* are too small:UserWarning"
)  # they are, for speed
QUANTITIES = ["default", "mean_gsnr", "hessian_trace"]
FAILING = {
    "mean_gsnr": (SumGradSquared, "evaluate"),
    "ggn_trace": (GGNTraceMC, "evaluate"),
    "hessian_trace": (HessianTraceMC, "compute"),
}


def run_out_of_memory(monkeypatch, owner, method, held):
    """From its sixth call on, that is in the second step or later, after allocating a tensor that is watched."""
    original, calls = getattr(owner, method), []

    def fail(self, argument):
        calls.append(None)
        if len(calls) < 6:
            return original(self, argument)
        tensor = torch.ones(1000)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("out of memory on purpose")

    monkeypatch.setattr(owner, method, fail)


@pytest.mark.parametrize("name", FAILING)
def test_out_of_memory_in_a_quantity_turns_off_that_quantity_alone(monkeypatch, tmp_path, name):
    plain, watched, held = Net(optimizer=kfac), Net(optimizer=kfac), []
    fit(plain, CurvatureCallback(QUANTITIES), tmp_path=tmp_path / "plain")
    run_out_of_memory(monkeypatch, *FAILING[name], held)
    gc.disable()
    try:
        with pytest.warns(
            UserWarning, match=f"CurvatureCallback stops logging {name}: out of memory"
        ) as caught:
            fit(watched, CurvatureCallback(QUANTITIES, strict=False), tmp_path=tmp_path / "watched")
        assert [reference() for reference in held] == [None]
    finally:
        gc.enable()
    assert sum("stops logging" in str(warning.message) for warning in caught) == 1
    for other in ("grad_norm", "grad_variance", "sample_norm_max", *FAILING):
        logged, expected = series(tmp_path / "watched", other), series(tmp_path / "plain", other)
        assert logged.items() <= expected.items()
        assert len(logged) == 8 if other != name else 0 < len(logged) < 8
    assert_same_parameters(plain, watched)
    assert_nothing_left_behind(watched)


@pytest.mark.parametrize("name", FAILING)
def test_out_of_memory_stops_a_strict_run_with_the_name_of_the_quantity(monkeypatch, name):
    net = Net()
    run_out_of_memory(monkeypatch, *FAILING[name], [])
    with pytest.raises(
        torch.OutOfMemoryError, match=f"out of memory on purpose .*needs this for {name}"
    ):
        fit(net, CurvatureCallback([*QUANTITIES, name]))
    assert_nothing_left_behind(net)


def test_what_an_optimizer_needs_is_never_turned_off(monkeypatch):
    def fail(self, jacobian):
        raise torch.OutOfMemoryError("out of memory on purpose")

    monkeypatch.setattr(JacobianMC, "evaluate", fail)
    net = Net(optimizer=kfac)
    with pytest.raises(torch.OutOfMemoryError, match=r"^out of memory on purpose$"):
        fit(net, CurvatureCallback(strict=False))
    assert_nothing_left_behind(net)


def loader(*sizes):
    """Batches of these sizes."""
    x, y = data(sum(sizes)).tensors
    return list(zip(x.split(sizes), y.split(sizes)))


def finite(net):
    return all(bool(p.isfinite().all()) for p in net.parameters())


@pytest.mark.parametrize("optimizer", [sgd, kfac])
def test_changing_batch_sizes_one_sample_and_none(tmp_path, optimizer):
    nets = [Net(optimizer=optimizer, loss=cross_entropy_of_any_number) for _ in range(2)]
    batches = loader(6, 1, 3, 0, 7)
    fit(nets[0], CurvatureCallback(every_n_steps=0), loader=batches, epochs=1)
    fit(nets[1], CurvatureCallback(), loader=batches, epochs=1, tmp_path=tmp_path)
    assert_same_parameters(*nets)
    assert finite(nets[1])
    assert_logged_values_are_true(nets[1], tmp_path, [0])
    for step in (0, 2, 4):
        variance = per_sample_gradients(nets[1], step).var(0).sum().item()
        assert series(tmp_path, "grad_variance")[step] == pytest.approx(variance, rel=1e-5)
    assert series(tmp_path, "sample_norm_max").keys() == {0, 1, 2, 4}
    logged = events(tmp_path)
    assert all(
        torch.tensor(event.value).isfinite()
        for tag in logged.Tags()["scalars"]
        for event in logged.Scalars(tag)
        if tag.startswith("curvature")
    )


def cross_entropy_of_any_number(output, y):
    return nn.functional.cross_entropy(output, y, reduction="sum") / max(len(y), 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_batch_with_nan_or_inf_is_skipped_and_poisons_nothing(tmp_path, value):
    batches = loader(6, 6, 6, 6)
    batches[1][0][2, 1] = value
    without = [batches[0], *batches[2:]]
    nets = [Net(optimizer=kfac), Net(optimizer=kfac), Net(optimizer=kfac)]
    fit(nets[0], CurvatureCallback(every_n_steps=0), loader=batches, epochs=1)
    with pytest.warns(
        RuntimeWarning,
        match=r"inf or NaN in the gradients of .*net\.0\.weight.*; this step is skipped",
    ):
        fit(nets[1], CurvatureCallback(), loader=batches, epochs=1, tmp_path=tmp_path)
    assert_same_parameters(*nets[:2])
    assert finite(nets[1])
    fit(nets[2], CurvatureCallback(), loader=without, epochs=1, tmp_path=tmp_path / "without")
    assert series(tmp_path, "grad_norm").keys() == {0, 2, 3}
    last, other = (
        list(series(folder, "noise_scale").items())[-1:]
        for folder in (tmp_path, tmp_path / "without")
    )
    assert bool(last) == bool(other)


class Tampered(Net):
    """Its first layer's gradient or the inputs of its second layer are changed in the second step."""

    def __init__(self, what, **settings):
        super().__init__(**settings)
        self.what = what
        self.net[1].register_forward_hook(self.change)

    def change(self, module, args, output):
        second = self.trainer.fit_loop.epoch_loop._batches_that_stepped == 1
        return output * 1e200 if second and self.what == "huge" else output

    def on_after_backward(self):
        if self.what == "gradient" and self.trainer.fit_loop.epoch_loop._batches_that_stepped == 1:
            self.net[0].weight.grad[0, 0] = float("nan")


def test_a_gradient_with_nan_is_skipped_and_its_layer_named():
    net = Tampered("gradient", optimizer=kfac)
    with pytest.warns(
        RuntimeWarning,
        match=r"inf or NaN in the gradients of `net\.0\.weight`; this step is skipped",
    ):
        fit(net, CurvatureCallback(), epochs=1)
    assert finite(net)
    assert net.trainer.optimizers[0].steps == 3


@pytest.mark.parametrize(
    "build", [kfac, lambda p: KFACOptimizer(p, lr=0.1, damping=0.1, eigen=True), DiagGGNOptimizer]
)
def test_an_infinite_factor_keeps_the_last_good_one_and_names_the_layer(build):
    """Activations of 1e200 have a second moment of infinity, the cotangents of the last layer are finite."""
    net = Tampered("huge", optimizer=build)
    with pytest.warns(
        RuntimeWarning,
        match=r"inf or NaN in the (curvature|gradients|preconditioned gradients) of .*net\.3",
    ):
        fit(net, CurvatureCallback(mc_samples=0), epochs=1)
    assert finite(net)
    for state in net.trainer.optimizers[0].state.values():
        for value in state.values():
            for tensor in value if isinstance(value, list) else [value]:
                assert not isinstance(tensor, torch.Tensor) or tensor.isfinite().all()


@pytest.mark.parametrize(
    "build", [kfac, lambda p: KFACOptimizer(p, lr=0.1, damping=0.1, eigen=True), KFACOptimizer]
)
def test_singular_factors_and_a_layer_without_gradient(build):
    """Inputs that are constant, a unit that is never active, and a last layer that starts at zero."""
    net = Net(optimizer=build)
    with torch.no_grad():
        net.net[3].weight.zero_()
        net.net[0].weight[2] = 0
    x, y = torch.ones(12, 4, dtype=torch.float64), torch.zeros(12, dtype=torch.long)
    x[:, 1] = 0
    fit(net, CurvatureCallback(), loader=[(x[i : i + 3], y[i : i + 3]) for i in range(0, 12, 3)])
    assert finite(net)
    assert net.trainer.optimizers[0].steps == 8
