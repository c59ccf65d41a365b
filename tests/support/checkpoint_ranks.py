"""Runs of processes that share parameters, which are saved and go on, in as many processes or others."""

from datetime import timedelta
from pathlib import Path

import pytorch_lightning as pl
import torch
from processes import QUIET, join, leave_group
from pytorch_lightning.plugins.environments import TorchElasticEnvironment
from pytorch_lightning.strategies import ModelParallelStrategy
from sharded_ranks import (
    WORLD,
    Net,
    Tied,
    batch,
    by_layer,
    message,
    network,
    replicas,
    with_parts,
    with_replicas,
)
from torch import distributed as dist
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_curv import (
    CurvatureCallback,
    DiagGGNOptimizer,
    DPOptimizer,
    KFACOptimizer,
    curvature,
)
from lightning_curv.distributed.shards import whole
from lightning_curv.optimizers import PoissonSampling, PrivacyAccountant
from lightning_curv.optimizers.packed_state import unpacked

WORLDS = (4, 1, WORLD, 3, 1)  # of rounds, one after the other
# How many processes save, and how many go on, in the same round or in a later one.
RESUMES = [(2, 2), (2, 3), (4, 2), (2, 1), (1, 2)]
BEFORE, AFTER = 4, 3  # steps


def kfac(params, **settings):
    return KFACOptimizer(params, curvature="exact", **settings)


# Measured and inverted in other steps than the one after which it is saved.
SELDOM = {"lr": 0.3, "damping": 0.01, "factor_interval": 3, "inverse_interval": 5}


def private(params, inner=None, **settings):
    return DPOptimizer(
        inner or torch.optim.Adam(params, lr=0.05),
        noise_multiplier=lambda step: 0.7 / (1 + step),
        expected_batch_size=8,
        noise_seed=3,
        exact_resume=True,
        accountant=PrivacyAccountant(PoissonSampling(0.1)),
        **settings,
    )


OPTIMIZERS = {
    "kfac": lambda params: kfac(params, **SELDOM, momentum=0.9, weight_decay=0.01),
    "found": kfac,
    "eigenbasis": lambda params: kfac(params, **SELDOM, eigen=True),
    "inverses": lambda params: kfac(params, **SELDOM, shard_inverses=True),
    "diagonal": lambda params: DiagGGNOptimizer(params, curvature="exact", interval=3),
    "groups": lambda params: kfac(
        [{"params": [p], "lr": 0.1 * (number + 1)} for number, p in enumerate(params)], damping=0.01
    ),
    "private": lambda params: private(params, clipping="adaptive"),
    "private descent": lambda params: private(params, torch.optim.SGD(params, lr=0.1)),
}
WAYS = ("itself", "by name", "whole")
NETWORKS = {"layers": network, "tied and frozen": Tied}
# Every change of the number of processes where it matters most how the state is kept: whole, by owner, in parts.
EVERYWHERE = [("layers", name) for name in ("kfac", "inverses", "private")]
OTHERS = [("layers", name) for name in OPTIMIZERS if ("layers", name) not in EVERYWHERE]
OTHERS += [("tied and frozen", "kfac"), ("tied and frozen", "private")]
RUNS = [*EVERYWHERE, *OTHERS]
CASES = [(*resume, *run, "by name") for run in EVERYWHERE for resume in RESUMES]
CASES += [(2, 3, *run, "by name") for run in OTHERS]
CASES += [(2, 3, *run, "whole") for run in RUNS if run[1] in ("kfac", "private", "private descent")]
# Adam has no state before its first step: from the optimizer itself torch loads none into a fresh one.
CASES += [(2, 3, *run, "itself") for run in RUNS if run[1] != "private"]


# Checkpoints of a Trainer, in parts or in one file.
FITS = [(2, after, "kfac", form) for after in (2, 3, 1) for form in ("parts", "one file")]
FITS += [(2, 3, "inverses", "parts"), (2, 3, "found", "one file")]


