"""Private steps of processes that share the parameters of a model among each other."""

from datetime import timedelta
from pathlib import Path

import pytorch_lightning as pl
import torch
from processes import QUIET, join, leave_group
from pytorch_lightning.plugins.environments import TorchElasticEnvironment
from pytorch_lightning.strategies import ModelParallelStrategy
from sharded_ranks import SHARDED, by_layer, message, network, replicas
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_curv import BatchL2Grad, DPOptimizer, PrivacyCallback, curvature
from lightning_curv.distributed.shards import local, whole
from lightning_curv.optimizers import GradientCanaries, PoissonSampling, PrivacyAccountant

WORLDS = (4, 2)
# Samples of every process in every step: in one step nobody has any.
SIZES = [[5, 3, 2, 4], [0, 3, 1, 2], [0, 0, 0, 0], [2, 2, 0, 2]]
SETTINGS = {"clip_norm": 0.5, "noise_multiplier": 0.7, "expected_batch_size": 8, "noise_seed": 3}
CLIPPING = ["per_layer", "automatic", "adaptive", "per_group"]


def roots(mesh, whole=()):
    """Modules that are sharded each by itself, but for some, and no module around them."""
    model = network()
    for number in {0, 2, 4} - set(whole):
        fully_shard(model[number], mesh=mesh, reshard_after_forward=bool(number))
    return model


# How a model is sharded.
PRIVATE = {
    **{name: make for name, make in SHARDED.items() if "mixed" not in name and "some" not in name},
    "roots": roots,
    "roots, one layer whole": lambda mesh: roots(mesh, whole=[2]),
}


def batch(rank, step, size):
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(size, 4, dtype=torch.float64, generator=generator)
    return x, torch.randint(3, (size,), generator=generator)


def batches_of(rank):
    """Those of a process, step by step."""
    return [batch(rank, step, sizes[rank]) for step, sizes in enumerate(SIZES)]


def union(world):
    """Those of all processes together."""
    return [
        tuple(map(torch.cat, zip(*parts))) for parts in zip(*(batches_of(r) for r in range(world)))
    ]


def private(model, clipping="flat", **settings):
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == ndim], "clip_norm": norm}
        for ndim, norm in ((1, 0.3), (2, 0.4))
    ]
    params = groups if clipping == "per_group" else model.parameters()
    # One by one: lists of sharded and other parameters are beyond torch.
    inner = torch.optim.Adam(params, lr=0.05, foreach=False)
    return DPOptimizer(inner, clipping=clipping, **{**SETTINGS, **settings})


def standing_in(x, y):
    """The batch, or a sample that stands in where there is none, and which samples count."""
    if len(x):
        return x, y, None
    return x.new_ones(1, 4), y.new_zeros(1), torch.zeros(1, dtype=torch.bool)


def add(model, optimizer, x, y):
    """One backward pass."""
    x, y, counted = standing_in(x, y)
    with curvature(*optimizer.extensions):
        optimizer.counted = counted
        F.cross_entropy(model(x), y).backward()


def values(model):
    return [whole(p.detach()).clone() for p in model.parameters()]


def trained(model, batches, **settings):
    """The parameters, and the gradient of the last step."""
    optimizer = private(model, **settings)
    for x, y in batches:
        optimizer.zero_grad()
        add(model, optimizer, x, y)
        optimizer.step()
    grads = [whole(p.grad) for p in model.parameters() if p.grad is not None]
    return values(model), grads


def layered(mesh):
    return by_layer(network(), mesh=mesh, reshard_after_forward=True)


def accumulated(model, batches):
    """The parameters after steps of two passes each, and one of none, after a pass for validation."""
    optimizer = private(model)
    for step in range(2):
        optimizer.zero_grad()
        for part, (x, y) in enumerate(batches[2 * step : 2 * step + 2]):
            if hasattr(model, "set_requires_gradient_sync"):  # of which nothing depends here
                model.set_requires_gradient_sync(part == 1)
            add(model, optimizer, x, y)
        optimizer.step()
    with torch.no_grad():
        model(torch.ones(2, 4, dtype=torch.float64))
    optimizer.zero_grad()
    optimizer.step()
    optimizer.zero_grad()
    add(model, optimizer, *batches[0])
    optimizer.step()
    return values(model)


