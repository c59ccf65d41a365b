"""What processes exchange per step beside the gradients: collectives and bytes, counted.

    OMP_NUM_THREADS=1 python benchmarks/communication.py [--processes 2 4] [--width 256]

A perceptron of three layers is trained by a loop of one's own over gloo. Counted is what this library hands to
`torch.distributed`, in bytes of each process' tensors: an all-reduce of n bytes makes every process send and receive
about 2 n (P - 1) / P of them, an all-gather n (P - 1). What DDP and FSDP exchange themselves, gradients and parameters,
is not counted. Curvature is measured every tenth step, and inverses are refreshed once in ten steps, spread over them:
the table has the mean of ten steps and the dearest of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

import torch
from process_group import in_processes
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_curv import DiagGGNOptimizer, KFACOptimizer, curvature

BATCH, CLASSES, INTERVAL = 16, 10, 10
SETUPS: dict[str, Callable[[Iterable[Tensor]], Optimizer]] = {
    "KFAC, inverses sent": lambda p: KFACOptimizer(
        p, lr=0.1, damping=0.1, factor_interval=INTERVAL, inverse_interval=INTERVAL
    ),
    "KFAC, inverses kept": lambda p: KFACOptimizer(
        p,
        lr=0.1,
        damping=0.1,
        factor_interval=INTERVAL,
        inverse_interval=INTERVAL,
        shard_inverses=True,
    ),
    "KFAC, lr and damping found": lambda p: KFACOptimizer(
        p, factor_interval=INTERVAL, inverse_interval=INTERVAL
    ),
    "DiagGGN": lambda p: DiagGGNOptimizer(p, lr=0.1, interval=INTERVAL),
}


class Counter:
    """Counts the tensors that go into collectives of Python."""

    def __init__(self) -> None:
        self.calls, self.bytes = 0, 0
        self._all_reduce, self._all_gather = dist.all_reduce, dist.all_gather

    def __enter__(self) -> Counter:
        dist.all_reduce, dist.all_gather = self._reduced, self._gathered
        return self

    def __exit__(self, *_: Any) -> None:
        dist.all_reduce, dist.all_gather = self._all_reduce, self._all_gather

    def _reduced(self, tensor: Tensor, *arguments: Any, **named: Any) -> Any:
        self._count(tensor)
        return self._all_reduce(tensor, *arguments, **named)

    def _gathered(self, rows: list[Tensor], tensor: Tensor, *arguments: Any, **named: Any) -> Any:
        self._count(tensor)
        return self._all_gather(rows, tensor, *arguments, **named)

    def _count(self, tensor: Tensor) -> None:
        self.calls += 1
        self.bytes += tensor.numel() * tensor.element_size()


def network(width: int) -> nn.Module:
    torch.manual_seed(0)
    hidden = nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()
    return nn.Sequential(*hidden, nn.Linear(width, CLASSES))


def steps(name: str, width: int) -> list[tuple[int, int]]:
    """Calls and bytes of every step, after those in which averages begin."""
    model = DistributedDataParallel(network(width))
    optimizer = SETUPS[name](model.parameters())
    generator = torch.Generator().manual_seed(dist.get_rank())
    counted = []
    for _ in range(2 * INTERVAL):
        x = torch.randn(BATCH, width, generator=generator)
        y = torch.randint(CLASSES, (BATCH,), generator=generator)
        optimizer.zero_grad()
        with Counter() as counter:
            with curvature(*optimizer.required_extensions()):  # type: ignore[attr-defined]
                F.cross_entropy(model(x), y).backward()
            optimizer.step()
        counted.append((counter.calls, counter.bytes))
    return counted[INTERVAL:]


def steps_of_all(width: int) -> dict[str, list[tuple[int, int]]]:
    return {name: steps(name, width) for name in SETUPS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--width", type=int, default=256)
    arguments = parser.parse_args()
    gradient = sum(4 * p.numel() for p in network(arguments.width).parameters())
    print(f"bytes per process in multiples of the gradient, which has {gradient:,} bytes")
    print(f"{'':28} {'processes':>9} {'mean of ten steps':>18} {'dearest step':>13} {'calls':>6}")
    for world in arguments.processes:
        for name, found in in_processes(steps_of_all, world, arguments.width).items():
            sizes = [size / gradient for _, size in found]
            calls = sum(count for count, _ in found) / len(found)
            mean = sum(sizes) / len(sizes)
            print(f"{name:28} {world:9} {mean:18.3f} {max(sizes):13.3f} {calls:6.1f}")


if __name__ == "__main__":
    main()
