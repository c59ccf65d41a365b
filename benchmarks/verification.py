"""What it costs to verify whose rows are whose: process time of the first hundred steps, one thread.

    OMP_NUM_THREADS=1 python benchmarks/verification.py [--only mlp lstm]

Graphs of one structure are verified at their 1st, 10th and 100th occurrence. For every network of
`networks.py` the table shows the median step with `BatchL2Grad`, what a step that verifies takes
relative to it (median of the three), and the share that the three have of a hundred steps.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from networks import NETWORKS, Network
from torch import nn
from torch.nn import functional as F

from lightning_curv import BatchL2Grad, curvature
from lightning_curv.samples.verified import MEMORY

STEPS, VERIFIED = 100, (0, 9, 99)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=[*NETWORKS])
    torch.set_num_threads(1)
    print(f"{'network':42} {'step':>8} {'verified step':>14} {'share of 100 steps':>19}")
    for name in parser.parse_args().only:
        median, ratios = measured(NETWORKS[name])
        share = sum(ratio - 1 for ratio in ratios) / STEPS
        verified = statistics.median(ratios)
        print(
            f"{NETWORKS[name].title:42} {1e3 * median:5.1f} ms {verified:12.2f} x {share:18.1%}",
            flush=True,
        )


def measured(network: Network, repeats: int = 3) -> tuple[float, list[float]]:
    """Seconds of the median step, and what the steps that verify take relative to it."""
    torch.manual_seed(0)
    net, (x, y) = network.build(nn.ReLU), network.data(network.samples)
    for _ in range(3):
        step(net, x, y)  # allocates memory, chooses kernels
    medians, ratios = [], []
    for _ in range(repeats):
        MEMORY.entries.clear()
        times = [step(net, x, y) for _ in range(STEPS)]
        medians.append(statistics.median(times))
        ratios.append([times[i] / medians[-1] for i in VERIFIED])
    return statistics.median(medians), [statistics.median(ratio) for ratio in zip(*ratios)]


def step(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Seconds of process time of one step."""
    net.zero_grad()
    start = time.process_time()
    with curvature(BatchL2Grad()):
        F.cross_entropy(net(x), y).backward()
    return time.process_time() - start


if __name__ == "__main__":
    main()