def identical(model):
    """Whether all that have a part of a parameter and of its gradient have the same one, bit for bit."""
    world, rank = dist.get_world_size(), dist.get_rank()
    for parameter in model.parameters():
        for tensor in (parameter, parameter.grad):
            parts = [None] * world
            dist.all_gather_object(parts, local(tensor.detach()).clone())
            # Replicas are the rows of the mesh.
            if not torch.equal(parts[rank], parts[(rank + world // 2) % world]):
                return False
    return True


def noise(mesh, steps=300):
    """What steps without a sample release, entry by entry, and the part of it in this process."""
    model = layered(mesh)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0),
        clip_norm=2.0,
        noise_multiplier=1.5,
        expected_batch_size=1.0,
    )
    released, parts = [], []
    for _ in range(steps):
        optimizer.step()
        grads = [p.grad for p in model.parameters()]
        released.append(torch.cat([whole(g).flatten() for g in grads]))
        parts.append(torch.cat([local(g).flatten() for g in grads]))
    return torch.stack(released), torch.stack(parts)


def ordinary(model, rank):
    """A backward pass that nobody clips."""
    x, y = batch(rank, 0, 3)
    F.cross_entropy(model(x), y).backward()


def attacks(mesh):
    """What is said where a raw gradient would reach the inner optimizer."""
    rank, found = dist.get_rank(), {}

    def begin():
        model = layered(mesh)
        return model, private(model)

    model, optimizer = begin()
    ordinary(model, rank)
    found["no private pass"] = message(optimizer.step)

    model, optimizer = begin()
    add(model, optimizer, *batch(rank, 0, 2))
    optimizer.step()
    ordinary(model, rank)  # FSDP adds it to what the step has released
    found["added to a release"] = message(optimizer.step)

    model, optimizer = begin()
    optimizer.step()
    with torch.no_grad():
        local(model[0].weight.grad).add_(1.0)
    found["added to a part"] = message(optimizer.step)

    return found


def attack_in_one_process(mesh):
    """The same, where a single process finds it: the last thing that processes do together."""
    model = layered(mesh)
    optimizer = private(model)
    optimizer.step()
    if dist.get_rank() == 0:
        local(model[0].weight.grad).add_(1.0)
    return message(optimizer.step)


def leftovers(mesh):
    """Gradients that a private pass leaves anywhere, and a step that ordinary passes came before."""
    rank, model = dist.get_rank(), layered(mesh)
    optimizer = private(model)
    add(model, optimizer, *batch(rank, 0, 3))
    own = [p for layer in model for g in _groups(layer) for p in g.fsdp_params]
    stored = [
        p.sharded_param.grad is not None
        or p._unsharded_param.grad is not None
        or p.unsharded_accumulated_grad is not None
        for p in own
    ]
    gathered = [g.is_unsharded for layer in model for g in _groups(layer)]
    optimizer.step()
    clean = [whole(p.grad) for p in model.parameters()]

    model = layered(mesh)
    optimizer = private(model)
    model.set_requires_gradient_sync(False)
    ordinary(model, rank)  # FSDP keeps it to itself
    model.set_requires_gradient_sync(True)
    add(model, optimizer, *batch(rank, 0, 3))
    optimizer.step()
    mixed = [whole(p.grad) for p in model.parameters()]
    return stored, gathered, clean, mixed


def _groups(layer):
    state = layer._get_fsdp_state() if hasattr(layer, "_get_fsdp_state") else None
    return [] if state is None else state._fsdp_param_groups


def bystander(mesh):
    """The gradient of a parameter that the private optimizer does not have, and of an input."""
    rank, model = dist.get_rank(), layered(mesh)
    optimizer = DPOptimizer(torch.optim.SGD(model[4].parameters(), lr=0.1), **SETTINGS)
    x, y = batch(rank, 0, 3)
    x.requires_grad_()
    add(model, optimizer, x, y)
    raw = model[4].weight.grad
    optimizer.step()
    return whole(model[0].weight.grad), x.grad, raw, whole(model[4].weight.grad)


def observed(model, rank):
    """A step beside whose pass another quantity is computed."""
    optimizer = private(model)
    x, y = batch(rank, 0, 3)
    with curvature(*optimizer.extensions, BatchL2Grad()):
        F.cross_entropy(model(x), y).backward()
    optimizer.step()
    return values(model), [p.batch_l2.clone() for p in model.parameters()]


def lone_sample(mesh):
    """The clipped gradient of the only sample, where the network runs in bfloat16."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = by_layer(network().float(), mesh=mesh, mp_policy=policy)
    optimizer = private(model, noise_multiplier=0.0, expected_batch_size=1.0, clip_norm=1e-3)
    x, y = batch(0, 0, 1)
    counted = torch.tensor([dist.get_rank() == 0])
    with curvature(*optimizer.extensions):
        optimizer.counted = counted
        F.cross_entropy(model(x.float()), y).backward()
    optimizer.step()
    return [whole(p.grad) for p in model.parameters()]


def refused_audit(mesh):
    optimizer = private(layered(mesh), accountant=PrivacyAccountant(PoissonSampling(1.0)))
    return message(lambda: GradientCanaries(optimizer, count=4))


def refused_mesh():
    """What is said of a mesh of two of four processes, in the constructor and of parameters that come later."""
    half = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))["a"]
    model, optimizer = fully_shard(network(), mesh=half), private(network())
    group = {"params": model.parameters()}
    later = message(lambda: optimizer.add_param_group(group))
    return [message(lambda: private(model)), later], len(optimizer.param_groups)


N = 24


def data():
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(N, 4, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(3, (N,), generator=generator))


class Net(pl.LightningModule):
    """A network that `ModelParallelStrategy` shards, or that one process trains."""

    def __init__(self, policy=None, **settings):
        super().__init__()
        self.net, self.policy = network(), policy
        self.settings = {"clip_norm": 0.5, "noise_multiplier": 0.7, "noise_seed": 4, **settings}

    def configure_model(self):
        if self.device_mesh is not None:
            settings = {} if self.policy is None else {"mp_policy": self.policy}
            by_layer(self.net, mesh=self.device_mesh["data_parallel"], **settings)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return DPOptimizer(torch.optim.Adam(self.parameters(), lr=0.05), **self.settings)


def fit(net, callback, batch_size, others=(), ckpt_path=None, **settings):
    callbacks = [callback, *others]
    trainer = pl.Trainer(**{**QUIET, "callbacks": callbacks, **settings})
    loader = DataLoader(data(), batch_size=batch_size, shuffle=True)
    trainer.fit(net, loader, ckpt_path=ckpt_path)
    return trainer


def in_processes(world, form="parts"):
    """Arguments of a Trainer of several processes that share parameters."""
    strategy = ModelParallelStrategy(
        data_parallel_size=world, tensor_parallel_size=1, save_distributed_checkpoint=FORMS[form]
    )
    return {"strategy": strategy, "devices": world, "plugins": [TorchElasticEnvironment()]}


RUNS = {"large": (4, 1), "small": (1, 1), "parts": (1, 2)}  # batch size, accumulated


def lightning(world, name, **settings):
    size, accumulate = RUNS[name]
    net, callback = Net(**settings), PrivacyCallback(seed=2)
    fit(net, callback, size, accumulate_grad_batches=accumulate, **in_processes(world))
    return values(net), callback.accountant.history


FORMS = {
    "parts": True,
    "one file": False,
}  # of a checkpoint, and whether Lightning calls it distributed


def resumed(folder, form):
    """The parameters and the account of a run of two fits, of which the second goes on from a checkpoint."""
    path, settings = Path(folder) / form, {"max_epochs": 1}
    for callback in (
        PrivacyCallback(seed=2, exact_resume=True),
        PrivacyCallback(exact_resume=True),
    ):
        net = Net()
        trainer = fit(net, callback, 4, **in_processes(2, form), **settings)
        if "ckpt_path" not in settings:
            trainer.save_checkpoint(path)
        settings = {"max_epochs": 2, "ckpt_path": path}
    return values(net), callback.accountant.history


class Writes(pl.Callback):
    """Writes into the weights, all or those that one process has, behind a step."""

    def __init__(self, part):
        self.part = part

    def on_train_batch_end(self, trainer, pl_module, *_):
        weight = pl_module.net[0].weight
        with torch.no_grad():
            local(weight).mul_(1.5) if self.part else weight.mul_(1.5)


def watched(world):
    """What is said where something else writes into sharded weights."""

    def run(net, *others):
        return message(lambda: fit(net, PrivacyCallback(seed=2), 4, others, **in_processes(world)))

    found = {part: run(Net(), Writes(part)) for part in (False, True)}
    half = Net(policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    return {**found, "half": run(half)}


def with_replicas(folder):
    """Four processes."""
    mesh, rank = init_device_mesh("cpu", (4,)), dist.get_rank()
    names = [name for name in PRIVATE if "replicas" in name] + ["layers"]
    model = by_layer(network(), mesh=replicas(), reshard_after_forward=True)
    steps = {(name, "flat"): trained(PRIVATE[name](mesh), batches_of(rank)) for name in names}
    trained(model, batches_of(rank))
    return {"steps": steps, "identical": identical(model), "refused mesh": refused_mesh()}


def with_parts(folder):
    """Two processes."""
    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    steps = {(name, "flat"): trained(PRIVATE[name](mesh), batches_of(rank)) for name in PRIVATE}
    steps |= {
        ("layers", rule): trained(layered(mesh), batches_of(rank), clipping=rule)
        for rule in CLIPPING
    }
    return {
        "steps": steps,
        "accumulated": {
            name: accumulated(PRIVATE[name](mesh), batches_of(rank)) for name in ("root", "layers")
        },
        "noise": noise(mesh),
        "attacks": attacks(mesh),
        "leftovers": leftovers(mesh),
        "bystander": bystander(mesh),
        "observed": observed(layered(mesh), rank),
        "lone sample": lone_sample(mesh),
        "audit": refused_audit(mesh),
        "lightning": {name: lightning(2, name) for name in RUNS},
        "resumed": {form: resumed(folder, form) for form in FORMS},
        "watched": watched(2),
    }


def work(rank, folder, ports):
    for world, port in zip(WORLDS, ports):
        if rank >= world:
            break
        join(rank, world, port)
        dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(minutes=2))
        found = with_parts(folder) if world == 2 else with_replicas(folder)
        dist.barrier()
        if world == 2:
            found["one process"] = attack_in_one_process(init_device_mesh("cpu", (2,)))
        torch.save(found, Path(folder) / f"{world} {rank}.pt")
        # The first process has the store that all others still ask.
        store = dist.distributed_c10d._get_default_store()
        store.set(f"done {rank}", "")
        store.wait([f"done {other}" for other in range(world)])
        leave_group()
