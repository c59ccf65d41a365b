"""`CurvatureCallback`: logged values against autograd, an untouched training run, and nothing left behind."""

import copy
import math
import pickle

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.plugins import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_curv import BatchGrad, CurvatureCallback, KFACOptimizer

CONSTANT = {"enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}
NORMS = {"sample_norm_p5": 0.05, "sample_norm_median": 0.5, "sample_norm_p95": 0.95, "sample_norm_max": 1.0}
TAGS = {f"curvature/{name}" for name in (*NORMS, "grad_norm", "grad_variance", "noise_scale", "ggn_trace")}


def sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def adam(params):
    return torch.optim.Adam(params, lr=0.01)


def kfac(params):
    return KFACOptimizer(params, lr=0.1, damping=0.1)


def cross_entropy_mean(output, y):
    return F.cross_entropy(output, y)


def cross_entropy_sum(output, y):
    return 0.5 * F.cross_entropy(output, y, reduction="sum")


class Net(pl.LightningModule):
    """A classifier with dropout that remembers the parameters and the batch of every training step."""

    def __init__(self, optimizer=sgd, loss=cross_entropy_mean, dropout=0.0):
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 3))
        self.optimizer, self.loss, self.seen = optimizer, loss, []

    def training_step(self, batch, batch_idx):
        step = self.trainer.fit_loop.epoch_loop._batches_that_stepped
        self.seen.append((step, {name: p.detach().clone() for name, p in self.named_parameters()}, batch))
        return self.loss(self(batch[0]), batch[1])

    def forward(self, x):
        return self.net(x)

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


class ManualNet(Net):
    """Two backward passes per step, one for each half of the batch."""

    set_to_none = True

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad(set_to_none=self.set_to_none)
        for half in zip(*(t.chunk(2) for t in batch)):
            self.manual_backward(super().training_step(half, batch_idx) / 2)
        optimizer.step()


def data(size=24, dtype=torch.float64):
    x = torch.randn(size, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 1).long())


def fit(net, *callbacks, batch_size=6, epochs=2, tmp_path=None, size=24, **kwargs):
    settings = {"accelerator": "cpu", "precision": "64-true", "log_every_n_steps": 1, "logger": False, **CONSTANT}
    if tmp_path is not None:
        settings["logger"] = TensorBoardLogger(tmp_path, name="", version="")
    trainer = pl.Trainer(callbacks=list(callbacks), max_epochs=epochs, **(settings | kwargs))
    torch.manual_seed(2)
    dtype = torch.float64 if trainer.precision == "64-true" else torch.float32
    trainer.fit(net, DataLoader(data(size, dtype), batch_size=batch_size))
    return trainer


def events(tmp_path):
    accumulator = EventAccumulator(str(tmp_path), size_guidance=dict.fromkeys(("scalars", "histograms"), 0))
    return accumulator.Reload()


def series(tmp_path, name):
    logged, tag = events(tmp_path), f"curvature/{name}"
    return {event.step: event.value for event in logged.Scalars(tag)} if tag in logged.Tags()["scalars"] else {}


def per_sample_gradients(net, step):
    """[N, P]: gradients of the samples of a step, scaled such that their mean is the gradient, the naive way."""
    rows = []
    for _, params, (x, y) in [seen for seen in net.seen if seen[0] == step]:
        for n in range(len(x)):
            leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
            output = torch.func.functional_call(net, leaves, (x[n : n + 1],))
            scale = len(x) if net.loss is cross_entropy_sum else 1
            gradient = torch.autograd.grad(scale * net.loss(output, y[n : n + 1]), list(leaves.values()))
            rows.append(torch.cat([g.flatten() for g in gradient]))
    return torch.stack(rows)


def expected(gradients):
    mean, norms, n = gradients.mean(0), gradients.norm(dim=1), len(gradients)
    trace = gradients.var(0).sum()
    values = {"grad_norm": mean.norm(), "grad_variance": trace}
    values |= {name: norms.quantile(q) for name, q in NORMS.items()}
    return {name: value.item() for name, value in values.items()}, (trace.item(), (mean @ mean - trace / n).item())


