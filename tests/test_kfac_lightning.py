"""KFACOptimizer inside Lightning: the example, resuming, and steps that a gradient scaler skips."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_curv import KFACOptimizer, curvature


@pytest.mark.parametrize(("optimizer", "best", "worst"), [("kfac", 0.3, 0.7), ("adam", 1.0, 5.0)])
def test_autoencoder_example(optimizer, best, worst, capsys):
    path = Path(__file__).parents[1] / "examples" / "autoencoder.py"
    spec = importlib.util.spec_from_file_location("autoencoder_example", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    error = example.main(["--small", "--steps", "80", "--optimizer", optimizer])
    assert best < error < worst
    assert f"after 80 steps of {optimizer}" in capsys.readouterr().out


def test_a_step_that_the_scaler_skips_uses_no_old_curvature():
    net, x, y = nn.Linear(4, 3), torch.randn(16, 4), torch.randint(3, (16,))
    optimizer = KFACOptimizer(net.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    losses = []
    for step in range(8):
        optimizer.zero_grad()
        optimizer.curvature_scale = 1 / scaler.get_scale()
        with curvature(*optimizer.required_extensions()):
            loss = F.cross_entropy(net(x), y)
            scaler.scale(loss).backward()
        if step == 3:
            net.weight.grad[0, 0] = float("inf")
        before = net.weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(net.weight, before) == (step == 3)
        losses.append(loss.item())
    assert optimizer.steps == 7
    assert losses[-1] < losses[0]
