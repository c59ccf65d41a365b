"""Two processes that share the parameters of a model among each other."""

import os
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

from lightning_curv import (
    GGNMP,
    KFAC,
    KFLR,
    KFRA,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagGGNMC,
    DiagGGNOptimizer,
    DiagHessian,
    DPOptimizer,
    KFACOptimizer,
    SumGradSquared,
    Variance,
    curvature,
)
from lightning_curv.extensions import GGNTraceMC, GraphExtension, JacobianMC
from lightning_curv.extensions.spectrum import GGNTraceExact, HessianTraceMC, MaxEigenvalue

WORLD = int(os.environ.get("SHARDED_WORLD", 2))  # processes; 4 have a mesh of 2 × 2, too
SIZE = 6


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


def backward(model, extension=None):
    x, y = batch(0)
    with curvature(extension or BatchL2Grad()):
        F.cross_entropy(model(x), y).backward()


class Tied(nn.Module):
    """A weight that is used twice, and one that is frozen."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, 3)
        self.first.bias.requires_grad_(False)
        self.double()

    def forward(self, x):
        return self.head(self.second(self.first(x).tanh()).tanh())


def replicas():
    """A mesh of as many replicas as can be, of as few parts as can be."""
    shape = (2, dist.get_world_size() // 2)
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))


def by_layer(model, **settings):
    for layer in model.children():
        if [*layer.parameters()]:
            fully_shard(layer, **settings)
    return fully_shard(model, **settings)


# How a model is sharded.
SHARDED = {
    "root": lambda mesh: fully_shard(network(), mesh=mesh),
    "root, freed": lambda mesh: fully_shard(network(), mesh=mesh, reshard_after_forward=True),
    "layers": lambda mesh: by_layer(network(), mesh=mesh),
    "layers, kept": lambda mesh: by_layer(network(), mesh=mesh, reshard_after_forward=False),
    "tied and frozen": lambda mesh: fully_shard(Tied(), mesh=mesh, reshard_after_forward=True),
    "replicas": lambda mesh: by_layer(network(), mesh=replicas()),
    "mixed": lambda mesh: by_layer(
        network().float(),
        mesh=mesh,
        mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
    ),
}
EXTENSIONS = [
    BatchGrad,
    BatchL2Grad,
    SumGradSquared,
    Variance,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    KFAC,
    KFLR,
    KFRA,
    GGNTraceMC,
    GGNTraceExact,
    HessianTraceMC,
    lambda: MaxEigenvalue("ggn"),
    lambda: MaxEigenvalue("hessian"),
]


def fields(model, x, y):
    """What the extensions leave on the parameters, by name, with the gradients of this process."""
    model.zero_grad()
    extensions = [e() for e in EXTENSIONS]
    if isinstance(model, Tied):  # Kronecker factors of a sum of uses have no input of their own
        extensions = [e for e in extensions if not isinstance(e, (KFAC, KFLR, KFRA))]
    if x.dtype == torch.bfloat16:  # of which long sums and differences keep no digit
        extensions = [e for e in extensions if not isinstance(e, (GraphExtension, DiagHessian))]
    with curvature(*extensions, generator=torch.Generator().manual_seed(0)):
        F.cross_entropy(model(x), y).backward()
    found = {}
    for name, parameter in model.named_parameters():
        own = {e.savefield: getattr(parameter, e.savefield, None) for e in extensions}
        found |= {(name, field): value for field, value in own.items() if value is not None}
    return found


def alone(name):
    """The network of a set-up, without sharding."""
    if name == "mixed":
        return network().to(torch.bfloat16)
    return Tied() if name == "tied and frozen" else network()


def quantities(name, mesh):
    """Fields under sharding and without, and the gradients of the union batch, of two steps."""
    rank, sharded = dist.get_rank(), SHARDED[name](mesh)
    plain = alone(name)
    steps = []
    for step in range(2):
        x, y = batch(rank + WORLD * step)
        if name == "mixed":
            x = x.bfloat16()
        found, expected = fields(sharded, x, y), fields(plain, x, y)
        gradients = [p.grad.full_tensor() for p in sharded.parameters() if p.requires_grad]
        means = [p.grad.clone() for p in plain.parameters() if p.requires_grad]
        for mean in means:
            wide = mean.float() if name == "mixed" else mean
            dist.all_reduce(wide)
            mean.copy_(wide / dist.get_world_size())
        steps.append((found, expected, gradients, means))
    return steps


def accumulated(mesh):
    """Gradients of two micro-batches of which the first one is not exchanged, and of a union batch."""
    rank, sharded, plain = dist.get_rank(), by_layer(network(), mesh=mesh), network()
    for step in range(2):
        sharded.set_requires_gradient_sync(step == 1)
        x, y = batch(rank + WORLD * step)
        with curvature(BatchL2Grad(), DiagGGNExact(), check=True):
            F.cross_entropy(sharded(x), y).backward()
    for number in range(2 * dist.get_world_size()):
        x, y = batch(number)
        (F.cross_entropy(plain(x), y) / dist.get_world_size()).backward()
    return [
        (p.grad.full_tensor(), q.grad)
        for p, q in zip(sharded.parameters(), plain.parameters(), strict=True)
    ]


def refusals():
    """What is refused under sharding, by name."""
    sharded = whole_model()
    return {
        "tensor parallel": message(lambda: backward(tensor_parallel())),
        "products": message(lambda: backward(whole_model(), GGNMP())),
        "kept": message(lambda: backward(whole_model(), JacobianMC())),
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
    mesh = init_device_mesh("cpu", (WORLD,))
    found = {"refusals": refusals()}
    found["quantities"] = {name: quantities(name, mesh) for name in SHARDED}
    found["accumulated"] = accumulated(mesh)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
