"""`CurvatureCallback`: logged values against autograd, an untouched training run, and nothing left behind."""

import copy
import inspect
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
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_curv import BatchGrad, CurvatureCallback, DiagGGNOptimizer, KFACOptimizer, record
from lightning_curv.backprop import Backprop
from lightning_curv.check import SumCheck

pytestmark = [
    pytest.mark.filterwarnings("ignore:At step .* are too small:UserWarning"),  # they are, for speed
    pytest.mark.filterwarnings("ignore:(?s).*(deprecated in v4|LightningCLI's args)"),  # Lightning and jsonargparse
]
CONSTANT = {"enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}
NORMS = {"sample_norm_p5": 0.05, "sample_norm_median": 0.5, "sample_norm_p95": 0.95, "sample_norm_max": 1.0}
TAGS = {
    f"curvature/{name}" for name in (*NORMS, "grad_norm", "grad_variance", "grad_signal", "noise_scale", "ggn_trace")
}


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


def fit(net, *callbacks, batch_size=6, epochs=2, tmp_path=None, size=24, loader=None, **kwargs):
    settings = {"accelerator": "cpu", "precision": "64-true", "log_every_n_steps": 1, "logger": False, **CONSTANT}
    if tmp_path is not None:
        settings["logger"] = TensorBoardLogger(tmp_path, name="", version="")
    trainer = pl.Trainer(callbacks=list(callbacks), max_epochs=epochs, **(settings | kwargs))
    torch.manual_seed(2)
    dtype = torch.float64 if trainer.precision == "64-true" else torch.float32
    trainer.fit(
        net,
        DataLoader(data(size, dtype), batch_size=batch_size) if loader is None else DataLoader(loader, batch_size=None),
    )
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
    values = {"grad_norm": mean.norm(), "grad_variance": trace, "grad_signal": mean @ mean - trace / n}
    values |= {name: norms.quantile(q) for name, q in NORMS.items()}
    return {name: value.item() for name, value in values.items()}


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
        values = expected(per_sample_gradients(net, step))
        moments = values["grad_variance"], values["grad_signal"]
        for name, value in values.items():
            assert series(tmp_path, name)[step] == pytest.approx(value, rel=1e-5), (name, step)
        ratio = [0.9 * old + 0.1 * new for old, new in zip(ratio, moments)]
        logged = series(tmp_path, "noise_scale").get(step)
        assert logged == (pytest.approx(ratio[0] / ratio[1], rel=1e-4) if ratio[1] > 0 else None)


def assert_same_parameters(one, other):
    for p, q in zip(one.parameters(), other.parameters()):
        assert torch.equal(p, q)


def assert_same_parameters_up_to_rounding(one, other):
    for p, q in zip(one.parameters(), other.parameters()):
        torch.testing.assert_close(p, q)


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


class Scaled(MixedPrecision):
    """A gradient scaler around float32."""

    def __init__(self):
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))

    def forward_context(self):
        return torch.autocast("cpu", enabled=False)


def test_logged_values_equal_autograd_under_a_gradient_scaler(tmp_path):
    net = Net()
    fit(net, CurvatureCallback(), tmp_path=tmp_path, precision=None, plugins=[Scaled()])
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


def test_a_step_that_needs_nothing_costs_nothing(monkeypatch):
    entered, hooked, steps = [], [], []
    enter, before = record.__enter__, Backprop.before
    monkeypatch.setattr(record, "__enter__", lambda self: (entered.append(len(steps)), enter(self))[1])
    monkeypatch.setattr(Backprop, "before", lambda self: (hooked.append(len(steps)), before(self))[1])

    class Watch(pl.Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            monitored = len(steps) % 4 == 3
            assert ("training_step" in vars(pl_module)) == monitored
            if not monitored:
                assert not any(recorded(node) for node in nodes_below(loss.grad_fn))
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in pl_module.modules())
            assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in pl_module.parameters())

        def on_train_batch_end(self, *args):
            assert torch.overrides._get_current_function_mode() is None
            steps.append(None)

    fit(Net(), CurvatureCallback(every_n_steps=4), Watch())
    assert entered == hooked == [3, 7]


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

    with pytest.warns(UserWarning, match=r"At step \d+ the batches of 6 samples are too small") as caught:
        fit(Net(loss=noise), CurvatureCallback(mc_samples=0, ema=0.0), tmp_path=tmp_path, epochs=8)
    assert sum("too small" in str(warning.message) for warning in caught) == 1
    signal, scale = series(tmp_path, "grad_signal"), series(tmp_path, "noise_scale")
    assert set(scale) == {step for step, value in signal.items() if value > 0}
    assert 0 < len(scale) < len(signal) == 32


def repeated(times, dtype=torch.float64):
    """Batches of which `times` successive ones are equal, and the same samples in batches that are as much larger."""
    x, y = data(12, dtype).tensors
    small = [(x[i : i + 3], y[i : i + 3]) for i in range(0, 12, 3)]
    return [batch for batch in small for _ in range(times)], [(x.repeat(times, 1), y.repeat(times)) for x, y in small]


@pytest.mark.parametrize("precision", ["64-true", "scaler"])
@pytest.mark.parametrize("loss", [cross_entropy_mean, cross_entropy_sum])
@pytest.mark.parametrize("optimizer", [KFACOptimizer, DiagGGNOptimizer])
def test_curvature_optimizers_see_the_curvature_of_the_accumulated_loss(optimizer, loss, precision):
    """Two equal micro-batches make the step of the batch of twice the size: no `curvature_scale` is needed."""

    def build(params):
        return optimizer(params, lr=0.3, damping=0.01, curvature="exact")

    settings = {"precision": precision}
    if precision == "scaler":
        settings = {"precision": None, "plugins": [Scaled()]}
    accumulated = Net(build, loss)
    whole = Net(build, loss if loss is cross_entropy_mean else lambda output, y: loss(output, y) / 2)
    micro, doubled = repeated(2, torch.float64 if precision == "64-true" else torch.float32)
    fit(accumulated, CurvatureCallback(0), loader=micro, accumulate_grad_batches=2, **settings)
    fit(whole, CurvatureCallback(0), loader=doubled, **settings)
    assert len(accumulated.seen) == 2 * len(whole.seen) == 16
    assert_same_parameters_up_to_rounding(accumulated, whole)


