"""KFACOptimizer under a gradient scaler that skips steps."""

import torch
from torch import nn
from torch.nn import functional as F

from lightning_curv import KFACOptimizer, curvature


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
