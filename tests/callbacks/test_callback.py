"""`CurvatureCallback`: logged values against autograd, and what is logged when."""

import math

import pytest
import pytorch_lightning as pl
import torch
from monitoring import (
    TAGS,
    WITH_TRACE,
    ManualNet,
    Net,
    Scaled,
    assert_logged_values_are_true,
    assert_nothing_left_behind,
    cross_entropy_mean,
    cross_entropy_sum,
    events,
    exact_ggn_trace,
    fit,
    per_sample_gradients,
    series,
    sgd,
)
from refused_ops import Once
from torch.nn import functional as F

from lightning_curv import CurvatureCallback, record
from lightning_curv.engine.backprop import Backprop

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:At step .* are too small:UserWarning"
    ),  # they are, for speed
    pytest.mark.filterwarnings(
        "ignore:(?s).*(deprecated in v4|LightningCLI's args)"
    ),  # Lightning and jsonargparse
]


@pytest.mark.parametrize("loss", [cross_entropy_mean, cross_entropy_sum])
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_logged_values_equal_autograd(tmp_path, accumulate, loss):
    net = Net(loss=loss)
    fit(net, CurvatureCallback(mc_samples=0), tmp_path=tmp_path, accumulate_grad_batches=accumulate)
    assert_logged_values_are_true(net, tmp_path, range(8 // accumulate))
    assert_nothing_left_behind(net)


def test_last_window_of_an_epoch_may_be_shorter(tmp_path):
    net = Net()
    fit(net, CurvatureCallback(), tmp_path=tmp_path, accumulate_grad_batches=3, epochs=1)
    assert len(net.seen) == 4
    assert_logged_values_are_true(net, tmp_path, range(2))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_logged_values_equal_autograd_in_manual_optimization(tmp_path, set_to_none):
    net = ManualNet()
    net.set_to_none = set_to_none
    fit(net, CurvatureCallback(), tmp_path=tmp_path)
    assert_logged_values_are_true(net, tmp_path, range(8))


def test_logged_values_equal_autograd_under_a_gradient_scaler(tmp_path):
    net = Net()
    fit(net, CurvatureCallback(), tmp_path=tmp_path, precision=None, plugins=[Scaled()])
    assert_logged_values_are_true(net, tmp_path, range(8))


def test_ggn_trace_converges_to_the_exact_trace(tmp_path):
    net = Net()
    fit(
        net,
        CurvatureCallback(["ggn_trace"], mc_samples=1000),
        tmp_path=tmp_path,
        accumulate_grad_batches=2,
        epochs=1,
    )
    for step, value in series(tmp_path, "ggn_trace").items():
        assert value == pytest.approx(exact_ggn_trace(net, step), rel=0.05)


def test_tags_steps_and_histogram(tmp_path):
    fit(Net(), CurvatureCallback(WITH_TRACE), tmp_path=tmp_path, epochs=8, log_every_n_steps=4)
    logged = events(tmp_path)
    assert {tag for tag in logged.Tags()["scalars"] if tag.startswith("curvature")} == TAGS
    assert [event.step for event in logged.Scalars("curvature/grad_norm")] == list(range(3, 32, 4))
    histograms = logged.Histograms("curvature/sample_norms")
    assert [event.step for event in histograms] == list(range(3, 32, 4))
    assert [event.histogram_value.num for event in histograms] == [6] * 8
    for tag in TAGS:
        assert all(math.isfinite(event.value) for event in logged.Scalars(tag))


@pytest.mark.parametrize(("every_n_steps", "steps"), [(3, [2, 5]), (0, []), (None, [1, 3, 5, 7])])
def test_schedule(tmp_path, every_n_steps, steps):
    fit(
        Net(),
        CurvatureCallback(every_n_steps=every_n_steps),
        tmp_path=tmp_path,
        log_every_n_steps=2,
    )
    assert list(series(tmp_path, "grad_norm")) == steps


@pytest.mark.parametrize(
    ("quantities", "every_n_steps", "steps"),
    [
        ("default", 1, [*range(20), 29, 39]),
        ("default", 4, [3, 7, 11, 15, 19, 23, 35]),
        ("default", 12, [11, 23, 35]),
        (WITH_TRACE, 4, list(range(3, 40, 4))),
    ],
)
def test_the_default_trace_is_rarer_after_the_start(tmp_path, quantities, every_n_steps, steps):
    fit(Net(), CurvatureCallback(quantities, every_n_steps), tmp_path=tmp_path, epochs=10)
    assert list(series(tmp_path, "ggn_trace")) == steps
    assert list(series(tmp_path, "grad_norm")) == list(range(every_n_steps - 1, 40, every_n_steps))


def test_a_step_that_needs_nothing_costs_nothing(monkeypatch):
    entered, hooked, steps = [], [], []
    enter, before = record.__enter__, Backprop.before
    monkeypatch.setattr(
        record, "__enter__", lambda self: (entered.append(len(steps)), enter(self))[1]
    )
    monkeypatch.setattr(
        Backprop, "before", lambda self: (hooked.append(len(steps)), before(self))[1]
    )

    class Watch(pl.Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            monitored = len(steps) % 4 == 3 or not steps
            assert ("training_step" in vars(pl_module)) == monitored
            if not monitored:
                assert not any(recorded(node) for node in nodes_below(loss.grad_fn))
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in pl_module.modules())
            assert not any(
                p._backward_hooks or p._post_accumulate_grad_hooks for p in pl_module.parameters()
            )

        def on_train_batch_end(self, *args):
            assert torch.overrides._get_current_function_mode() is None
            steps.append(None)

    fit(Net(), CurvatureCallback(every_n_steps=4), Watch())
    assert entered == [0, 3, 7]  # a look at the first graph, that computes nothing
    assert hooked == [3, 7]


def nodes_below(root):
    stack, seen = [root], set()
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [after for after, _ in node.next_functions]
    return seen


def recorded(node):
    return any(str(key).startswith("lightning_curv") for key in node.metadata)


def test_batches_too_small_for_the_noise_scale_are_announced_once(tmp_path):
    def noise(output, y):  # its gradient has mean zero
        return F.mse_loss(output, torch.randn_like(output)) - output.square().mean()

    with pytest.warns(
        UserWarning, match=r"At step \d+ the batches of 6 samples are too small"
    ) as caught:
        fit(Net(loss=noise), CurvatureCallback(mc_samples=0, ema=0.0), tmp_path=tmp_path, epochs=8)
    assert sum("too small" in str(warning.message) for warning in caught) == 1
    signal, scale = series(tmp_path, "grad_signal"), series(tmp_path, "noise_scale")
    assert set(scale) == {step for step, value in signal.items() if value > 0}
    assert 0 < len(scale) < len(signal) == 32


def test_two_callbacks_side_by_side(tmp_path):
    net = Net()
    fit(
        net,
        CurvatureCallback(every_n_steps=2),
        CurvatureCallback(every_n_steps=3),
        tmp_path=tmp_path,
    )
    logged = events(tmp_path).Scalars("curvature/grad_variance")
    assert sorted(event.step for event in logged) == [1, 2, 3, 5, 5, 7]
    for event in logged:
        assert event.value == pytest.approx(
            per_sample_gradients(net, event.step).var(0).sum().item(), rel=1e-5
        )
    assert_nothing_left_behind(net)


class TwoOptimizers(ManualNet):
    def configure_optimizers(self):
        return sgd(self.net[0].parameters()), sgd(self.net[3].parameters())

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        self.manual_backward(Net.training_step(self, batch, batch_idx))
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()


def test_each_optimizer_has_its_own_series(tmp_path):
    net = TwoOptimizers()
    fit(net, CurvatureCallback(), tmp_path=tmp_path)
    gradients = [per_sample_gradients(net, step) for step in range(8)]
    for index, columns in enumerate((slice(0, 30), slice(30, None))):
        logged = series(tmp_path, f"grad_variance/optimizer_{index}")
        assert list(logged.values()) == pytest.approx(
            [g[:, columns].var(0).sum().item() for g in gradients], rel=1e-5
        )


def test_gradients_accumulated_over_unlogged_batches_are_left_out(tmp_path):
    class Accumulates(ManualNet):
        def training_step(self, batch, batch_idx):
            self.manual_backward(Net.training_step(self, batch, batch_idx))
            if batch_idx % 2:
                self.optimizers().step()
                self.optimizers().zero_grad()

    with pytest.warns(UserWarning, match="Log every step, `every_n_steps=1`"):
        fit(Accumulates(), CurvatureCallback(every_n_steps=2), tmp_path=tmp_path)
    assert not any(tag.startswith("curvature") for tag in events(tmp_path).Tags()["scalars"])


def by_hand(output, y):
    return -output.log_softmax(1)[torch.arange(len(y)), y].mean()


def test_a_loss_that_torch_has_no_function_for_has_everything(tmp_path):
    net = Net(loss=by_hand)
    fit(net, CurvatureCallback(WITH_TRACE, mc_samples=1000), tmp_path=tmp_path)
    assert_logged_values_are_true(net, tmp_path, range(8))
    traces = series(tmp_path, "ggn_trace")
    assert len(traces) == 8
    for step, value in traces.items():
        assert value == pytest.approx(exact_ggn_trace(net, step), rel=0.1)


def test_a_loss_without_second_derivative_has_everything_but_the_trace(tmp_path):
    def once(output, y):
        return by_hand(output, y) + Once.apply(output) / len(output)

    with pytest.raises(
        RuntimeError, match=r"second derivative.*ggn_trace.*`mc_samples=0` leaves out the GGN trace"
    ):
        fit(Net(loss=once), CurvatureCallback(WITH_TRACE))
    net = Net(loss=once)
    fit(net, CurvatureCallback(mc_samples=0), tmp_path=tmp_path)
    assert_logged_values_are_true(net, tmp_path, range(8))


def test_one_sample_has_norms_but_no_variance(tmp_path):
    fit(Net(), CurvatureCallback(WITH_TRACE), tmp_path=tmp_path, batch_size=1, size=3, epochs=1)
    tags = set(events(tmp_path).Tags()["scalars"])
    unknown = ("grad_variance", "grad_signal", "noise_scale", "suggested_batch_size")
    assert tags & TAGS == TAGS - {f"curvature/{name}" for name in unknown}
