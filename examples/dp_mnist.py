"""Train a small CNN on real digits with differential privacy, and see what a stricter guarantee costs in accuracy.

    python examples/dp_mnist.py

The model, its training step and the DataLoader are plain Lightning; the two lines that matter are
marked. The digits are scaled by constants that are not taken from the data.
"""

import pytorch_lightning as pl
import shared
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_curv import DPOptimizer, PrivacyCallback


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


def train(epsilon: float, delta: float, epochs: int, batch_size: int) -> tuple[float, float]:
    """Held-out accuracy and the ε spent."""
    pl.seed_everything(0, verbose=False)
    privacy = PrivacyCallback(epsilon=epsilon, delta=delta)  # <- two
    trainer = shared.trainer(max_epochs=epochs, callbacks=[privacy], check_val_every_n_epoch=epochs)
    trainer.fit(Digits(), *shared.loaders(batch_size))
    return float(trainer.callback_metrics["accuracy"]), privacy.accountant.epsilon(delta)


def main() -> None:
    parser = shared.parser(__doc__)
    parser.add_argument("--epsilon", type=float, nargs="+", default=[0.5, 1.0, 2.0, 3.0, 8.0])
    parser.add_argument("--delta", type=float, default=1e-4)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=256)
    options = parser.parse_args()
    if options.quick:
        options.epsilon, options.epochs = [3.0, 8.0], 2

    spent, accuracies = [], []
    for epsilon in options.epsilon:
        accuracy, used = train(epsilon, options.delta, options.epochs, options.batch_size)
        spent.append(used)
        accuracies.append(100 * accuracy)
        print(
            f"held-out accuracy {100 * accuracy:.1f}% at ε = {used:.2f}, δ = {options.delta:g}",
            flush=True,
        )
    figure, axes = shared.plt.subplots(figsize=(5, 3.2), layout="constrained")
    axes.plot(spent, accuracies, "o-")
    axes.set(
        xlabel=f"ε (δ = {options.delta:g})",
        ylabel="held-out accuracy [%]",
        title="4,000 digits, DP-SGD",
    )
    shared.save(figure, options.out)


if __name__ == "__main__":
    main()
