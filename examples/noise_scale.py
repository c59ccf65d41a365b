"""Watch the gradient noise scale grow during training, and read off the batch size that it suggests.

    python examples/noise_scale.py

The noise scale is the number of samples at which the noise of a mini-batch gradient is as large as
the gradient. Far below it a batch twice as large saves almost half of the steps; far above it the
additional samples are wasted. Early in training all samples agree, and small batches do; later they
disagree. One callback logs it, on an ordinary module with an ordinary optimizer. TensorBoard shows
the same: `tensorboard --logdir lightning_logs`.
"""

import pytorch_lightning as pl
import shared
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_curv import CurvatureCallback
from lightning_curv.callbacks import plot_critical_batch_size


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 5, stride=2), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(32 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 10)),
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("test/accuracy", (self.net(x).argmax(1) == y).float().mean(), batch_size=len(y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def main() -> None:
    parser = shared.parser(__doc__)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--log-dir", default="lightning_logs")
    options = parser.parse_args()

    pl.seed_everything(0, verbose=False)
    train, test = shared.loaders(options.batch_size)
    history = shared.History()
    trainer = shared.trainer(
        max_epochs=1 if options.quick else 8,
        log_every_n_steps=4,
        callbacks=[CurvatureCallback(layout=True)],  # <- the only line that matters
        logger=[TensorBoardLogger(options.log_dir, name="noise_scale"), history],
    )
    trainer.fit(Digits(), train, test)

    steps, noise = history.series["curvature/noise_scale"]
    suggested = history.series["curvature/suggested_batch_size"][1]
    print("  step  noise scale  suggested batch size")
    for i in range(0, len(steps), max(1, len(steps) // 8)):
        print(f"{steps[i]:6d}{noise[i]:13.0f}{suggested[i]:22.0f}")
    print(f"held-out accuracy: {trainer.callback_metrics['test/accuracy']:.1%}")

    figure, (left, right) = shared.plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    shared.draw(left, history.series["train/loss"])
    left.set(title="training loss", xlabel="step", yscale="log")
    plot_critical_batch_size(dict(zip(steps, noise)), options.batch_size, right)
    shared.save(figure, options.out)


if __name__ == "__main__":
    main()