def exact_ggn_trace(net, step):
    traces = []
    for _, params, (x, y) in [seen for seen in net.seen if seen[0] == step]:
        jacobians = torch.func.jacrev(lambda p, x=x: torch.func.functional_call(net, p, (x,)))(params)
        probabilities = torch.func.functional_call(net, params, (x,)).softmax(1)
        hessians = torch.diag_embed(probabilities) - probabilities[:, :, None] * probabilities[:, None]
        for jacobian in jacobians.values():
            flat = jacobian.flatten(2)
            traces.append(torch.einsum("ncp,ncd,ndp->", flat, hessians, flat) / len(x))
    return sum(traces).item() / sum(seen[0] == step for seen in net.seen)


def assert_logged_values_are_true(net, tmp_path, steps):
    ratio = [0.0, 0.0]
    for step in steps:
        values, moments = expected(per_sample_gradients(net, step))
        for name, value in values.items():
            assert series(tmp_path, name)[step] == pytest.approx(value, rel=1e-5), (name, step)
        ratio = [0.9 * old + 0.1 * new for old, new in zip(ratio, moments)]
        logged = series(tmp_path, "noise_scale").get(step)
        assert logged == (pytest.approx(ratio[0] / ratio[1], rel=1e-4) if ratio[1] > 0 else None)


def assert_same_parameters(one, other):
    for p, q in zip(one.parameters(), other.parameters()):
        assert torch.equal(p, q)


def assert_nothing_left_behind(net):
    assert "training_step" not in vars(net)
    assert all(set(vars(p)) <= {"grad"} for p in net.parameters())
    assert torch.overrides._get_current_function_mode() is None


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
    class Float32(MixedPrecision):
        def forward_context(self):
            return torch.autocast("cpu", enabled=False)

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    net = Net()
    fit(net, CurvatureCallback(), tmp_path=tmp_path, precision=None, plugins=[Float32("16-mixed", "cpu", scaler)])
    assert_logged_values_are_true(net, tmp_path, range(8))


def test_ggn_trace_converges_to_the_exact_trace(tmp_path):
    net = Net()
    fit(net, CurvatureCallback(mc_samples=1000), tmp_path=tmp_path, accumulate_grad_batches=2, epochs=1)
    for step, value in series(tmp_path, "ggn_trace").items():
        assert value == pytest.approx(exact_ggn_trace(net, step), rel=0.05)


def test_tags_steps_and_histogram(tmp_path):
    fit(Net(), CurvatureCallback(), tmp_path=tmp_path, epochs=8, log_every_n_steps=4)
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
    fit(Net(), CurvatureCallback(every_n_steps), tmp_path=tmp_path, log_every_n_steps=2)
    assert list(series(tmp_path, "grad_norm")) == steps


def test_a_step_that_needs_nothing_is_not_patched():
    class Watch(pl.Callback):
        patched = []

        def on_before_backward(self, trainer, pl_module, loss):
            self.patched.append("training_step" in vars(pl_module))

    fit(Net(), CurvatureCallback(every_n_steps=4), Watch())
    assert Watch.patched == [False, False, False, True] * 2


@pytest.mark.parametrize("optimizer", [sgd, adam])
@pytest.mark.parametrize(
    ("net", "settings"),
    [
        (Net, {}),
        (Net, {"accumulate_grad_batches": 2}),
        (Net, {"gradient_clip_val": 0.1}),
        (Net, {"precision": "bf16-mixed"}),
        (ManualNet, {}),
        (ManualNet, {"precision": "bf16-mixed"}),
    ],
    ids=str,
)
def test_parameters_are_bit_identical_with_and_without(net, optimizer, settings):
    one, other = net(optimizer=optimizer, dropout=0.5), net(optimizer=optimizer, dropout=0.5)
    fit(one, **settings)
    fit(other, CurvatureCallback(), **settings)
    assert_same_parameters(one, other)


