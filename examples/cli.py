"""LightningCLI: the callback and the optimizer by name, from a YAML file or the command line.

    python examples/cli.py
    python examples/cli.py --optimizer.init_args.lr=0.05 --trainer.max_epochs=2
    python examples/cli.py --optimizer=lightning_curv.DiagGGNOptimizer

The settings are in `cli.yaml` beside this file; later arguments override it, `--print_config`
prints them all, and `--optimizer.help=lightning_curv.KFACOptimizer` prints the arguments of the
optimizer with their documentation. Needs `jsonargparse[signatures]`, which comes with the extra
"examples".
"""

import sys
from pathlib import Path

import pytorch_lightning as pl
import shared
from pytorch_lightning.cli import LightningCLI
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader


class Digits(pl.LightningModule):
    """A network with one hidden layer.

    Args:
        width: hidden units.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10)
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("test/accuracy", (self.net(x).argmax(1) == y).float().mean(), batch_size=len(y))


class Data(pl.LightningDataModule):
    """5,000 MNIST digits.

    Args:
        batch_size: samples per step.
    """

    def __init__(self, batch_size: int = 128) -> None:
        super().__init__()
        self.train, self.test = shared.loaders(batch_size)

    def train_dataloader(self) -> DataLoader:
        return self.train

    def val_dataloader(self) -> DataLoader:
        return self.test


def main() -> None:
    parser = shared.parser(__doc__)
    options, overrides = parser.parse_known_args()
    quick = ["--trainer.max_epochs=1"] if options.quick else []
    config = str(Path(__file__).with_name("cli.yaml"))
    sys.argv[1:] = ["fit", "--config", config, *quick, *overrides]
    cli = LightningCLI(Digits, Data, save_config_callback=None)

    history = cli.trainer.logger.series
    optimizer = type(cli.trainer.optimizers[0]).__name__
    print(f"{optimizer}: held-out accuracy {cli.trainer.callback_metrics['test/accuracy']:.1%}")
    names = "train/loss", "curvature/noise_scale", "curvature/norm_test", "curvature/ggn_trace"
    figure, axes = shared.plt.subplots(1, 4, figsize=(13, 3), layout="constrained")
    for axis, name in zip(axes, names):
        print(
            f"{name}: {history[name][1][0]:.3g} at the start, {history[name][1][-1]:.3g} at the end"
        )
        shared.draw(axis, history[name])
        axis.set(title=name, xlabel="step", yscale="log")
    shared.save(figure, options.out)


if __name__ == "__main__":
    main()
