"""A quantity of your own: how much the samples agree on the gradient of every weight, in one function.

    python examples/custom_extension.py

An extension is a function of a parameter's per-sample Jacobian; it then works for every layer that
there is. This one is ḡ² / (ḡ² + Var g), 1 where all samples agree and 1/N where they are mere
noise. A small callback collects it for the first layer, whose weights lie on the pixels, so that
agreement is a picture.
"""

import pytorch_lightning as pl
import shared
import torch
from matplotlib.colors import LogNorm
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_curv import CurvatureCallback, Extension
from lightning_curv.terms.jacobian import Jacobian


class Agreement(Extension):
    savefield = "agreement"

    def evaluate(self, jacobian: Jacobian) -> Tensor:
        signal = (jacobian.total()[0] / jacobian.samples).square()
        return signal / (signal + jacobian.variance()).clamp(min=1e-30)


class Collect(pl.Callback):
    """Keeps the mean over the units of the first layer, while it is on the parameter."""

    def __init__(self) -> None:
        self.pictures: list[Tensor] = []

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: object
    ) -> None:
        weight = pl_module.net[1].weight
        if hasattr(weight, "agreement"):
            self.pictures.append(weight.agreement.mean(0).view(28, 28))


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main() -> None:
    options = shared.parser(__doc__).parse_args()
    pl.seed_everything(0, verbose=False)
    collect = Collect()
    monitor = CurvatureCallback("grad_norm", every_n_steps=1, extensions=[Agreement()])
    trainer = shared.trainer(max_epochs=2 if options.quick else 16, callbacks=[monitor, collect])
    trainer.fit(Digits(), shared.loaders(batch_size=500)[0])

    phases = [2**i for i in range(7) if 2 ** (i + 1) <= len(collect.pictures)]
    figure, axes = shared.plt.subplots(
        1, len(phases), figsize=(2 * len(phases), 2.6), layout="constrained"
    )
    for axis, first in zip(axes, phases):
        mean = torch.stack(collect.pictures[first - 1 : 2 * first - 1]).mean(0)
        print(f"steps {first:3d} to {2 * first - 1:3d}: mean agreement {mean.mean():.4f}")
        image = axis.imshow(mean, norm=LogNorm(1 / 500, 0.04), cmap="viridis")
        axis.set(title=f"steps {first} to {2 * first - 1}", xticks=[], yticks=[])
        axis.grid(visible=False)
    figure.colorbar(image, ax=axes, shrink=0.8, label="agreement")
    shared.save(figure, options.out)


if __name__ == "__main__":
    main()
