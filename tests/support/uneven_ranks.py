"""Processes in a loop of their own, of which only some use a layer of the model."""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from lightning_curv import CurvatureStepSize, DiagGGNOptimizer, KFACOptimizer, curvature

STEPS = 5


def kept(params):
    """Curvature is kept from the second step on."""
    optimizer = KFACOptimizer(params)
    optimizer.schedule = replace(optimizer.schedule, burn_in=1)
    return optimizer


OPTIMIZERS = {
    "fixed": lambda params: KFACOptimizer(params, lr=0.1, damping=0.1),
    "auto": lambda params: KFACOptimizer(params),
    "kept": kept,
    "sharded": lambda params: KFACOptimizer(params, lr=0.1, damping=0.1, shard_inverses=True),
    "eigen": lambda params: KFACOptimizer(params, lr=0.1, damping=0.1, eigen=True),
    "diagonal": lambda params: DiagGGNOptimizer(params, lr=0.1),
    "step size": lambda params: CurvatureStepSize(torch.optim.AdamW(params, weight_decay=0.0)),
}
# whether a process uses the layer in a step
PATTERNS = {
    "first process": lambda rank, step: rank == 0,
    "last process": lambda rank, step: rank == dist.get_world_size() - 1,
    "in turns": lambda rank, step: (rank + step) % 2 == 0,
    "from the third step": lambda rank, step: rank == 0 and step >= 2,
    "nobody": lambda rank, step: False,
    "empty batch": lambda rank, step: True,
}
CASES = [(optimizer, pattern) for optimizer in OPTIMIZERS for pattern in PATTERNS]


class Branched(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.trunk, self.branch = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x, branch):
        return self.trunk(x) + self.branch(x) if branch else self.trunk(x)


def parameters_after(name, pattern):
    """The parameters that training ends with in this process, and those it began with."""
    model = Branched().double()
    before = [p.detach().clone() for p in model.parameters()]
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = OPTIMIZERS[name](model.parameters())
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    for step in range(STEPS):
        size = 0 if pattern == "empty batch" and rank == 0 and step == 1 else 8
        x = torch.randn(size, 4, dtype=torch.float64, generator=generator)
        y = torch.arange(size) % 3
        optimizer.zero_grad()
        with curvature(*optimizer.required_extensions()):
            output = parallel(x, PATTERNS[pattern](rank, step))
            (F.cross_entropy(output, y, reduction="sum") / 8).backward()
        optimizer.step()
    return before, [p.detach() for p in model.parameters()]


def work(rank, folder):
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for name, pattern in CASES:
        torch.save(parameters_after(name, pattern), Path(folder) / f"{name} {pattern} {rank}.pt")
