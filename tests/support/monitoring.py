"""Models, training runs and brute force for the tests of the callback."""

import pytest
import pytorch_lightning as pl
import torch
from processes import LeavesGroup
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_curv import KFACOptimizer

CONSTANT = {
    "enable_progress_bar": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
}
NORMS = {
    "sample_norm_p5": 0.05,
    "sample_norm_median": 0.5,
    "sample_norm_p95": 0.95,
    "sample_norm_max": 1.0,
}
WITH_TRACE = ["default", "ggn_trace"]
SCALARS = (
    "grad_norm",
    "grad_variance",
    "grad_signal",
    "noise_scale",
    "suggested_batch_size",
    "ggn_trace",
)
TAGS = {f"curvature/{name}" for name in (*NORMS, *SCALARS)}


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
        self.seen.append(
            (step, {name: p.detach().clone() for name, p in self.named_parameters()}, batch)
        )
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


class Scaled(MixedPrecision):
    """A gradient scaler around float32."""

    def __init__(self):
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))

    def forward_context(self):
        return torch.autocast("cpu", enabled=False)


def data(size=24, dtype=torch.float64):
    x = torch.randn(size, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 1).long())


def fit(net, *callbacks, batch_size=6, epochs=2, tmp_path=None, size=24, loader=None, **kwargs):
    settings = {
        "accelerator": "cpu",
        "precision": "64-true",
        "log_every_n_steps": 1,
        "logger": False,
        **CONSTANT,
    }
    if kwargs.get("strategy") == "ddp_spawn":
        callbacks += (LeavesGroup(),)
    if tmp_path is not None:
        settings["logger"] = TensorBoardLogger(tmp_path, name="", version="")
    trainer = pl.Trainer(callbacks=list(callbacks), max_epochs=epochs, **(settings | kwargs))
    torch.manual_seed(2)
    dtype = torch.float64 if trainer.precision == "64-true" else torch.float32
    trainer.fit(
        net,
        DataLoader(data(size, dtype), batch_size=batch_size)
        if loader is None
        else DataLoader(loader, batch_size=None),
    )
    return trainer


def events(tmp_path):
    accumulator = EventAccumulator(
        str(tmp_path), size_guidance=dict.fromkeys(("scalars", "histograms"), 0)
    )
    return accumulator.Reload()


def series(tmp_path, name):
    logged, tag = events(tmp_path), f"curvature/{name}"
    return (
        {event.step: event.value for event in logged.Scalars(tag)}
        if tag in logged.Tags()["scalars"]
        else {}
    )


def per_sample_gradients(net, step):
    """[N, P]: gradients of the samples of a step, scaled such that their mean is the gradient, the naive way."""
    rows = []
    for _, params, (x, y) in [seen for seen in net.seen if seen[0] == step]:
        for n in range(len(x)):
            leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
            output = torch.func.functional_call(net, leaves, (x[n : n + 1],))
            scale = len(x) if net.loss is cross_entropy_sum else 1
            gradient = torch.autograd.grad(
                scale * net.loss(output, y[n : n + 1]), list(leaves.values())
            )
            rows.append(torch.cat([g.flatten() for g in gradient]))
    return torch.stack(rows)


def expected(gradients):
    mean, norms, n = gradients.mean(0), gradients.norm(dim=1), len(gradients)
    trace = gradients.var(0).sum()
    values = {
        "grad_norm": mean.norm(),
        "grad_variance": trace,
        "grad_signal": mean @ mean - trace / n,
    }
    values |= {name: norms.quantile(q) for name, q in NORMS.items()}
    return {name: value.item() for name, value in values.items()}


def exact_ggn_trace(net, step):
    traces = []
    for _, params, (x, y) in [seen for seen in net.seen if seen[0] == step]:
        jacobians = torch.func.jacrev(lambda p, x=x: torch.func.functional_call(net, p, (x,)))(
            params
        )
        probabilities = torch.func.functional_call(net, params, (x,)).softmax(1)
        hessians = (
            torch.diag_embed(probabilities) - probabilities[:, :, None] * probabilities[:, None]
        )
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