def sharded(kind):
    """A network of which every process has a part; of four two have the same."""
    world = dist.get_world_size()
    mesh = replicas() if world == 4 else init_device_mesh("cpu", (world,))
    shard = by_layer if kind == "layers" else fully_shard
    return shard(NETWORKS[kind](), mesh=mesh, reshard_after_forward=True)


def train(model, optimizer, batches):
    """Steps of a loop of one's own."""
    for x, y in batches:
        optimizer.zero_grad()
        wanted = getattr(optimizer, "required_extensions", lambda: optimizer.extensions)()
        with curvature(*wanted):
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()


def batches_of(rank, world, steps):
    return [batch(rank + world * step) for step in steps]


def union(world, steps):
    """The batches of all processes together."""
    return [
        tuple(map(torch.cat, zip(*(batch(r + world * s) for r in range(world))))) for s in steps
    ]


FIRST, LAST = range(BEFORE), range(BEFORE, BEFORE + AFTER)


def in_one_process(kind, name, before, after):
    """The parameters after a run that nothing interrupts, of one process that nothing is shared with."""
    model = NETWORKS[kind]()
    optimizer = OPTIMIZERS[name]([*model.parameters()])
    train(model, optimizer, union(before, FIRST) + union(after, LAST))
    return [p.detach() for p in model.parameters()]


FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def save(model, optimizer, way, path):
    path.mkdir(parents=True, exist_ok=True)
    if way == "itself":
        checkpoint.save({"model": model, "optimizer": optimizer}, checkpoint_id=path)
        return
    checkpoint.save({"model": model}, checkpoint_id=path)
    if way == "by name":
        state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        checkpoint.save(state, checkpoint_id=path / "optimizer")
        return
    state = get_optimizer_state_dict(model, optimizer, options=FULL)
    if dist.get_rank() == 0:
        torch.save(state, path / "optimizer.pt")
    dist.barrier()


def load(model, optimizer, way, path):
    if way == "itself":
        checkpoint.load({"model": model, "optimizer": optimizer}, checkpoint_id=path)
        return
    checkpoint.load({"model": model}, checkpoint_id=path)
    options = None
    if way == "by name":
        state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        checkpoint.load(state, checkpoint_id=path / "optimizer")
        state = state["optimizer"]
    else:
        is_first = dist.get_rank() == 0
        state = torch.load(path / "optimizer.pt") if is_first else {}
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(model, optimizer, state, options=options)


def begun(kind, name, path):
    """Save a run after its first steps."""
    model = sharded(kind)
    optimizer = OPTIMIZERS[name]([*model.parameters()])
    train(model, optimizer, batches_of(dist.get_rank(), dist.get_world_size(), FIRST))
    for way in WAYS:
        save(model, optimizer, way, path / way)


def gone_on(kind, name, way, path):
    """The parameters after the last steps of a run that was saved."""
    model = sharded(kind)
    optimizer = OPTIMIZERS[name]([*model.parameters()])
    load(model, optimizer, way, path / way)
    train(model, optimizer, batches_of(dist.get_rank(), dist.get_world_size(), LAST))
    return [whole(p.detach()).clone() for p in model.parameters()]


def loops(number, folder):
    """What the processes of a round do: save what nobody has begun with as many, go on with what is there."""
    world = dist.get_world_size()
    for before, kind, name in dict.fromkeys((b, kind, name) for b, _, kind, name, _ in CASES):
        if before == world and world not in WORLDS[:number]:
            begun(kind, name, folder / f"{before} {kind} {name}")
    dist.barrier()
    return {
        (before, after, kind, name, way): gone_on(
            kind, name, way, folder / f"{before} {kind} {name}"
        )
        for before, after, kind, name, way in CASES
        if after == world and before in WORLDS[: number + 1]
    }


