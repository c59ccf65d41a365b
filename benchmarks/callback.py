"""Cost of `CurvatureCallback`: process time of a training step with and without it, on one thread.

    OMP_NUM_THREADS=1 python benchmarks/callback.py [--rounds 20] [--quantities norm_test
    hessian_trace]

The settings take turns in one run, so that load from outside meets all of them. A turn is one step
that still has work of the setting before it (TensorBoard's thread) and is left out, and as many as
write to TensorBoard together, whose mean counts relative to that of the plain turn next to it; the
table shows medians over the rounds. A step is everything from the start of one batch to the start
of the next: forward and backward pass, Adam, Lightning's loop and TensorBoard. Columns: a step
without callback; relative to it one with an idle callback, the mean step where every one logs the
default quantities (past the start, where every tenth has the GGN trace), and where every 50th does;
one that logs all default quantities, the trace included; then further quantities, each alone.
"""

import argparse
import logging
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence

import pytorch_lightning as pl
import torch
from measure import keep_freed_memory
from networks import NETWORKS
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_curv import CurvatureCallback
from lightning_curv.callbacks.monitoring.publish import HELD
from lightning_curv.callbacks.monitoring.quantities import DEFAULT, SPACING

NETS = {
    f"{NETWORKS[name].title}, N = {NETWORKS[name].samples}": NETWORKS[name]
    for name in ("mlp", "3c3d", "transformer")
}
TURN = 1 + HELD


class Model(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Turns(pl.Callback):
    """Gives the steps of one run the settings in turn, and measures them: no callback, an idle one, the callbacks."""

    def __init__(self, settings: Sequence[Sequence[CurvatureCallback]]) -> None:
        self.settings = settings
        self.times: list[list[float]] = [[] for _ in settings]
        self.start, self.step = 0.0, 0

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        now = time.process_time()
        turn, place = divmod(self.step, TURN)
        if place == 0 and turn > 3 * len(self.settings):  # warm
            self.times[(turn - 1) % len(self.settings)].append((now - self.start) / HELD)
        trainer.callbacks[1:] = self.settings[turn % len(self.settings)]  # read after this one
        self.step += 1
        if place == 1:
            self.start = time.process_time()


def measure(name: str, settings: Sequence[Sequence[CurvatureCallback]], rounds: int) -> list[float]:
    """Median seconds of a step of the first setting, then the others relative to it, medians over the rounds."""
    torch.manual_seed(0)
    turns = Turns(settings)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            callbacks=[turns],
            logger=TensorBoardLogger(folder),
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        model, batch = Model(NETS[name].build(nn.ReLU)), NETS[name].data(NETS[name].samples)
        for callbacks in settings:
            for callback in callbacks:
                callback.on_fit_start(trainer, model)
        trainer.fit(
            model, DataLoader([batch] * ((rounds + 4) * len(settings) * TURN), batch_size=None)
        )
    plain, *others = turns.times
    ratios = [[time / base for time, base in zip(times, plain)] for times in others]
    return [statistics.median(values) for values in (plain, *ratios)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--quantities", nargs="*", default=[], help="each alone, beside the default"
    )
    parser.add_argument("--nets", default="", help="regular expression")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # the batch is always the same: gradients vanish
    keep_freed_memory()
    print(
        f"{'':48} {'plain':>9} {'idle':>6} {'every':>6} {'at 50':>6} {'whole':>6} "
        + " ".join(arguments.quantities)
    )
    for name in NETS:
        if not re.search(arguments.nets, name):
            continue
        often = [quantity for quantity in DEFAULT if quantity not in SPACING]
        callbacks = [
            [CurvatureCallback(names, every_n_steps=1)]
            for names in (often, DEFAULT, *arguments.quantities)
        ]
        plain, idle, *ratios = measure(
            name, [[], [CurvatureCallback(every_n_steps=0)], *callbacks], arguments.rounds
        )
        every, sparse = 0.9 * ratios[0] + 0.1 * ratios[1], (49 * idle + ratios[1]) / 50
        print(
            f"{name:48} {1e3 * plain:6.1f} ms {idle:6.3f} {every:6.2f} {sparse:6.3f} {ratios[1]:6.2f} "
            + " ".join(
                f"{ratio:{len(q)}.2f}"
                for q, ratio in zip(arguments.quantities, ratios[2:], strict=True)
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
