"""Cost of a private step against the plain step of the same inner optimizer: time of one thread, and peak memory.

    OMP_NUM_THREADS=1 python benchmarks/privacy.py [--repeats 9] [--no-opacus] [--only CNN]

Opacus' two modes are measured beside it where it is installed. How time and memory are measured:
`measure.py`. What a step frees is kept for the next one: see `keep_freed_memory`.
"""

import argparse
import copy
import statistics
import warnings
from collections.abc import Callable

import torch
from measure import Contender, compare, keep_freed_memory
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_curv import curvature
from lightning_curv.optimizers import DPOptimizer

warnings.filterwarnings("ignore")


class Tokens(nn.Module):
    """Two layers on T = 32 tokens of width 256, mean over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 256)
        self.net = nn.Sequential(
            nn.Linear(256, 256), nn.ReLU(), nn.LayerNorm(256), nn.Linear(256, 256), nn.ReLU()
        )
        self.head = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(self.embedding(x)).mean(1))


class Transformer(nn.Module):
    """Two encoder layers on T = 128 tokens of width 128, mean over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 128)
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(x)).mean(1))


class Recurrent(nn.Module):
    """An LSTM of width 128 on T = 50 steps."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.LSTM(64, 128, batch_first=True), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x)[0][:, -1])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 10),
    )


WORKLOADS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], float]] = {
    "MLP 784-512-10, batch 256": (mlp, lambda: torch.randn(256, 1, 28, 28), 1.5),
    "tokens T=32 d=256, batch 64": (Tokens, lambda: torch.randint(1000, (64, 32)), 1.34),
    "CNN 16-32-fc, batch 256": (cnn, lambda: torch.randn(256, 1, 28, 28), 1.3),
    "transformer T=128 d=128, batch 32": (Transformer, lambda: torch.randint(1000, (32, 128)), 1.5),
    "LSTM T=50 d=128, batch 64": (Recurrent, lambda: torch.randn(64, 50, 64), 3.0),
}


def plain(model: nn.Module, X: Tensor, y: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(X), y).backward()
        optimizer.step()

    return step


def private(model: nn.Module, X: Tensor, y: Tensor) -> Callable[[], None]:
    inner = torch.optim.SGD(model.parameters(), lr=1e-3)
    optimizer = DPOptimizer(inner, clip_norm=1.0, noise_multiplier=1.0, expected_batch_size=len(X))

    def step() -> None:
        optimizer.zero_grad()
        with curvature(*optimizer.extensions, batch_size=len(X)):
            F.cross_entropy(model(X), y).backward()
        optimizer.step()

    return step


def opacus(model: nn.Module, X: Tensor, y: Tensor, mode: str) -> Callable[[], None]:
    from opacus import PrivacyEngine

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, y), batch_size=len(X))
    made = PrivacyEngine(accountant="rdp").make_private(
        module=model,
        optimizer=optimizer,
        criterion=nn.CrossEntropyLoss(),
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode=mode,
    )
    wrapped, optimizer, criterion = (
        made[0],
        made[1],
        made[2] if len(made) == 4 else nn.CrossEntropyLoss(),
    )

    def step() -> None:
        optimizer.zero_grad()
        criterion(wrapped(X), y).backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--no-opacus", action="store_true")
    parser.add_argument("--only", default="", help="part of the name of a workload")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    keep_freed_memory()
    for name, (make, draw, allowed) in WORKLOADS.items():
        if arguments.only not in name:
            continue
        torch.manual_seed(0)
        model, X = make(), draw()
        y = torch.randint(10, (len(X),))
        steps = {
            "plain": plain(copy.deepcopy(model), X, y),
            "private": private(copy.deepcopy(model), X, y),
        }
        for mode in () if arguments.no_opacus else ("hooks", "ghost"):
            try:
                steps[f"opacus {mode}"] = opacus(copy.deepcopy(model), X, y, mode)
            except ImportError:
                print("opacus is not installed")
            except ValueError as error:  # modules that it has no gradients for
                print(f"opacus {mode}: {str(error).splitlines()[0][:100]}")
        contenders = {key: Contender(step, lambda: None) for key, step in steps.items()}
        compare(contenders, arguments.repeats, limit=60.0)
        for (
            contender
        ) in contenders.values():  # what is alive all the time: parameters, gradients, the batch
            contender.bytes += 2 * sum(p.nbytes for p in model.parameters()) + X.nbytes
        base = contenders["plain"]
        print(
            f"{name}: plain {1e3 * statistics.median(base.seconds):.1f} ms, {base.bytes / 2**20:.0f} MiB"
        )
        print(f"    {'allowed':<14} time {allowed:.2f}x  memory 1.50x")
        for key, other in list(contenders.items())[1:]:
            ratio = statistics.median(
                s / b for s, b in zip(other.seconds, base.seconds, strict=True)
            )
            print(f"    {key:<14} time {ratio:.2f}x  memory {other.bytes / base.bytes:.2f}x")


if __name__ == "__main__":
    main()
