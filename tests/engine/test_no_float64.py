"""Devices without float64, such as MPS: nothing of ours is ever made there in double precision.

The CPU stands in for such a device. Numbers that are made on the host on purpose are told by the line that makes
them, which says `cpu`, or by the function.
"""

import linecache
import sys
from contextlib import contextmanager

import pytest
import pytorch_lightning as pl
import torch
from monitoring import fit
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_curv import (
    CurvatureCallback,
    DiagGGNOptimizer,
    DPOptimizer,
    KFACOptimizer,
    curvature,
    precision,
)
from lightning_curv.metrics import GradientSNR, NoiseScale
from lightning_curv.terms.safe_norms import row_norms

# Functions that make numbers on the host, and move them where they are needed.
HOST = {
    "has_float64",
    "trial_vectors",
    "_trial",
    "golden",
    "values",
    "limits",
    "_largest",
    "_joined",
    "entry_rows",
    "_memory",
}
HOST_FILES = ("privacy/gaussian.py", "privacy/noise.py")  # noise is drawn there
PACKAGES = ("/lightning_curv/", "/optimizers/", "/callbacks/")


class Refusing(TorchDispatchMode):
    """Raises what MPS raises where something becomes float64."""

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        named = named or {}
        result = function(*arguments, **named)
        flat = [*arguments, *named.values()]
        flat = [x for y in flat for x in (y if isinstance(y, (list, tuple)) else [y])]
        before = any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in flat)
        found = result if isinstance(result, (list, tuple)) else [result]
        after = any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in found)
        if after and not before and not _on_host():
            raise TypeError(f"Cannot convert a MPS Tensor to float64 dtype, in {function}")
        return result


def _on_host():
    """Whether the innermost function of ours works on the host; others may do what they like."""
    frame = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if (
            any(package in code.co_filename for package in PACKAGES)
            and "/tests/" not in code.co_filename
        ):
            line = linecache.getline(code.co_filename, frame.f_lineno)
            known = code.co_name in HOST or code.co_filename.endswith(HOST_FILES)
            return known or "cpu" in line
        frame = frame.f_back
    return True


@contextmanager
def no_float64(monkeypatch):
    monkeypatch.setattr(precision, "has_float64", lambda device: False)
    with Refusing():
        yield


class Net(pl.LightningModule):
    def __init__(self, optimizer):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv1d(1, 4, 3),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(16, 6),
            nn.LayerNorm(6),
            nn.Linear(6, 3),
        )
        self.optimizer = optimizer

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


def batches():
    x = torch.randn(4, 4, 1, 6, generator=torch.Generator().manual_seed(0))
    return [(x[i], torch.arange(4) % 3) for i in range(len(x))]


OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.01),
    "kfac": lambda params: KFACOptimizer(params),
    "fixed": lambda params: KFACOptimizer(params, lr=0.01, damping=0.1),
    "eigen": lambda params: KFACOptimizer(params, lr=0.01, damping=0.1, eigen=True),
    "diag": lambda params: DiagGGNOptimizer(params, lr=0.01),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_makes_no_float64_on_the_device(monkeypatch, name):
    quantities = "all" if name == "sgd" else "default"
    callback = CurvatureCallback(quantities, layers=True, alarms=["exploding"], strict=True)
    with no_float64(monkeypatch):
        trainer = fit(
            Net(OPTIMIZERS[name]), callback, loader=batches(), epochs=1, precision="32-true"
        )
    assert trainer.global_step == 4
    expected = set(callback._series) - {
        "noise_scale",
        "suggested_batch_size",
        "noise_scale_norm_layers",
    }
    logged = {key.partition("/")[2] for key in trainer.callback_metrics}
    assert expected - logged <= {"grad_hist_1d", "grad_hist_2d"}


def test_private_steps_make_no_float64_on_the_device(monkeypatch):
    net = Net(OPTIMIZERS["sgd"]).net
    optimizer = DPOptimizer(
        torch.optim.SGD(net.parameters(), lr=0.1),
        noise_multiplier=1.0,
        clip_norm=1.0,
        expected_batch_size=4,
    )
    before = [p.detach().clone() for p in net.parameters()]
    with no_float64(monkeypatch):
        for x, y in batches():
            optimizer.zero_grad()
            with curvature(*optimizer.extensions):
                F.cross_entropy(net(x), y).backward()
            optimizer.step()
    for p, start in zip(net.parameters(), before, strict=True):
        assert p.dtype == torch.float32
        assert p.isfinite().all()
        assert not torch.equal(p, start)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_norms_of_float32_neither_underflow_nor_overflow_without_float64(monkeypatch, size):
    rows = size * torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    monkeypatch.setattr(precision, "has_float64", lambda device: False)
    norms = row_norms(rows, 1)
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms, torch.tensor([5.0 * size, 0.0]))


@pytest.mark.parametrize("metric", [GradientSNR, NoiseScale])
def test_metrics_move_to_a_device_without_float64(metric):
    moved = metric()

    def to_device(tensor):
        if tensor.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return tensor.clone()

    moved._apply(to_device)
    states = [getattr(moved, name) for name in moved._defaults]
    assert {state.dtype for state in states} == {torch.float32}


def test_the_stand_in_refuses():
    with Refusing(), pytest.raises(TypeError, match="float64"):
        precision.wide(torch.ones(2))