def test_curvature_optimizer_is_supplied_on_the_steps_that_it_asks_for():
    class Asks(torch.optim.SGD):
        asked, got = 0, []

        def required_extensions(self):
            Asks.asked += 1
            return (BatchGrad(),) if Asks.asked % 2 else ()

        def step(self, closure=None):
            loss = super().step(closure)
            Asks.got.append(all(hasattr(p, "grad_batch") for group in self.param_groups for p in group["params"]))
            return loss

    net = Net(optimizer=lambda params: Asks(params, lr=0.1))
    fit(net, CurvatureCallback(every_n_steps=0), epochs=1)
    assert Asks.got == [True, False, True, False]
    assert_nothing_left_behind(net)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "logging",
    [
        (CurvatureCallback(1),),
        (CurvatureCallback(1, mc_samples=3),),
        (CurvatureCallback(2, mc_samples=0),),
        (CurvatureCallback(0), CurvatureCallback(1)),
    ],
)
def test_logging_does_not_change_a_curvature_optimizer(logging, accumulate):
    one, other = Net(optimizer=kfac), Net(optimizer=kfac)
    fit(one, CurvatureCallback(every_n_steps=0), accumulate_grad_batches=accumulate)
    fit(other, *logging, accumulate_grad_batches=accumulate)
    assert_same_parameters(one, other)
    assert_nothing_left_behind(other)


def test_two_callbacks_side_by_side(tmp_path):
    net = Net()
    fit(net, CurvatureCallback(2), CurvatureCallback(3), tmp_path=tmp_path)
    logged = events(tmp_path).Scalars("curvature/grad_variance")
    assert sorted(event.step for event in logged) == [1, 2, 3, 5, 5, 7]
    for event in logged:
        assert event.value == pytest.approx(per_sample_gradients(net, event.step).var(0).sum().item(), rel=1e-5)
    assert_nothing_left_behind(net)


@pytest.mark.parametrize("where", ["training_step", "on_before_backward", "on_after_backward", "optimizer_step"])
def test_an_exception_in_the_middle_of_a_step_leaves_nothing_and_a_second_fit_works(tmp_path, where):
    def fail(*args, **kwargs):
        raise ZeroDivisionError("on purpose")

    net, callback = Net(), CurvatureCallback()
    broken = copy.deepcopy(net)
    if where == "training_step":
        broken.loss = fail
    else:
        setattr(broken, where, fail)
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        fit(broken, callback)
    if where != "training_step":
        delattr(broken, where)
    broken.loss = net.loss
    assert_nothing_left_behind(broken)
    fit(broken, CurvatureCallback(), tmp_path=tmp_path)
    broken.seen = broken.seen[-8:]
    assert_logged_values_are_true(broken, tmp_path, range(8))


def test_a_patch_of_the_user_is_kept():
    net = Net()
    own = net.training_step
    net.training_step = lambda batch, batch_idx: 2 * own(batch, batch_idx)
    patch = net.training_step
    fit(net, CurvatureCallback())
    assert net.training_step is patch


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
        assert list(logged.values()) == pytest.approx([g[:, columns].var(0).sum().item() for g in gradients], rel=1e-5)


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


def test_unsupported_model_raises_or_warns_once():
    class Normed(Net):
        def __init__(self):
            super().__init__()
            self.net.append(nn.BatchNorm1d(3))

    with pytest.raises(RuntimeError, match=r"(?i)batch.?norm"):
        fit(Normed(), CurvatureCallback())
    net = Normed()
    with pytest.warns(UserWarning, match="CurvatureCallback stops logging") as caught:
        trainer = fit(net, CurvatureCallback(strict=False))
    assert sum("stops logging" in str(warning.message) for warning in caught) == 1
    assert "curvature/grad_norm" not in trainer.callback_metrics
    assert_nothing_left_behind(net)


