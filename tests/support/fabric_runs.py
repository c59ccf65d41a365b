"""Training with `lightning_fabric`, in one process or in several."""

import atexit
import copy
import sys
from pathlib import Path

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from processes import leave_group
from torch import nn
from torch.nn import functional as F

from lightning_curv import BatchL2Grad, KFACOptimizer, Variance, curvature

STEPS, PARTS, SIZE = 3, 2, 6  # optimizer steps, micro-batches of each, samples of these


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def batches(world=1):
    """Per step and micro-batch a batch for every process."""
    x = torch.randn(STEPS, PARTS, world, SIZE, 4, generator=torch.Generator().manual_seed(0))
    return x, (x[..., 0] > 0).long() + (x[..., 1] > 1).long()


def fabric(precision="32-true", **settings):
    if precision == "16-mixed":  # on a CPU, Fabric makes it bf16-mixed
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        return Fabric(accelerator="cpu", plugins=[plugin], **settings)
    return Fabric(accelerator="cpu", precision=precision, **settings)


def step_of_quantities(fabric, rank=0, world=1):
    """One step's gradient, and quantities of the first micro-batch alone, by the names of parameters."""
    double = fabric._precision.precision == "64-true"
    net = network().to(torch.float64 if double else torch.float32)
    before = copy.deepcopy(net).double()
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    x, y = batches(world)
    quantities = []
    for part in range(PARTS):
        inputs, labels = x[0, part, rank], y[0, part, rank]
        if double:
            inputs = inputs.double()
        accumulates = fabric.no_backward_sync(model, enabled=part < PARTS - 1)
        with accumulates, curvature(BatchL2Grad(), Variance()):
            fabric.backward(F.cross_entropy(model(inputs), labels) / PARTS)
        quantities.append(
            {name: (p.batch_l2.double(), p.variance.double()) for name, p in net.named_parameters()}
        )
    gradients = {name: p.grad.double() for name, p in net.named_parameters()}
    optimizer.step()
    return before, quantities, gradients


def trained(fabric, rank=0, world=1, union=False):
    """Parameters after KFAC's steps; with `union` on the batches of all processes."""
    net = network()
    model, optimizer = fabric.setup(
        net, KFACOptimizer(net.parameters(), lr=0.3, damping=0.01, curvature="exact")
    )
    x, y = batches(world)
    for step in range(STEPS):
        mine = (x[step, 0], y[step, 0]) if union else (x[step, 0, rank], y[step, 0, rank])
        inputs, labels = mine[0].reshape(-1, 4), mine[1].reshape(-1)
        optimizer.zero_grad()
        with curvature(*optimizer.required_extensions()):
            fabric.backward(F.cross_entropy(model(inputs), labels))
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()]


def worker(fabric, folder):
    atexit.register(leave_group)
    torch.set_num_threads(1)
    rank, world = fabric.global_rank, fabric.world_size
    _, quantities, gradients = step_of_quantities(fabric, rank, world)
    found = quantities, gradients, trained(fabric, rank, world)
    torch.save(found, Path(folder) / f"{rank}.pt")


if __name__ == "__main__":
    fabric(devices=2, strategy="ddp_spawn").launch(worker, sys.argv[1])