class Run(Net):
    """Every step has its own batch, wherever the loader starts.

    Args:
        name: of the optimizer.
        together: in one process, how many processes have their batches together in a step.
    """

    def __init__(self, name, together=None):
        super().__init__()
        self.name, self.together = name, together

    def transfer_batch_to_device(self, *_):
        trainer, step = self.trainer, self.trainer.global_step
        if self.together is None:
            return batch(trainer.global_rank + trainer.world_size * step)
        return union(self.together(step), [step])[0]

    def configure_optimizers(self):
        return OPTIMIZERS[self.name]([*self.parameters()])


class Save(pl.Callback):
    """A checkpoint in the middle of a run."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == BEFORE:
            trainer.save_checkpoint(self.path)


def fit(net, callbacks=(), ckpt_path=None, **settings):
    """The parameters after a run, and how far they have come."""
    callback = CurvatureCallback(["grad_norm", "distance"])
    trainer = pl.Trainer(**QUIET, callbacks=[callback, *callbacks], **settings)
    trainer.fit(net, DataLoader(torch.zeros(BEFORE + AFTER)), ckpt_path=ckpt_path)
    parameters = [whole(p.detach()).clone() for p in net.parameters()]
    return parameters, float(trainer.callback_metrics["curvature/distance"])


def in_processes(form):
    """Arguments of a Trainer of as many processes as there are, and how it saves."""
    world = dist.get_world_size()
    strategy = ModelParallelStrategy(world, 1, save_distributed_checkpoint=form == "parts")
    return {"strategy": strategy, "devices": world, "plugins": [TorchElasticEnvironment()]}


def fits(number, folder):
    """Runs of a Trainer: begun in one round, ended in another."""
    world = dist.get_world_size()
    for before, name, form in dict.fromkeys((before, name, form) for before, _, name, form in FITS):
        if before == world and world not in WORLDS[:number]:
            save = Save(folder / f"fit {before} {name} {form}")
            fit(Run(name), [save], max_steps=BEFORE, **in_processes(form))
    return {
        (before, after, name, form): fit(
            Run(name), ckpt_path=folder / f"fit {before} {name} {form}", **in_processes(form)
        )
        for before, after, name, form in FITS
        if after == world and before in WORLDS[: number + 1]
    }


def parts(folder):
    """What is said where a part of the state is loaded, or of a form that has no place for it."""
    model, path = sharded("layers"), folder / f"{WORLD} layers private" / "itself"
    optimizer = OPTIMIZERS["private"]([*model.parameters()])
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    return {
        "moments": message(lambda: load(model, optimizer, "itself", path)),
        "flattened": message(lambda: get_optimizer_state_dict(model, optimizer, options=flat)),
    }


def trial():
    """What a private optimizer has counted behind the step that torch makes to see its state, and what it has made."""
    model = sharded("layers")
    before = [whole(p.detach()).clone() for p in model.parameters()]
    optimizer = private([*model.parameters()])
    noise = optimizer.state_dict()
    names = {
        name
        for state in get_optimizer_state_dict(model, optimizer)["state"].values()
        for name in state
    }
    spent = optimizer.steps, optimizer.accountant.history
    same_noise = all(
        torch.equal(a, b) for a, b in zip(_drawn(noise), _drawn(optimizer.state_dict()))
    )
    same = all(torch.equal(a, whole(b.detach())) for a, b in zip(before, model.parameters()))
    return names, spent, same_noise, same


def _drawn(state_dict):
    """The states of the generator of the noise."""
    _, values = unpacked(state_dict, "")
    return [value["noise"]["generator"] for value in values.values()]


def work(rank, folder, ports):
    folder = Path(folder)
    for number, (world, port) in enumerate(zip(WORLDS, ports)):
        if rank >= world:
            continue
        join(rank, world, port)
        dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(minutes=5))
        found = {"loops": loops(number, folder), "fits": fits(number, folder)}
        if world == 4:
            found |= with_replicas()
        if world == WORLD:
            found |= {**with_parts(), "parts": parts(folder), "trial": trial()}
        torch.save(found, folder / f"{number} {rank}.pt")
        dist.barrier()  # the first process has the store that all others still ask
        leave_group()
