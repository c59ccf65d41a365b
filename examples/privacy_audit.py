"""Audit differentially private training: plant canaries in one run, look for them, and break the step on purpose.

    python examples/privacy_audit.py

Four runs train the same network on the digits of scikit-learn: one as it should be, three with a
fault that no log shows. The audit compares the ε that the canaries show with the ε that the
accountant claims.
"""

import warnings
from collections.abc import Callable

import pytorch_lightning as pl
import shared
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_curv import DPSGD, DPOptimizer, PrivacyCallback, privacy_audit
from lightning_curv.callbacks.private_training.poisson import PoissonBatchSampler
from lightning_curv.optimizers import PrivacyAudit


class Digits(pl.LightningModule):
    def __init__(self, spoil: Callable[[DPOptimizer], None] = lambda optimizer: None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 10))
        self.spoil = spoil

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> DPOptimizer:
        optimizer = DPSGD(self.parameters(), lr=0.5)
        self.spoil(optimizer)
        return optimizer


def less_noise(optimizer: DPOptimizer) -> None:
    draw = optimizer._noise.rounded
    optimizer._noise.rounded = lambda sizes, deviation: draw(sizes, deviation / 10)


def no_clipping(optimizer: DPOptimizer) -> None:
    factors = optimizer.clipping.factors
    optimizer.clipping.factors = lambda *arguments: torch.ones_like(factors(*arguments))


class TenTimesTooOften(PrivacyCallback):
    """Draws every sample ten times as often as it accounts for."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        sampler = self._current.sampler
        rate = 10 * sampler.sampling_rate
        sampler.batch = PoissonBatchSampler(sampler.population, rate, 1000).batch
        super().on_train_start(trainer, pl_module)


FAULTS = {
    "as it should be": (lambda optimizer: None, PrivacyCallback),
    "noise of a tenth": (less_noise, PrivacyCallback),
    "clipping forgotten": (no_clipping, PrivacyCallback),
    "samples drawn\n10 × as often": (lambda optimizer: None, TenTimesTooOften),
}


def audit(name: str, epsilon: float, epochs: int, canaries: int) -> PrivacyAudit:
    pl.seed_everything(0, verbose=False)
    spoil, callback = FAULTS[name]
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    loader = DataLoader(TensorDataset(images.float() / 16, labels), batch_size=90, shuffle=True)
    trainer = shared.trainer(max_epochs=epochs, callbacks=[callback(epsilon=epsilon, delta=1e-5)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return privacy_audit(trainer, Digits(spoil), loader, canaries=canaries, seed=0)


def draw(audits: dict[str, PrivacyAudit], out: shared.Path) -> None:
    figure, axes = shared.plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    right = next(iter(audits.values()))
    right.plot(axes[:2])
    shown, colors = zip(*((a.epsilon_lower, "C3" if a.refuted else "C0") for a in audits.values()))
    bars = axes[2].bar(list(audits), shown, color=colors)
    axes[2].bar_label(bars, fmt="%.2f")
    axes[2].axhline(right.epsilon, color="k", ls="--", label=f"ε claimed, {right.epsilon:.2f}")
    axes[2].axhline(
        right.largest, color="gray", ls=":", label=f"most that {right.canaries} canaries can show"
    )
    axes[2].set(
        ylabel="ε that the canaries show",
        title="The same audit of broken runs",
        ylim=(0, 1.25 * right.largest),
    )
    axes[2].tick_params(axis="x", labelsize=7)
    axes[2].legend(frameon=False, fontsize=8)
    shared.save(figure, out)


def main() -> None:
    parser = shared.parser(__doc__)
    parser.add_argument("--epsilon", type=float, default=2.0)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--canaries", type=int, default=2000)
    options = parser.parse_args()
    if options.quick:
        options.epochs, options.canaries = 1, 1000

    audits = {
        name: audit(name, options.epsilon, options.epochs, options.canaries) for name in FAULTS
    }
    for name, result in audits.items():
        print(f"{' '.join(name.split())}:\n{result}\n", flush=True)
    draw(audits, options.out)


if __name__ == "__main__":
    main()
