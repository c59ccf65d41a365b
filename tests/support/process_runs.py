"""Training runs in three processes, then in two: one spawn for all of them.

Every process writes what it saw to a file; the tests compare it with a run of one process on the
union batch.
"""

from datetime import timedelta
from pathlib import Path

import pytorch_lightning as pl
import torch
from processes import QUIET, join, leave_group
from pytorch_lightning.plugins.environments import TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy
from torch import distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_curv import CurvatureCallback, CurvatureStepSize, DiagGGNOptimizer, KFACOptimizer
from lightning_curv.extensions import SumGradSquared
from lightning_curv.optimizers.curvature.kronecker import KroneckerCurvature
from lightning_curv.passes import randomness

STEPS, SIZE = 4, 4  # optimizer steps, samples per process and micro-batch
EXACT = [
    "default",
    "norm_test",
    "inner_product_test",
    "orthogonality_test",
    "grad_diversity",
    "mean_gsnr",
]
SAMPLED = ["ggn_trace", "tic_trace", "tic_diag"]
EXACT += ["early_stopping", "cabs", "ggn_trace_exact", "update_size", "distance", "alpha"]


def sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def kfac(params, **settings):
    return KFACOptimizer(params, lr=0.3, damping=0.01, curvature="exact", **settings)


def sharded(params):
    return kfac(params, shard_inverses=True, inverse_interval=2)


def auto(params):
    return KFACOptimizer(params, curvature="exact")


def eigen(params):
    return kfac(params, eigen=True, inverse_interval=2)


def diag_ggn(params):
    return DiagGGNOptimizer(params, curvature="exact")


def step_size(params):
    return CurvatureStepSize(torch.optim.AdamW(params), interval=2, curvature="exact")


class Net(pl.LightningModule):
    """A classifier; with `branch`, a layer that only batches with a positive first entry use."""

    def __init__(self, optimizer=sgd, branch=False):
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        self.branch = nn.Linear(4, 3).double() if branch else None
        self.optimizer, self.losses = optimizer, []

    def training_step(self, batch, batch_idx):
        x, y = batch
        output = self.net(x)
        if self.branch is not None and self.uses_branch(batch_idx):
            output = output + self.branch(x)
        return F.cross_entropy(output, y)

    def uses_branch(self, batch_idx):
        return (batch_idx + self.global_rank) % 2 == 0

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


class Watch(pl.Callback):
    """Values, parameters and factors of every step, and the collectives in it."""

    def __init__(self, compressed=False):
        self.compressed = compressed
        self.values, self.parameters, self.collectives, self.curvature = [], [], [], []
        self.subsets = []
        self.count, self.inverted, self.memory = 0, [], []

    def on_train_start(self, trainer, *args):
        # Lightning registers them on GPUs only.
        if self.compressed:
            state = PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2)
            trainer.strategy.model.register_comm_hook(state, powerSGD_hook)

    def on_train_batch_start(self, *args):
        self.original = dist.all_reduce
        dist.all_reduce = self.counting
        self.inverse, self.subset = KroneckerCurvature.inverted, randomness.random_subset
        randomness.random_subset = self.choosing
        KroneckerCurvature.inverted = self.inverting

    def counting(self, *args, **kwargs):
        self.count += 1
        return self.original(*args, **kwargs)

    @property
    def inverting(self):
        """A function, which becomes a method of the curvature's class."""

        def inverted(curvature, due, *readings):
            self.inverted.extend(due)
            return self.inverse(curvature, due, *readings)

        return inverted

    def choosing(self, *args):
        self.subsets.append(self.subset(*args))
        return self.subsets[-1]

    def on_exception(self, *args):
        self.restore()

    def restore(self):
        if not hasattr(self, "original"):
            return  # no batch has begun
        dist.all_reduce = self.original
        KroneckerCurvature.inverted, randomness.random_subset = self.inverse, self.subset

    def on_train_batch_end(self, trainer, module, *args):
        self.restore()
        if trainer.fit_loop._should_accumulate():
            return
        self.collectives.append(self.count)
        self.count = 0
        logged = {
            name: float(v)
            for name, v in trainer.callback_metrics.items()
            if name.startswith("curvature")
        }
        self.values.append(logged)
        self.parameters.append([p.detach().clone() for p in module.parameters()])
        self.curvature.append(
            [value for state in trainer.optimizers[0].state.values() for value in curvature(state)]
        )


