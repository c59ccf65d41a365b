"""What two processes log of normalization layers, histograms and epochs, and one process on the union batch."""

from pathlib import Path

import pytorch_lightning as pl
import torch
from monitoring import CONSTANT, Net, data
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins.environments import TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader

from lightning_curv import CurvatureCallback

QUANTITIES = [
    "noise_scale_norm_layers",
    "grad_hist_1d",
    "grad_hist_2d",
    "gradient_stats",
    "sparsity",
]
SIZE = 12  # samples of all processes


class Normed(Net):
    def __init__(self):
        super().__init__()
        self.net.insert(1, nn.LayerNorm(6))
        self.net.append(nn.LayerNorm(3))


def run(folder, world, rank=0):
    """Train, and return what is logged in the end."""
    share = SIZE // world
    rows = [slice(start + share * rank, start + share * (rank + 1)) for start in range(0, 96, SIZE)]
    settings = {"logger": TensorBoardLogger(folder, name="", version=f"{world}")}
    if world > 1:
        settings["devices"] = world
        settings["strategy"] = DDPStrategy(
            cluster_environment=TorchElasticEnvironment(), process_group_backend="gloo"
        )
    trainer = pl.Trainer(
        callbacks=[CurvatureCallback(QUANTITIES, on_epoch=True)],
        max_epochs=1,
        accelerator="cpu",
        precision="64-true",
        log_every_n_steps=1,
        use_distributed_sampler=False,
        **CONSTANT,
        **settings,
    )
    batches = [tuple(t[mine] for t in data(96).tensors) for mine in rows]
    trainer.fit(Normed(), DataLoader(batches, batch_size=None))
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def work(rank, folder):
    torch.save(run(folder, 2, rank), Path(folder) / f"values-{rank}")
