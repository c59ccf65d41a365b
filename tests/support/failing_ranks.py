"""Two processes, of which the second one fails and stays alive: what does the first one see?"""

import time
import warnings
from datetime import timedelta
from pathlib import Path

import pytorch_lightning as pl
import torch
from processes import QUIET, leave_group
from pytorch_lightning.plugins.environments import TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_curv import CurvatureCallback, KFACOptimizer, Variance, curvature
from lightning_curv.extensions import SumGradSquared
from lightning_curv.optimizers.curvature.kronecker import KroneckerCurvature

STEPS = 3


def out_of_memory(*args):
    raise torch.OutOfMemoryError("out of memory on purpose")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5).eval(), nn.Linear(5, 3))


def batch(rank):
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(6, 4, generator=generator), torch.arange(6) % 3


def loop(rank, watched=lambda rank, step: True, prepare=lambda model: None, extensions=()):
    """Steps of a loop of one's own; `watched` says who computes the curvature."""
    model = network()
    optimizer = KFACOptimizer(model.parameters(), lr=0.1, damping=0.1)
    x, y = batch(rank)
    for step in range(STEPS):
        if rank == 1 and step == 1:
            prepare(model)
        optimizer.zero_grad()
        wanted = (*optimizer.extensions, *extensions) if watched(rank, step) else ()
        with curvature(*wanted):
            F.cross_entropy(model(x), y).backward()
        optimizer.step()


def no_curvature(rank):
    loop(rank, watched=lambda rank, step: rank == 0 or step == 0)


def no_memory(rank):
    if rank == 1:
        KroneckerCurvature.measure = out_of_memory
    loop(rank)


def refusal(rank):
    loop(rank, prepare=lambda model: model.train(), extensions=[Variance()])


class Net(pl.LightningModule):
    def __init__(self, fails=False):
        super().__init__()
        self.net, self.fails = network(), fails

    def training_step(self, batch, batch_idx):
        if self.fails and self.global_rank == 1 and batch_idx == 1:
            raise ValueError("a mistake of the user")
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(net, callback):
    trainer = pl.Trainer(
        strategy=DDPStrategy(
            cluster_environment=TorchElasticEnvironment(), process_group_backend="gloo"
        ),
        devices=2,
        **QUIET,
        callbacks=[callback],
    )
    trainer.fit(net, DataLoader([batch(dist.get_rank())] * STEPS, batch_size=None))


def strict_quantity(rank):
    if rank == 1:
        SumGradSquared.evaluate = out_of_memory
    fit(Net(), CurvatureCallback(["mean_gsnr"]))


def mistake_of_the_user(rank):
    fit(Net(fails=True), CurvatureCallback())


def recovered(rank):
    """Both processes have caught an error of the same step; the second one is slow in all of it."""
    time.sleep(0.3 * rank)
    try:
        loop(rank, watched=lambda rank, step: False)
    except RuntimeError:
        if rank == 1:
            time.sleep(2.5)
    loop(rank)


# What fails; the error in the second process.
CASES = {
    "no_curvature": (no_curvature, "RuntimeError: KFACOptimizer needs new curvature for step 1"),
    "no_memory": (no_memory, "OutOfMemoryError: out of memory on purpose"),
    "refusal": (refusal, "UnsupportedError: Variance() needs samples that do not influence"),
    "strict_quantity": (strict_quantity, "OutOfMemoryError: out of memory on purpose"),
    "mistake_of_the_user": (mistake_of_the_user, "ValueError: a mistake of the user"),
    "recovered": (recovered, "no error"),
}


def seen(case, rank):
    """The error of this process, with what it warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            CASES[case][0](rank)
        except Exception as error:
            told = [str(w.message) for w in caught if "Expected process" in str(w.message)]
            return f"{type(error).__name__}: {error}", told
    return "no error", []


def work(rank, folder):
    ours = KroneckerCurvature.measure, SumGradSquared.evaluate
    for case in CASES:
        store = dist.FileStore(f"{folder}/store {case}", 2)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60)
        )
        torch.save(seen(case, rank), Path(folder) / f"{case} {rank}.pt")
        KroneckerCurvature.measure, SumGradSquared.evaluate = ours
        # Alive, so that no connection ends, until the other one knows: torch ends its wait here
        # only where it is in a collective of torch's own.
        end = time.monotonic() + (20 if case != "mistake_of_the_user" else 0)
        while not (Path(folder) / f"{case} {1 - rank}.pt").exists() and time.monotonic() < end:
            time.sleep(0.05)
        leave_group()
