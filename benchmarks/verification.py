"""What it costs to verify whose rows are whose: process time of the first hundred steps, one thread.

    OMP_NUM_THREADS=1 python benchmarks/verification.py [--only mlp lstm]

Graphs of one structure are verified once where samples cannot meet in them, else again at the 10th
and 100th occurrence. For every network of `networks.py` the table shows the median step with
`BatchL2Grad`, how many of a hundred steps verify, what these take relative to it (their median), and
the share of a hundred steps that verification has.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from networks import NETWORKS, Network
from torch import nn
from torch.nn import functional as F

from lightning_curv import BatchL2Grad, curvature
from lightning_curv.samples import finder
from lightning_curv.samples.verified import MEMORY

STEPS = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=[*NETWORKS])
    torch.set_num_threads(1)
    print(
        f"{'network':42} {'step':>8} {'verified':>9} {'such a step':>12} {'share of 100 steps':>19}"
    )
    for name in parser.parse_args().only:
        median, ratios = measured(NETWORKS[name])
        share = sum(ratio - 1 for ratio in ratios) / STEPS
        verified = statistics.median(ratios)
        print(
            f"{NETWORKS[name].title:42} {1e3 * median:5.1f} ms {len(ratios):9} {verified:10.2f} x "
            f"{share:18.1%}",
            flush=True,
        )


def measured(network: Network, repeats: int = 3) -> tuple[float, list[float]]:
    """Seconds of the median step, and what the steps that verify take relative to it."""
    torch.manual_seed(0)
    net, (x, y) = network.build(nn.ReLU), network.data(network.samples)
    for _ in range(3):
        step(net, x, y)  # allocates memory, chooses kernels
    medians, ratios = [], []
    with watched() as calls:
        for _ in range(repeats):
            MEMORY.entries.clear()
            times, verifying = [], []
            for _ in range(STEPS):
                calls.clear()
                times.append(step(net, x, y))
                verifying.append(bool(calls))
            medians.append(statistics.median(times))
            ratios.append([t / medians[-1] for t, is_due in zip(times, verifying) if is_due])
    return statistics.median(medians), [statistics.median(ratio) for ratio in zip(*ratios)]


@contextmanager
def watched() -> Iterator[list[int]]:
    """A list that grows with every verification."""
    calls: list[int] = []
    verified = finder.verified

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return verified(*arguments)

    with patch.object(finder, "verified", counted):
        yield calls


def step(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Seconds of process time of one step."""
    net.zero_grad()
    start = time.process_time()
    with curvature(BatchL2Grad()):
        F.cross_entropy(net(x), y).backward()
    return time.process_time() - start


if __name__ == "__main__":
    main()
