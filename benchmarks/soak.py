"""Do long runs leak memory or grow slow? Resident memory and process time over many steps.

    OMP_NUM_THREADS=1 python benchmarks/soak.py [--steps 10000] [--only callback]

A small perceptron is trained under a Trainer with the callback in every step, with `KFACOptimizer`, and privately.
After a tenth of the steps, in which caches fill, the slope of the resident memory is fitted by least squares, in MiB
per 1,000 steps, and the process time per step of the first and the last fifth of the rest is compared.
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_curv import CurvatureCallback, DPOptimizer, KFACOptimizer, PrivacyCallback

PAGE = 4096 / 2**20  # MiB
EVERY = 50  # steps between two looks


class Net(pl.LightningModule):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
        self.kind = kind

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        if self.kind == "KFAC":
            return KFACOptimizer(self.parameters())
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        if self.kind == "private":
            return DPOptimizer(optimizer, noise_multiplier=1.0)
        return optimizer


class Watch(pl.Callback):
    """Resident memory and process time of every `EVERY` steps."""

    def __init__(self) -> None:
        self.memory: list[float] = []
        self.seconds: list[float] = []
        self._last = time.process_time()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step % EVERY:
            return
        now = time.process_time()
        self.seconds.append((now - self._last) / EVERY)
        gc.collect()
        self.memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * PAGE)
        self._last = time.process_time()


CALLBACKS = {
    "callback": lambda: CurvatureCallback(every_n_steps=1),
    "KFAC": lambda: CurvatureCallback(every_n_steps=0),
    "private": lambda: PrivacyCallback(delta=1e-5),
}


def run(kind: str, steps: int) -> Watch:
    x = torch.randn(512, 16, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(x, (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long())
    watch = Watch()
    trainer = pl.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[CALLBACKS[kind](), watch],
    )
    trainer.fit(Net(kind), DataLoader(data, batch_size=32))
    return watch


def row(kind: str, watch: Watch) -> Iterable[str]:
    start = len(watch.memory) // 10
    memory, seconds = watch.memory[start:], watch.seconds[start:]
    slope = np.polyfit(EVERY * np.arange(len(memory)), memory, 1)[0] * 1000
    part = max(1, len(seconds) // 5)
    first, last = (1e3 * statistics.median(s) for s in (seconds[:part], seconds[-part:]))
    return f"{kind:10}", f"{slope:10.3f}", f"{first:8.2f}", f"{last:8.2f}", f"{last / first:8.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--only", nargs="+", choices=CALLBACKS, default=[*CALLBACKS])
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    print(f"{arguments.steps} steps: MiB per 1,000 steps, ms per step first and last, their ratio")
    for kind in arguments.only:
        print(*row(kind, run(kind, arguments.steps)), flush=True)


if __name__ == "__main__":
    main()
