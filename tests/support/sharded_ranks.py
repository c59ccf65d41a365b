"""Two processes that share the parameters of a model among each other."""

import pytest
import pytorch_lightning as pl
import torch
from processes import QUIET
from pytorch_lightning.plugins.environments import TorchElasticEnvironment
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_curv import (
    GGNMP,
    KFAC,
    KFLR,
    KFRA,
    BatchGrad,
    BatchL2Grad,
    CurvatureCallback,
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
from lightning_curv.callbacks import Alarm
from lightning_curv.distributed.shards import whole
from lightning_curv.extensions import GGNTraceMC, GraphExtension, JacobianExact
from lightning_curv.extensions.spectrum import GGNTraceExact, HessianTraceMC, MaxEigenvalue

# Torch 2.6 asks a stream of the processor for an event, which it does not have.
on_processors = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream(), "record_event"),
    reason="`fully_shard` of this torch runs on GPUs alone",
)

WORLD = 2  # processes of all cases but those that need a mesh of 2 × 2
SIZE, STEPS = 6, 4


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


def layers_of(tied, **settings):
    """The layers with one weight together, since it has one owner."""
    fully_shard([tied.first, tied.second], **settings)
    fully_shard(tied.head, **settings)
    return tied


def some_layers(mesh):
    """Two modules that are sharded each by itself, and a layer between them whose gradients a hook exchanges."""
    model = network()
    for layer in (model[0], model[4]):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    for parameter in model[2].parameters():
        parameter.register_post_accumulate_grad_hook(exchange)
    return model


def exchange(parameter):
    dist.all_reduce(parameter.grad)
    parameter.grad /= dist.get_world_size()


HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
# How a model is sharded.
SHARDED = {
    "root": lambda mesh: fully_shard(network(), mesh=mesh),
    "root, freed": lambda mesh: fully_shard(network(), mesh=mesh, reshard_after_forward=True),
    "layers": lambda mesh: by_layer(network(), mesh=mesh),
    "layers, kept": lambda mesh: by_layer(network(), mesh=mesh, reshard_after_forward=False),
    "tied and frozen": lambda mesh: fully_shard(Tied(), mesh=mesh, reshard_after_forward=True),
    "tied and frozen, kept": lambda mesh: fully_shard(Tied(), mesh=mesh),
    "tied and frozen, layers": lambda mesh: fully_shard(layers_of(Tied(), mesh=mesh), mesh=mesh),
    "some layers": some_layers,
    "replicas": lambda mesh: by_layer(network(), mesh=replicas()),
    "replicas, tied and frozen": lambda mesh: fully_shard(
        Tied(), mesh=replicas(), reshard_after_forward=True
    ),
    "mixed": lambda mesh: by_layer(network().float(), mesh=mesh, mp_policy=HALF),
    "mixed, root": lambda mesh: fully_shard(
        network().float(), mesh=mesh, mp_policy=HALF, reshard_after_forward=True
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
    if "mixed" in name:
        return network().to(torch.bfloat16)
    return Tied() if "tied" in name else network()


def quantities(name, mesh):
    """Fields under sharding and without, and the gradients of the union batch, of two steps."""
    rank, sharded = dist.get_rank(), SHARDED[name](mesh)
    plain = alone(name)
    steps = []
    for step in range(2):
        x, y = batch(rank + WORLD * step)
        if "mixed" in name:
            x = x.bfloat16()
        found, expected = fields(sharded, x, y), fields(plain, x, y)
        gradients = [whole(p.grad) for p in sharded.parameters() if p.requires_grad]
        means = [p.grad.clone() for p in plain.parameters() if p.requires_grad]
        for mean in means:
            wide = mean.float() if "mixed" in name else mean
            dist.all_reduce(wide)
            mean.copy_(wide / dist.get_world_size())
        steps.append((found, expected, gradients, means))
    return steps


ACCUMULATED = ["root, freed", "layers", "layers, kept", "tied and frozen", "replicas"]


def accumulated(name, mesh):
    """Gradients of two micro-batches of which the first one is not exchanged, and of a union batch."""
    rank, sharded, plain = dist.get_rank(), SHARDED[name](mesh), alone(name)
    for step in range(2):
        sharded.set_requires_gradient_sync(step == 1)
        x, y = batch(rank + dist.get_world_size() * step)
        with curvature(BatchL2Grad(), DiagGGNExact(), check=True):
            F.cross_entropy(sharded(x), y).backward()
    for number in range(2 * dist.get_world_size()):
        x, y = batch(number)
        (F.cross_entropy(plain(x), y) / dist.get_world_size()).backward()
    return [
        (p.grad.full_tensor(), q.grad)
        for p, q in zip(sharded.parameters(), plain.parameters(), strict=True)
        if p.requires_grad
    ]


class Product(nn.Module):
    """A parameter that is multiplied by another one, as adapters of low rank are."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.down, self.up = (nn.Parameter(torch.randn(2, n).double()) for n in (4, 3))

    def forward(self, x):
        return x @ (self.down.mT @ self.up)


def kept(mesh):
    """Directional derivatives from Jacobians that outlive the gathered parameters, and without sharding."""
    plain, sharded = Product(), fully_shard(Product(), mesh=mesh, reshard_after_forward=True)
    x, y = batch(dist.get_rank())
    found = []
    for model in (plain, sharded):
        with curvature(JacobianExact()):
            F.cross_entropy(model(x), y).backward()
        params = (model.down, model.up)
        found.append(
            [p.jacobian_exact.dot(torch.arange(p.numel()).double().view(p.shape)) for p in params]
        )
    return list(zip(*found, strict=True))


OPTIMIZERS = {
    "kfac": lambda params: KFACOptimizer(
        params, lr=0.3, damping=0.01, curvature="exact", momentum=0.9, weight_decay=0.01
    ),
    "inverses": lambda params: KFACOptimizer(
        params, lr=0.3, damping=0.01, curvature="exact", shard_inverses=True
    ),
    "eigen": lambda params: KFACOptimizer(
        params, lr=0.3, damping=0.01, curvature="exact", eigen=True
    ),
    "diagonal": lambda params: DiagGGNOptimizer(params, lr=0.3, curvature="exact"),
    "auto": lambda params: KFACOptimizer(params, curvature="exact"),
}


def run(model, optimizer, batches, resume=None):
    """The parameters after some steps of a loop of one's own; `resume` makes a network to go on with."""
    make, optimizer = optimizer, optimizer(model.parameters())
    for step, (x, y) in enumerate(batches):
        if resume is not None and step == 2:
            model, saved = resume(), (model.state_dict(), optimizer.state_dict())
            model.load_state_dict(saved[0])
            optimizer = make(model.parameters())
            optimizer.load_state_dict(saved[1])
        optimizer.zero_grad()
        with curvature(*optimizer.required_extensions()):
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return [whole(p.detach()).clone() for p in model.parameters()]


def batches_of(rank, world):
    return [batch(rank + world * step) for step in range(STEPS)]


def optimized(mesh):
    """Parameters that curvature optimizers end with."""

    def sharded():
        return by_layer(network(), mesh=mesh, reshard_after_forward=True)

    batches = batches_of(dist.get_rank(), dist.get_world_size())
    found = {
        (name, resume is not None): run(sharded(), make, batches, resume)
        for name, make in OPTIMIZERS.items()
        for resume in (None, sharded)
    }
    found["kfac", "some"] = run(some_layers(mesh), OPTIMIZERS["kfac"], batches)
    for name in TIED:
        found[name, "tied"] = run(SHARDED["tied and frozen"](mesh), OPTIMIZERS[name], batches)
    return found


TIED = ["kfac", "diagonal"]


def accumulate_without_exchange():
    """A micro-batch whose gradients FSDP keeps to itself."""
    model = whole_model()
    model.set_requires_gradient_sync(False)
    optimizer = DiagGGNOptimizer(model.parameters())
    x, y = batch(dist.get_rank())
    with curvature(*optimizer.accumulated_extensions()):
        F.cross_entropy(model(x), y).backward()
    optimizer.accumulate()


def refusals():
    """What is refused under sharding, by name."""
    return {
        "tensor parallel": message(lambda: backward(tensor_parallel())),
        "accumulate": message(accumulate_without_exchange),
        "products": message(lambda: backward(whole_model(), GGNMP())),
        "kfac": message(lambda: KFACOptimizer(tensor_parallel().parameters())),
        "private": message(lambda: DPOptimizer(torch.optim.SGD(tensor_parallel().parameters()))),
    }


QUANTITIES = ["default", "norm_test", "inner_product_test", "orthogonality_test", "grad_diversity"]
QUANTITIES += [
    "mean_gsnr",
    "early_stopping",
    "cabs",
    "ggn_trace_exact",
    "gradient_stats",
    "sparsity",
]
QUANTITIES += ["update_size", "distance", "alpha"]


class Net(pl.LightningModule):
    """A network that `ModelParallelStrategy` shards, or that one process trains."""

    def __init__(self, batch_norm=False):
        super().__init__()
        self.net = network()
        if batch_norm:  # samples meet: the noise comes from the gradients of the processes
            self.net.insert(1, nn.BatchNorm1d(6).double())

    def configure_model(self):
        if self.device_mesh is not None:
            by_layer(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Series(pl.Callback):
    """The values of every step."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, *_):
        metrics = trainer.callback_metrics.items()
        self.values.append({name: float(v) for name, v in metrics if "curvature" in name})


def trained(net, batches, accumulate=1, **settings):
    """The series and the parameters of a run, and what it warned of."""
    series = Series()
    alarms = [Alarm("grad_norm", above=1e9, action="skip"), "vanishing"]
    callback = CurvatureCallback(QUANTITIES, layers=True, mc_samples=0, strict=False, alarms=alarms)
    trainer = pl.Trainer(
        **QUIET,
        accumulate_grad_batches=accumulate,
        callbacks=[callback, series],
        **settings,
    )
    trainer.fit(net, DataLoader(batches, batch_size=None))
    return series.values, [whole(p.detach()).clone() for p in net.parameters()]


def lightning(batch_norm=False, accumulate=1):
    rank = dist.get_rank()
    strategy = ModelParallelStrategy(data_parallel_size=WORLD, tensor_parallel_size=1)
    return trained(
        Net(batch_norm),
        [batch(rank + WORLD * step) for step in range(STEPS)],
        accumulate,
        strategy=strategy,
        devices=WORLD,
        plugins=[TorchElasticEnvironment()],
    )


def union(world):
    """The same batches, those of all processes together."""
    steps = [[batch(rank + world * step) for rank in range(world)] for step in range(STEPS)]
    return [tuple(map(torch.cat, zip(*step))) for step in steps]


def with_replicas():
    """Four processes."""
    mesh = init_device_mesh("cpu", (4,))
    names = [name for name in SHARDED if "replicas" in name]
    return {
        "quantities": {name: quantities(name, mesh) for name in names},
        "accumulated": {"replicas": accumulated("replicas", mesh)},
    }


def with_parts():
    """Two processes."""
    mesh = init_device_mesh("cpu", (WORLD,))
    return {
        "refusals": refusals(),
        "quantities": {name: quantities(name, mesh) for name in SHARDED},
        "accumulated": {name: accumulated(name, mesh) for name in ACCUMULATED},
        "optimized": optimized(mesh),
        "kept": kept(mesh),
        "lightning": lightning(),
        "lightning, accumulated": lightning(accumulate=2),
        "lightning, parts": lightning(batch_norm=True),
    }
