"""Cost of a step against SGD with momentum and AdamW, on one thread, interleaved.

    OMP_NUM_THREADS=1 python benchmarks/step_cost.py [--tasks recurrent U-Net]

Prints the mean process time of forward, backward and update over 40 steps past the burn-in, as a
multiple of SGD's, and the longest step over the median one. With `--tasks`, of the default on
problems of `tasks.py` instead, as multiples of AdamW's: in the first 20 steps, in the 80 behind
them, and in those of the 80 that measure no curvature.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from tasks import TASKS, Task
from torch import Tensor, nn
from torch.nn import functional as F
from workloads import shuffled

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


def training(task: Task, optimizer_of: Callable[[Any], Any]) -> Callable[[], tuple[float, bool]]:
    """A step of a task: its process time, and whether it measured curvature."""
    data, _ = task.data(0)
    torch.manual_seed(0)
    net = task.net()
    task.start(net)
    optimizer = optimizer_of(net.parameters())
    batches = shuffled(data, task.batch, 0)

    def step() -> tuple[float, bool]:
        batch = next(batches)
        start = time.process_time()
        optimizer.zero_grad()
        extensions = getattr(optimizer, "required_extensions", tuple)()
        if extensions:
            with curvature(*extensions, batch_size=len(batch[0])):
                task.loss(net, batch).backward()
        else:
            task.loss(net, batch).backward()
        optimizer.step()
        return time.process_time() - start, len(extensions) > 1

    return step


def compare_with_adamw(name: str) -> None:
    """Print a task's line."""
    adamw = training(TASKS[name], lambda p: torch.optim.AdamW(p, lr=1e-3))
    kfac = training(TASKS[name], lambda p: KFACOptimizer(p))
    bases, found = zip(*((adamw()[0], kfac()) for _ in range(100)), strict=True)
    base = statistics.mean(bases[20:])
    first = statistics.mean(seconds for seconds, _ in found[:20]) / base
    later = statistics.mean(seconds for seconds, _ in found[20:]) / base
    between = [seconds for seconds, measures in found[20:] if not measures]
    kept = statistics.mean(between) / base if between else float("nan")
    share = 1 - len(between) / len(found[20:])
    print(
        f"  {TASKS[name].title:55} {base * 1e3:6.2f} ms: first {first:.1f}×, later {later:.1f}×, "
        f"{kept:.1f}× where nothing is measured, {share:.0%} measured",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="*", choices=[*TASKS])
    tasks = parser.parse_args().tasks
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if tasks is not None:
        for name in tasks or TASKS:
            compare_with_adamw(name)
        return
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
