"""One HTML page about a run: series, a map of the layers over the steps, findings in words.

    python examples/report.py

`report=` is all that it takes; the page holds everything it needs, so that it can be sent around.
With `--sigmoid` a deep network of saturating units is trained, and the page says why it does not
learn.
"""

import re
from pathlib import Path

import pytorch_lightning as pl
import shared
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_curv import CurvatureCallback


def convolutions() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 5, stride=2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def sigmoids() -> nn.Sequential:
    hidden = [layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.Sigmoid())]
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.Sigmoid(), *hidden, nn.Linear(64, 10))


class Digits(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def main() -> None:
    parser = shared.parser(__doc__)
    parser.set_defaults(out=Path("report.html"))
    parser.add_argument("--sigmoid", action="store_true", help="a network that does not learn")
    options = parser.parse_args()

    pl.seed_everything(0, verbose=False)
    train, _ = shared.loaders(batch_size=64)
    quantities = ["default", "update_size", "distance", "alpha", "norm_test"]
    trainer = shared.trainer(
        max_epochs=1 if options.quick else 8,
        log_every_n_steps=1 if options.quick else 2,
        callbacks=[CurvatureCallback(quantities, report=options.out)],  # <- the only line
    )
    trainer.fit(Digits(sigmoids() if options.sigmoid else convolutions()), train)

    for title in re.findall(r"<li class=[^>]*>.*?<h3>(.*?)</h3>", options.out.read_text()):
        print(f"finding: {title}")
    print(f"page: {options.out}")


if __name__ == "__main__":
    main()
