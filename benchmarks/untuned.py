"""Our optimizers, as they come, against tuned peers on the problems of `tasks.py`.

    OMP_NUM_THREADS=1 python benchmarks/untuned.py [--tasks U-Net VAE] [--methods KFAC]
    [--seeds 3] [--tune]

`--tune` looks for the learning rate of every peer (AdamW, SGD with momentum, Muon, and SOAP of
`pytorch_optimizer`): a grid of three on the first seed, each with a cosine schedule, that is
extended while its best rate is at the edge; all is kept in `benchmarks/results/untuned.json`. The
peer with the least final training loss is the one to beat. Then ours and that peer run on all
seeds, a step at a time of each, so that both meet the same machine: printed are the shares of its
steps and of its time that ours take to its final training loss, and the validation losses.
Process time of one thread; measurements are left out. No weight decay.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tasks import TASKS, Task
from torch import nn
from workloads import Batch, Curve, interleaved, shuffled

from lightning_curv import KFACOptimizer, curvature

RESULTS = Path(__file__).parent / "results" / "untuned.json"
MARKS = 40  # how often a run is measured
MEASURED = 1000  # of the training data


class Muon:
    """torch's Muon for hidden matrices, convolutions flattened, and AdamW for everything else."""

    def __init__(self, net: nn.Module, lr: float) -> None:
        tables = {m.weight for m in net.modules() if isinstance(m, nn.Embedding)}
        parameters = [p for p in net.parameters() if p.requires_grad]
        # What maps to the outputs, as is usual: the last matrix.
        matrices = [p for p in parameters if p.ndim >= 2 and p not in tables][:-1]
        self._views = [(p, nn.Parameter(p.detach().flatten(1))) for p in matrices]
        others = [p for p in parameters if all(p is not matrix for matrix in matrices)]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, lr=lr / 5, weight_decay=0.0)
        ]
        if matrices:
            views = [view for _, view in self._views]
            self.optimizers.append(torch.optim.Muon(views, lr=lr, weight_decay=0.0))

    def zero_grad(self) -> None:
        self.optimizers[0].zero_grad()
        for parameter, _ in self._views:
            parameter.grad = None

    def step(self) -> None:
        for parameter, view in self._views:
            view.grad = None if parameter.grad is None else parameter.grad.flatten(1)
        for optimizer in self.optimizers:
            optimizer.step()


