"""How time and memory of the quantities grow with the number of samples N and of classes C.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py [--quantities Variance DiagGGNExact] [--repeats
    7]

A small network of two convolutions and a linear layer; everything takes turns in one process on one
thread as in `peers`. Prints the slopes of straight lines through the logarithms (1: linear, 0:
constant) over the larger half of the sizes, and draws them into ``docs/images/scaling.png``. Memory
is what a step takes beyond the plain step: the quantity itself and everything that leads to it. It
is measured with a budget for intermediate results (`--budget`) that the smallest N already uses up;
below the budget nothing is cut into pieces.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from contenders import clear, ours, plain
from measure import Contender, compare
from report import replace_in_page
from torch import nn

from lightning_curv.extensions import kronecker
from lightning_curv.passes import passes
from lightning_curv.terms import jacobian

ROOT = Path(__file__).parents[1]
SIZES = {"N": (16, 32, 64, 128, 256), "C": (5, 10, 20, 40, 80)}
QUANTITIES = (
    "BatchL2Grad",
    "SumGradSquared",
    "Variance",
    "DiagGGNMC",
    "KFAC",
    "DiagGGNExact",
    "KFLR",
)
EXACT = ("DiagGGNExact", "KFLR")  # these have C columns


def contenders(samples: int, classes: int, names: list[str]) -> dict[str, Contender]:
    """The plain step and every quantity's."""
    torch.manual_seed(0)
    x, y = torch.randn(samples, 3, 12, 12), torch.randint(classes, (samples,))
    steps = {}
    for name in ("plain", *names):
        net = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(288, classes)),
        )
        step = plain(net, x, y) if name == "plain" else ours(net, x, y, (name,))
        steps[name] = Contender(step, partial(clear, net))
    return steps


def measure(
    letter: str, names: list[str], repeats: int, limit: float
) -> dict[str, list[dict[str, float]]]:
    """Seconds and bytes of every quantity at every size."""
    results: dict[str, list[dict[str, float]]] = {}
    for size in SIZES[letter]:
        made = contenders(size if letter == "N" else 64, size if letter == "C" else 10, names)
        compare(made, repeats, limit)
        for name, contender in made.items():
            if not contender.skipped:
                seconds = float(f"{median(contender.seconds):.4g}") if repeats else 0.0
                row = {"size": size, "seconds": seconds, "bytes": contender.bytes}
                results.setdefault(name, []).append(row)
        print(f"{letter} = {size}", flush=True)
    return results


def memory(names: list[str], budget: int) -> dict[str, list[dict[str, float]]]:
    """Bytes of every quantity for growing N, with no more than ``budget`` bytes for intermediate results."""
    constants = [
        (m, n, v)
        for m in (jacobian, kronecker, passes)
        for n, v in vars(m).items()
        if n.endswith("_BYTES")
    ]
    for module, name, value in constants:
        setattr(module, name, min(value, budget))
    try:
        return measure("N", names, 0, math.inf)
    finally:
        for constant in constants:
            setattr(*constant)


def slope(sizes: list[float], values: list[float]) -> float:
    """Of the line through the logarithms with the smallest squared error."""
    x, y = ([math.log(v) for v in values] for values in (sizes, values))
    mean = sum(x) / len(x)
    return sum((a - mean) * b for a, b in zip(x, y, strict=True)) / sum((a - mean) ** 2 for a in x)


def curves(
    results: dict[str, list[dict[str, float]]], name: str
) -> tuple[list[float], list[float], list[float]]:
    """Sizes, seconds, and bytes beyond the plain step."""
    base = {row["size"]: row["bytes"] for row in results["plain"]}
    rows = results[name]
    return (
        [row["size"] for row in rows],
        [row["seconds"] for row in rows],
        [max(1.0, row["bytes"] - base[row["size"]]) for row in rows],
    )


def table(saved: dict[str, Any]) -> str:
    """Slopes over the larger half of the sizes."""
    lines = [
        "| quantity | time in N | memory beyond the plain step in N | time in C |",
        "|---|---|---|---|",
    ]
    for name in saved["N"]:
        sizes, seconds, _ = curves(saved["N"], name)
        bytes_ = curves(saved["memory"], name)[2]
        half = len(sizes) // 2
        row = [name, f"{slope(sizes[half:], seconds[half:]):.2f}"]
        row.append("—" if name == "plain" else f"{slope(sizes[half:], bytes_[half:]):.2f}")
        if name in saved["C"]:
            sizes, seconds, _ = curves(saved["C"], name)
            row.append(f"{slope(sizes[len(sizes) // 2 :], seconds[len(sizes) // 2 :]):.2f}")
        else:
            row.append("—")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def draw(saved: dict[str, Any]) -> None:
    """Three panels: time in N, memory in N, time in C."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print("matplotlib is not installed; no picture.")
        return
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4))
    for ax, panel, which in zip(axes, ("N", "memory", "C"), (1, 2, 1), strict=True):
        for name in saved[panel]:
            if which == 1 or name != "plain":
                points = curves(saved[panel], name)
                scale = 1e3 if which == 1 else 2**-20
                label = f"{name} ({slope(points[0][len(points[0]) // 2 :], points[which][len(points[0]) // 2 :]):.2f})"
                ax.plot(points[0], [scale * v for v in points[which]], "o-", label=label)
        ax.set(xscale="log", yscale="log", xlabel="C" if panel == "C" else "N")
        ax.set_title("time of a step [ms]" if which == 1 else "memory beyond the plain step [MiB]")
        ax.legend(fontsize=7, title="slope in brackets", title_fontsize=7)
        ax.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(ROOT / "docs/images/scaling.png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quantities", nargs="+", default=list(QUANTITIES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--limit", type=float, default=20)
    parser.add_argument(
        "--budget",
        type=float,
        default=0.5,
        help="MiB for intermediate results, where memory counts",
    )
    parser.add_argument(
        "--report", action="store_true", help="measure nothing, write table and picture"
    )
    options = parser.parse_args()
    path = ROOT / "benchmarks/results/peers_scaling.json"
    if options.report:
        saved = json.loads(path.read_text())
    else:
        warnings.filterwarnings("ignore")
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        exact = [name for name in options.quantities if name in EXACT]
        saved = {"N": measure("N", options.quantities, options.repeats, options.limit)}
        saved["memory"] = memory(options.quantities, int(options.budget * 2**20))
        saved["C"] = measure("C", ["DiagGGNMC", *exact], options.repeats, options.limit)
        path.write_text(json.dumps(saved) + "\n")
    print(table(saved))
    replace_in_page("scaling", table(saved))
    draw(saved)


if __name__ == "__main__":
    main()
