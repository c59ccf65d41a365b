"""Two processes that share the parameters of a model among each other."""

import os
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

from lightning_curv import (
    BatchL2Grad,
    DiagGGNOptimizer,
    DPOptimizer,
    KFACOptimizer,
    curvature,
)

WORLD, SIZE = 2, 6


def network():
    torch.manual_seed(0)
    layers = nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)
    return nn.Sequential(*layers).double()


def batch(rank):
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(SIZE, 4, dtype=torch.float64, generator=generator)
    return x, torch.arange(SIZE) % 3


def message(function):
    """What an error says."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def tensor_parallel():
    mesh = init_device_mesh("cpu", (WORLD,))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    return parallelize_module(network(), mesh, plan)


def whole_model():
    return fully_shard(network(), mesh=init_device_mesh("cpu", (WORLD,)))


def backward(model):
    x, y = batch(0)
    with curvature(BatchL2Grad()):
        F.cross_entropy(model(x), y).backward()


def refusals():
    """What is refused under sharding, by name."""
    sharded = whole_model()
    return {
        "tensor parallel": message(lambda: backward(tensor_parallel())),
        "fsdp2": message(lambda: backward(whole_model())),
        "kfac": message(lambda: KFACOptimizer(sharded.parameters())),
        "diag_ggn": message(lambda: DiagGGNOptimizer(sharded.parameters())),
        "private": message(lambda: DPOptimizer(torch.optim.SGD(sharded.parameters(), lr=0.1))),
    }


def work(rank, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    torch.save({"refusals": refusals()}, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