class Plain:
    """An optimizer of torch's interface."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizers = [optimizer]
        self.zero_grad, self.step = optimizer.zero_grad, optimizer.step


def soap(net: nn.Module, lr: float) -> Plain:
    from pytorch_optimizer import SOAP

    return Plain(SOAP(net.parameters(), lr=lr, weight_decay=0.0))


PEERS: dict[str, tuple[Callable[[nn.Module, float], Any], tuple[float, ...]]] = {
    "AdamW": (
        lambda net, lr: Plain(torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.0)),
        (1e-3, 3e-3, 1e-2),
    ),
    "SGD": (
        lambda net, lr: Plain(torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)),
        (1e-2, 3e-2, 1e-1),
    ),
    "Muon": (Muon, (1e-2, 3e-2, 1e-1)),
    "SOAP": (soap, (1e-3, 3e-3, 1e-2)),
}
OURS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "KFAC": lambda net: KFACOptimizer(net.parameters()),
}


def train(task: Task, method: str, seed: int, lr: float = 0.0) -> Iterator[tuple[float, Curve]]:
    """Train; after every step the share of all steps that is done, and the curve so far."""
    train_data, validation = task.data(seed)
    torch.manual_seed(seed)
    net = task.net()
    task.start(net)
    ours = method in OURS
    optimizer = OURS[method](net) if ours else PEERS[method][0](net, lr)
    schedules = [
        torch.optim.lr_scheduler.CosineAnnealingLR(each, task.steps)
        for each in ([] if ours else optimizer.optimizers)
    ]
    # Dropouts, latent samples and our own draws.
    torch.manual_seed(seed)
    curve: Curve = []
    seconds = 0.0
    batches = shuffled(train_data, task.batch, seed)
    for step in range(1, task.steps + 1):
        batch = next(batches)
        start = time.process_time()
        optimizer.zero_grad()
        if ours:
            with curvature(*optimizer.required_extensions(), batch_size=len(batch[0])):
                task.loss(net, batch).backward()
        else:
            task.loss(net, batch).backward()
        optimizer.step()
        for schedule in schedules:
            schedule.step()
        seconds += time.process_time() - start
        if step % max(1, task.steps // MARKS) == 0 or step == task.steps:
            point = {"step": float(step), "seconds": seconds}
            curve.append({**point, **measure(task, net, train_data, validation)})
        yield step / task.steps, curve


@torch.no_grad()
def measure(task: Task, net: nn.Module, train_data: Batch, validation: Batch) -> dict[str, float]:
    """The losses on a part of the training data and on the validation data."""
    net.eval()
    state = torch.get_rng_state()
    torch.manual_seed(0)
    part = train_data[0][:MEASURED], train_data[1][:MEASURED]
    found = {
        "train": float(task.loss(net, part)),
        "validation": float(task.loss(net, validation)),
    }
    if task.accuracy:
        right = net(validation[0]).argmax(1) == validation[1]
        found["accuracy"] = float(right.float().mean())
    torch.set_rng_state(state)
    net.train()
    return found


def finished(run: Iterator[tuple[float, Curve]]) -> Curve:
    """The whole curve."""
    return [curve for _, curve in run][-1]


def final(curve: Curve) -> float:
    """The last training loss; infinite if it is no number."""
    last = curve[-1]["train"]
    return last if math.isfinite(last) else math.inf


def tuned(task: Task, peer: str, extensions: int = 4) -> dict[str, float]:
    """The final training losses of the rates that were tried."""
    grid = sorted(PEERS[peer][1])
    found = {lr: final(finished(train(task, peer, 0, lr))) for lr in grid}
    for _ in range(extensions):
        best = min(found, key=lambda lr: found[lr])
        if best == max(found):
            lr = best * 3
        elif best == min(found):
            lr = best / 3
        else:
            break
        found[lr] = final(finished(train(task, peer, 0, lr)))
    return {f"{lr:.3g}": found[lr] for lr in sorted(found)}


def shares(ours: Curve, peers: Curve) -> tuple[float, float]:
    """The shares of a peer's steps and time that ours need to its final training loss."""
    target = final(peers)
    reached = next((point for point in ours if point["train"] <= target), None)
    if reached is None:
        return math.inf, math.inf
    last = peers[-1]
    return reached["step"] / last["step"], reached["seconds"] / last["seconds"]


def compare(name: str, rates: dict[str, dict[str, float]], methods: list[str], seeds: int) -> None:
    """Print a task's rows."""
    task = TASKS[name]
    best = {peer: min(found, key=lambda lr: found[lr]) for peer, found in rates.items()}
    peer = min(rates, key=lambda key: rates[key][best[key]])
    others = ", ".join(f"{key} {rates[key][best[key]]:.3g} ({best[key]})" for key in rates)
    print(f"{task.title}: to beat {peer}; final training losses {others}", flush=True)
    rows: dict[str, list[tuple[float, float, Curve, Curve]]] = {method: [] for method in methods}
    for seed in range(seeds):
        runs = {method: train(task, method, seed) for method in methods}
        runs[peer] = train(task, peer, seed, float(best[peer]))
        curves = interleaved(runs)
        for method in methods:
            rows[method].append(
                (*shares(curves[method], curves[peer]), curves[method], curves[peer])
            )
    for method, found in rows.items():
        steps, seconds = (statistics.median(row[i] for row in found) for i in range(2))
        cost = statistics.median(
            ours[-1]["seconds"] / theirs[-1]["seconds"] for *_, ours, theirs in found
        )
        finals = ", ".join(f"{final(ours):.3g}" for *_, ours, _ in found)
        validation = ", ".join(
            f"{ours[-1]['validation']:.3g}/{theirs[-1]['validation']:.3g}"
            for *_, ours, theirs in found
        )
        print(
            f"  {method:6} steps {steps:.2f} time {seconds:.2f}, a step costs {cost:.1f}; "
            f"final {finals}; validation {validation}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=[*TASKS], default=[*TASKS])
    parser.add_argument("--methods", nargs="+", choices=[*OURS], default=[*OURS])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tune", action="store_true", help="look for the rates of the peers again")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    RESULTS.parent.mkdir(exist_ok=True)
    rates = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in arguments.tasks:
        if arguments.tune or name not in rates:
            rates[name] = {peer: tuned(TASKS[name], peer) for peer in PEERS}
            RESULTS.write_text(json.dumps(rates, indent=1) + "\n")
        compare(name, rates[name], arguments.methods, arguments.seeds)


if __name__ == "__main__":
    main()
