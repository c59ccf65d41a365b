"""Train the deep autoencoder of Hinton & Salakhutdinov with KFAC, without a learning rate, and with Adam.

    python examples/autoencoder.py

784-1000-500-250-30 and back on 5,000 digits, a classic of second-order optimization. KFAC chooses
learning rate, momentum and damping itself; Adam has a tuned learning rate and cosine decay.
`--quick` takes a smaller network and the digits of scikit-learn.
"""

import time
from collections.abc import Callable
from itertools import pairwise

import pytorch_lightning as pl
import shared
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_curv import CurvatureCallback, KFACOptimizer


def autoencoder(*sizes: int) -> nn.Sequential:
    """An encoder with tanh and linear code, and its mirror image."""
    widths = sizes + sizes[-2::-1]
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        linear = nn.Linear(fan_in, fan_out)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Identity() if fan_out == sizes[-1] else nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class Autoencoder(pl.LightningModule):
    def __init__(self, net: nn.Module, optimizer: Callable[[object], object]) -> None:
        super().__init__()
        self.net, self.optimizer = net, optimizer
        self.started, self.curve = time.process_time(), []

    def loss(self, images: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(self.net(images), images, reduction="sum") / len(
            images
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (images,) = batch
        optimizer = self.optimizers(use_pl_optimizer=False)
        if isinstance(
            optimizer, KFACOptimizer
        ):  # optional: the damping adapts to how well the loss was predicted
            optimizer.loss_fn = lambda: self.loss(images)
        return self.loss(images)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        (images,) = batch
        error = float((self.net(images).sigmoid() - images).square().sum(1).mean())
        self.curve.append((self.global_step, time.process_time() - self.started, error))

    def configure_optimizers(self) -> object:
        return self.optimizer(self)


def kfac(module: pl.LightningModule) -> KFACOptimizer:
    return KFACOptimizer(module.parameters())


def adam(module: pl.LightningModule) -> dict:
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, module.trainer.max_steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def images(quick: bool) -> Tensor:
    """Images [N, pixels] with values in [0, 1]."""
    if quick:
        from sklearn.datasets import load_digits

        return torch.tensor(load_digits().data / 16, dtype=torch.float32)
    x = torch.cat([part.tensors[0] for part in shared.digits()]).flatten(1)
    return (x * 0.3081 + 0.1307).clamp(0, 1)


def main() -> None:
    options = shared.parser(__doc__).parse_args()
    torch.set_flush_denormal(True)
    data = images(options.quick)
    sizes, batch_size = (
        ((64, 128, 64, 32, 8), 256) if options.quick else ((784, 1000, 500, 250, 30), 500)
    )
    runs = {
        "KFAC": (kfac, 80 if options.quick else 200),
        "Adam": (adam, 80 if options.quick else 1000),
    }

    figure, (by_step, by_time, pictures) = shared.plt.subplots(
        1, 3, figsize=(12, 3.6), layout="constrained"
    )
    rows = [data[:8]]
    for name, (optimizer, steps) in runs.items():
        pl.seed_everything(0, verbose=False)
        model = Autoencoder(autoencoder(*sizes), optimizer)
        trainer = shared.trainer(
            max_steps=steps,
            max_epochs=-1,
            val_check_interval=10,
            check_val_every_n_epoch=None,
            callbacks=[CurvatureCallback(every_n_steps=0)],  # supplies KFAC, logs nothing
        )
        batches = DataLoader(TensorDataset(data), batch_size, shuffle=True, drop_last=True)
        trainer.fit(model, batches, DataLoader(TensorDataset(data), len(data)))
        at_step, seconds, errors = zip(*model.curve)
        print(
            f"{name}: squared error per image {errors[-1]:.3f} after {steps} steps, {seconds[-1]:.0f} CPU s"
        )
        by_step.semilogy(at_step, errors, lw=2, label=name)
        by_time.semilogy(seconds, errors, lw=2, label=name)
        rows.append(model.net(data[:8]).sigmoid().detach())

    by_step.set(title="squared error per image", xlabel="step")
    by_time.set(title="the same", xlabel="CPU seconds")
    by_step.legend()
    side = int(data.shape[1] ** 0.5)
    pictures.imshow(
        torch.stack(rows).view(3, 8, side, side).transpose(1, 2).reshape(3 * side, -1),
        cmap="gray_r",
    )
    pictures.set(title="digits, and what is left of them", xticks=[])
    pictures.set_yticks([side * (i + 0.5) for i in range(3)], ["data", *runs])
    pictures.grid(visible=False)
    shared.save(figure, options.out)


if __name__ == "__main__":
    main()
