"""Two processes with alarms: gradients are averaged, so that one process' loss sets off the alarms of both."""

from pathlib import Path

import torch
from monitoring import CONSTANT, Net, data
from pytorch_lightning import Trainer
from pytorch_lightning.plugins.environments import TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy
from torch import distributed as dist
from torch.utils.data import DataLoader

from lightning_curv import CurvatureCallback
from lightning_curv.callbacks import Alarm


class Spike(Net):
    """The loss of the second process is huge in its third step."""

    def training_step(self, batch, batch_idx):
        spike = 1e6 if (batch_idx, self.global_rank) == (2, 1) else 1.0
        return spike * super().training_step(batch, batch_idx)


def only_first(alarm, value, average=1.0):
    """Rounding, as it were: only the first process finds the alarm's bound crossed, in the second step."""
    only_first.calls += 1
    return dist.get_rank() == 0 and only_first.calls == 2


def run(action, alone):
    callback = CurvatureCallback(
        ["grad_norm"], alarms=[Alarm("grad_norm", above=1e3, action=action)]
    )
    strategy = DDPStrategy(
        cluster_environment=TorchElasticEnvironment(), process_group_backend="gloo"
    )
    trainer = Trainer(
        callbacks=[callback],
        max_epochs=1,
        accelerator="cpu",
        precision="64-true",
        devices=2,
        strategy=strategy,
        logger=False,
        log_every_n_steps=1,
        **CONSTANT,
    )  # fmt: skip
    only_first.calls, exceeded = 0, Alarm.exceeded
    if alone:
        Alarm.exceeded = only_first
    net = Spike() if not alone else Net()
    trainer.fit(net, DataLoader(data(40), batch_size=4))
    Alarm.exceeded = exceeded
    return {
        "steps": [raised.step for raised in callback.raised],
        "done": trainer.global_step,
        "parameters": [p.detach().clone() for p in net.parameters()],
    }


RUNS = [(action, alone) for action in ("warn", "skip", "stop") for alone in (False, True)]


def work(rank, folder):
    for action, alone in RUNS:
        torch.save(run(action, alone), Path(folder) / f"{rank}-{action}-{alone}")