def test_manual_accumulation_declares_its_scale():
    """In manual optimization the callback supplies the last backward pass, here the half of a mean."""

    class Halves(ManualNet):
        def configure_optimizers(self):
            optimizer = KFACOptimizer(self.parameters(), lr=0.3, damping=0.01, curvature="exact")
            optimizer.curvature_scale = 2
            return optimizer

    def build(params):
        return KFACOptimizer(params, lr=0.3, damping=0.01, curvature="exact")

    halves, whole, (_, doubled) = Halves(), Net(build), repeated(2)
    fit(halves, CurvatureCallback(0), loader=doubled)
    fit(whole, CurvatureCallback(0), loader=doubled)
    assert_same_parameters_up_to_rounding(halves, whole)


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


def test_a_failed_check_raises_or_trains_on_without_logging(monkeypatch):
    def fail(*args):
        raise RuntimeError("on purpose")

    monkeypatch.setattr(SumCheck, "evaluate", fail)
    with pytest.raises(RuntimeError, match=r"on purpose.*`strict=False` trains on"):
        fit(Net(), CurvatureCallback())
    plain, watched = Net(optimizer=kfac), Net(optimizer=kfac)
    fit(plain, CurvatureCallback(0))
    with pytest.warns(UserWarning, match="CurvatureCallback stops logging: on purpose"):
        fit(watched, CurvatureCallback(strict=False))
    assert_same_parameters(plain, watched)
    assert_nothing_left_behind(watched)


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
    assert tags & TAGS == TAGS - {f"curvature/{name}" for name in ("grad_variance", "grad_signal", "noise_scale")}


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
    strictly = {"weights_only": True} if "weights_only" in inspect.signature(trainer.fit).parameters else {}
    trainer.fit(part, DataLoader(data(), batch_size=6), ckpt_path=tmp_path / "checkpoint", **strictly)
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


def test_values_of_two_processes_equal_those_of_one(tmp_path):
    """Lightning's sampler deals shuffled samples out to the processes in turn."""
    one, two = tmp_path / "one", tmp_path / "two"
    x, y = data().tensors
    batches = torch.tensor(list(DistributedSampler(data(), num_replicas=1, rank=0))).split(6)
    fit(Net(), CurvatureCallback(mc_samples=0), tmp_path=one, epochs=1, loader=[(x[i], y[i]) for i in batches])
    fit(Net(), CurvatureCallback(mc_samples=0), tmp_path=two, epochs=1, batch_size=3, strategy="ddp_spawn", devices=2)
    for name in ("grad_norm", "grad_variance", "grad_signal", "noise_scale"):
        assert series(two, name) == pytest.approx(series(one, name), rel=1e-5)
        assert series(two, name)


def test_either_import_name_trains_with_the_callback_and_kfac(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    assert issubclass(CurvatureCallback, pl.Callback)
    assert issubclass(CurvatureCallback, lightning.Callback)

    class Other(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net().net

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return kfac(self.parameters())

    trainer = lightning.Trainer(
        max_epochs=1,
        callbacks=[CurvatureCallback()],
        logger=lightning.loggers.TensorBoardLogger(tmp_path, name="", version=""),
        log_every_n_steps=1,
        accelerator="cpu",
        precision="64-true",
        **CONSTANT,
    )
    module, reference = Other(), Net(optimizer=kfac)
    torch.manual_seed(2)
    trainer.fit(module, DataLoader(data(), batch_size=6))
    fit(reference, CurvatureCallback(), tmp_path=tmp_path / "reference", epochs=1)
    assert_same_parameters(module.net, reference.net)
    for tag in TAGS:
        name = tag.removeprefix("curvature/")
        assert series(tmp_path, name) == series(tmp_path / "reference", name)


CONFIG = """
trainer:
  max_epochs: 1
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_checkpointing: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_curv.CurvatureCallback
      init_args: {every_n_steps: 2, strict: false}
optimizer:
  class_path: lightning_curv.KFACOptimizer
  init_args: {lr: 0.1, damping: 0.05, factor_interval: 2}
"""


@pytest.mark.parametrize("import_name", ["pytorch_lightning", "lightning.pytorch"])
def test_lightning_cli_builds_callback_and_optimizer_from_yaml(tmp_path, import_name):
    pytest.importorskip("jsonargparse")
    lightning = pytest.importorskip(import_name)
    cli = pytest.importorskip(f"{import_name}.cli")

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net().net

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def train_dataloader(self):
            return DataLoader(data(dtype=torch.float32), batch_size=6)

    (tmp_path / "config.yaml").write_text(CONFIG)
    arguments = ["fit", f"--config={tmp_path / 'config.yaml'}", "--optimizer.damping=0.2"]
    trainer = cli.LightningCLI(Model, args=arguments, save_config_callback=None, seed_everything_default=False).trainer
    [optimizer] = trainer.optimizers
    assert type(optimizer) is KFACOptimizer
    assert optimizer.steps == 4
    assert optimizer.param_groups[0]["damping"] == 0.2
    assert trainer.callback_metrics["curvature/grad_norm"] > 0


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