def curvature(state):
    """Factors and inverses, or the diagonal."""
    found = [*state.get("factors", []), *state.get("inverses", []), *state.get("basis", [])]
    return [
        tensor.clone()
        for tensor in (*found, *(state[k] for k in ("diagonal", "moments") if k in state))
    ]


def batches(world, accumulate):
    """Per step and micro-batch one batch for each process."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(STEPS * accumulate, world, SIZE, 4, dtype=torch.float64, generator=generator)
    return x, (x[..., 0] > 0).long() + (x[..., 1] > 1).long()


def trained(net, loader, callback, compressed=False, **settings):
    watch = Watch(compressed)
    trainer = pl.Trainer(
        **QUIET,
        callbacks=[watch] if callback is None else [callback, watch],
        **settings,
    )
    trainer.fit(net, DataLoader(loader, batch_size=None))
    return {
        "values": watch.values,
        "parameters": watch.parameters,
        "collectives": watch.collectives,
    } | {
        "curvature": watch.curvature,
        "inverted": len(watch.inverted),
        "subsets": watch.subsets,
    }


# name: settings of the network, of the strategy, micro-batches per step
RUNS = {
    "plain": ({}, {}, 1),
    "accumulate": ({}, {}, 2),
    "static_graph": ({}, {"static_graph": True}, 1),
    "failing": ({}, {}, 1),
    "compressed": ({}, {}, 1),
    "find_unused": ({}, {"find_unused_parameters": True}, 1),
    "branch": ({"branch": True}, {"find_unused_parameters": True}, 1),
    "kfac": ({"optimizer": kfac}, {}, 1),
    "auto": ({"optimizer": auto}, {}, 1),
    "kfac_accumulate": ({"optimizer": kfac}, {}, 2),
    "sharded": ({"optimizer": sharded}, {}, 1),
    "eigen": ({"optimizer": eigen}, {}, 1),
    "diag_ggn": ({"optimizer": diag_ggn}, {}, 1),
    "kfac_static_graph": ({"optimizer": kfac}, {"static_graph": True}, 1),
    "step_size": ({"optimizer": step_size}, {}, 2),
    "some_samples": ({}, {}, 2),
    "monte_carlo": ({}, {}, 1),
}
IN_TWO = (
    "plain",
    "static_graph",
    "branch",
    "failing",
    "kfac",
    "sharded",
    "step_size",
    "some_samples",
    "monte_carlo",
)
CASES = [(3, name) for name in RUNS if name != "monte_carlo"] + [(2, name) for name in IN_TWO]


def monitor(name):
    if name == "monte_carlo":
        return CurvatureCallback(SAMPLED, mc_samples=200)
    if name == "some_samples":
        return CurvatureCallback(EXACT, layers=True, mc_samples=0, max_samples=2)
    return CurvatureCallback(EXACT, layers=True, mc_samples=0, strict=name != "failing")


def fail(self, jacobian):
    raise torch.OutOfMemoryError("out of memory on purpose")


def run(name, monitored=True):
    """One run in this process group."""
    network, strategy, accumulate = RUNS[name]
    rank, world = dist.get_rank(), dist.get_world_size()
    x, y = batches(world, accumulate)
    callback = monitor(name) if monitored else CurvatureCallback(every_n_steps=0)
    return trained(
        Net(**network),
        [(x[i, rank], y[i, rank]) for i in range(len(x))],
        callback,
        compressed=name == "compressed",
        strategy=DDPStrategy(
            cluster_environment=TorchElasticEnvironment(), process_group_backend="gloo", **strategy
        ),
        devices=world,
        accumulate_grad_batches=accumulate,
    )


def run_alone(name, world):
    """The same in one process, on the union batch."""
    network, _, accumulate = RUNS[name]
    x, y = (t.flatten(1, 2) for t in batches(world, accumulate))
    return trained(
        Net(**network),
        list(zip(x, y)),
        monitor(name),
        devices=1,
        accumulate_grad_batches=accumulate,
    )


WORLDS = (3, 2)


def work(rank, folder, ports):
    for world, port in zip(WORLDS, ports):
        if rank >= world:
            break
        join(rank, world, port)
        dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=300))
        evaluate = SumGradSquared.evaluate
        for name in (name for size, name in CASES if size == world):
            for monitored in (True, False):
                SumGradSquared.evaluate = fail if (name, rank) == ("failing", 1) else evaluate
                torch.save(
                    run(name, monitored), Path(folder) / f"{world}-{rank}-{name}-{monitored}"
                )
        leave_group()
