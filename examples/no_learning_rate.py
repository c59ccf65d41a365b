"""Train a CNN by the directions of AdamW and of SGD without a learning rate, and see which rates were taken.

    python examples/no_learning_rate.py

`CurvatureStepSize` takes a direction from any optimizer and its length from the curvature along it,
measured on a part of the batch every few steps. A cosine schedule is a factor on what it finds. For
comparison the same directions with the rates that torch's documentation starts from.
"""

from collections.abc import Callable
from functools import partial

import pytorch_lightning as pl
import shared
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from lightning_curv import CurvatureCallback, CurvatureStepSize

Build = Callable[[object], Optimizer]


class Digits(pl.LightningModule):
    def __init__(self, optimizer: Build) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 8, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10)),
        )
        self.losses: list[float] = []
        self.rates: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.losses.append(loss.item())
        return loss

    def on_train_batch_end(self, *args: object) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        rate = optimizer.param_groups[0]["lr"]
        if isinstance(optimizer, CurvatureStepSize):  # there the group has the schedule alone
            rate *= optimizer.last_step["learning_rate"]
        self.rates.append(rate)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> dict:
        optimizer = self.optimizer(self.parameters())
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def found(build: Build, params: object) -> CurvatureStepSize:
    return CurvatureStepSize(build(params))


def main() -> None:
    options = shared.parser(__doc__).parse_args()
    sgd = partial(torch.optim.SGD, lr=1e-3, momentum=0.9)
    runs = {
        "AdamW, lr found": partial(found, torch.optim.AdamW),
        "AdamW, lr 0.001": torch.optim.AdamW,
        "SGD, lr found": partial(found, sgd),
        "SGD, lr 0.001": sgd,
    }
    train, test = shared.loaders(batch_size=64)
    figure, (losses, rates) = shared.plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for number, (name, optimizer) in enumerate(runs.items()):
        pl.seed_everything(0, verbose=False)
        model = Digits(optimizer)
        trainer = shared.trainer(
            max_steps=60 if options.quick else 310,
            max_epochs=-1,
            callbacks=[CurvatureCallback(every_n_steps=0)],  # supplies curvature, logs nothing
        )
        trainer.fit(model, train)
        [result] = trainer.test(model, test, verbose=False)
        middle = sorted(model.rates)[len(model.rates) // 2]
        print(
            f"{name}: training loss {sum(model.losses[-20:]) / 20:.3f}, "
            f"held-out accuracy {result['accuracy']:.1%}, median rate {middle:.2g}"
        )
        steps = list(range(len(model.losses)))
        shared.draw(losses, (steps, model.losses), f"C{number}", label=name)
        rates.plot(model.rates, color=f"C{number}", label=name)
    losses.set(title="training loss", xlabel="step", yscale="log")
    rates.set(title="learning rate, schedule included", xlabel="step", yscale="log")
    rates.set_ylim(bottom=1e-5)
    losses.legend()
    shared.save(figure, options.out)


if __name__ == "__main__":
    main()