def test_a_loss_of_unknown_curvature_has_everything_but_the_trace(tmp_path):
    def by_hand(output, y):
        return -output.log_softmax(1)[torch.arange(len(y)), y].mean()

    with pytest.raises(RuntimeError, match=r"GGNTraceMC.*`mc_samples=0` leaves out the GGN trace"):
        fit(Net(loss=by_hand), CurvatureCallback())
    net = Net(loss=by_hand)
    fit(net, CurvatureCallback(mc_samples=0), tmp_path=tmp_path)
    assert_logged_values_are_true(net, tmp_path, range(8))


def test_one_sample_has_norms_but_no_variance(tmp_path):
    fit(Net(), CurvatureCallback(), tmp_path=tmp_path, batch_size=1, size=3, epochs=1)
    tags = set(events(tmp_path).Tags()["scalars"])
    assert tags & TAGS == TAGS - {"curvature/grad_variance", "curvature/noise_scale"}


def test_fast_dev_run_and_other_loggers(tmp_path):
    fit(Net(), CurvatureCallback(), fast_dev_run=True, log_every_n_steps=50)
    trainer = fit(Net(), CurvatureCallback(), logger=CSVLogger(tmp_path))
    assert "curvature/noise_scale" in trainer.logger.experiment.metrics_keys
    trainer = fit(Net(), CurvatureCallback(), logger=False)
    assert trainer.callback_metrics["curvature/grad_norm"] > 0


def test_early_stopping_can_watch_a_quantity():
    stop = pl.callbacks.EarlyStopping("curvature/grad_norm", stopping_threshold=1e9, check_on_train_epoch_end=True)
    trainer = fit(Net(), CurvatureCallback(), stop, epochs=5)
    assert trainer.current_epoch == 1


def test_resumed_run_continues_the_series(tmp_path):
    whole, part = Net(), Net()
    fit(whole, CurvatureCallback(), tmp_path=tmp_path / "whole")
    trainer = fit(part, CurvatureCallback(), epochs=1, tmp_path=tmp_path / "first")
    trainer.save_checkpoint(tmp_path / "checkpoint")
    trainer = pl.Trainer(
        max_epochs=2,
        callbacks=[CurvatureCallback()],
        logger=TensorBoardLogger(tmp_path / "second", name="", version=""),
        log_every_n_steps=1,
        precision="64-true",
        **CONSTANT,
    )
    trainer.fit(part, DataLoader(data(), batch_size=6), ckpt_path=tmp_path / "checkpoint", weights_only=True)
    for name in ("ggn_trace", "grad_variance", "noise_scale"):
        resumed = series(tmp_path / "second", name)
        assert resumed == {step: value for step, value in series(tmp_path / "whole", name).items() if step >= 4}
        assert resumed


def test_compiled_modules_run_eagerly_when_logged(tmp_path):
    net = Net()
    net.net = torch.compile(net.net, backend="eager")
    fit(net, CurvatureCallback(every_n_steps=2), tmp_path=tmp_path)
    assert list(series(tmp_path, "grad_norm")) == [1, 3, 5, 7]


def test_callback_can_be_pickled_and_copied():
    callback = CurvatureCallback(every_n_steps=3)
    fit(Net(), callback)
    assert pickle.loads(pickle.dumps(callback)).every_n_steps == 3
    assert copy.deepcopy(callback).state_dict() == callback.state_dict()


def test_callback_serves_both_import_names():
    assert issubclass(CurvatureCallback, pl.Callback)
    lightning = pytest.importorskip("lightning.pytorch")
    assert issubclass(CurvatureCallback, lightning.Callback)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_steps": -1}, "`every_n_steps` must be None, 0 or positive, found -1"),
        ({"ema": 1.0}, r"`ema` must be in \[0, 1\), found 1.0"),
        ({"mc_samples": -1}, "`mc_samples` must be 0 or positive, found -1"),
    ],
)
def test_bad_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        CurvatureCallback(**settings)
