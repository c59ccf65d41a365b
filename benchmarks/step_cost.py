"""Cost of a step against SGD with momentum, on one thread, interleaved.

    OMP_NUM_THREADS=1 python benchmarks/step_cost.py

Prints the mean process time of forward, backward and update over 40 steps past the burn-in, as a
multiple of SGD's, and the longest step over the median one.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_curv import DiagGGNOptimizer, KFACOptimizer, curvature

FIXED: dict[str, Any] = {"lr": 0.3, "damping": 0.03}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "every 10 steps": lambda p: KFACOptimizer(p, **FIXED, factor_interval=10),
    "every 10 steps, all positions": lambda p: KFACOptimizer(
        p, **FIXED, factor_interval=10, positions=None
    ),
    "every step": lambda p: KFACOptimizer(p, **FIXED, factor_interval=1, inverse_interval=1),
    "automatic": lambda p: KFACOptimizer(p),
    "diagonal": lambda p: DiagGGNOptimizer(p),
}


def mlp() -> tuple[nn.Module, Tensor]:
    layers = [nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)]
    return nn.Sequential(*layers), torch.rand(256, 784)


def cnn() -> tuple[nn.Module, Tensor]:
    layers = [nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [
        nn.Conv2d(16, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(1568, 10),
    ]
    return nn.Sequential(*layers), torch.rand(64, 1, 28, 28)


def stepper(make: Callable[[], tuple[nn.Module, Tensor]], name: str) -> Callable[[], None]:
    """One training step."""
    torch.manual_seed(0)
    net, x = make()
    y = torch.randint(10, (len(x),))
    if name == "SGD":
        optimizer: Any = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    else:
        optimizer = OPTIMIZERS[name](net.parameters())

    def step() -> None:
        optimizer.zero_grad()
        extensions = () if name == "SGD" else optimizer.required_extensions()
        if extensions:
            with curvature(*extensions):
                F.cross_entropy(net(x), y).backward()
        else:
            F.cross_entropy(net(x), y).backward()
        optimizer.step()

    return step


def seconds(step: Callable[[], None]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def main() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    for title, make in {
        "MLP 784-512-256-10, batch 256": mlp,
        "CNN 16-32 5×5, batch 64": cnn,
    }.items():
        print(title)
        for name in OPTIMIZERS:
            sgd, other = stepper(make, "SGD"), stepper(make, name)
            for _ in range(21):
                sgd(), other()
            pairs = [(seconds(sgd), seconds(other)) for _ in range(40)]
            base, mine = (list(times) for times in zip(*pairs, strict=True))
            ratio, peak = (
                statistics.mean(mine) / statistics.mean(base),
                max(mine) / statistics.median(mine),
            )
            print(
                f"  {name:30} {ratio:.2f}× SGD ({statistics.mean(base) * 1e3:.1f} ms), peak {peak:.1f}× median"
            )


if __name__ == "__main__":
    main()
