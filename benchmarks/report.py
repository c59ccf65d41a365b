"""Tables and picture of saved results."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

from contenders import COMPARISONS, FIRST_ORDER, PEERS
from networks import ALL_SIZES, NETWORKS

ROOT = Path(__file__).parents[1]
PAGE, PICTURE = ROOT / "docs/performance.md", ROOT / "docs/images/peers.png"
Cells = dict[str, dict[str, Any]]  # by contender


def time_ratio(cells: Cells, other: str, own: str = "ours") -> float | None:
    """Median over the rounds of the ratio of the times."""
    if "seconds" not in cells.get(own, {}) or "seconds" not in cells.get(other, {}):
        return None
    return median(
        a / b for a, b in zip(cells[own]["seconds"], cells[other]["seconds"], strict=True)
    )


def memory_ratio(cells: Cells, other: str, own: str = "ours") -> float | None:
    """Ratio of the peaks."""
    if "seconds" not in cells.get(own, {}) or "seconds" not in cells.get(other, {}):
        return None
    return cells[own]["bytes"] / cells[other]["bytes"]


def line(cells: Cells) -> str:
    """One comparison on one line: times as multiples of the plain step's, memory in MiB."""
    parts = []
    for name, cell in cells.items():
        if "skipped" in cell:
            parts.append(f"{name}: {cell['skipped']}")
        elif name == "plain":
            parts.append(
                f"plain {1e3 * median(cell['seconds']):.4g} ms {cell['bytes'] / 2**20:.1f} MiB"
            )
        else:
            parts.append(
                f"{name} {time_ratio(cells, 'plain', name):.2f}x {cell['bytes'] / 2**20:.1f} MiB"
            )
    return " | ".join(parts)


def number(value: float | None, skipped: str = "") -> str:
    if value is None:
        return skipped or "—"
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def table(network: str, comparisons: dict[str, Cells]) -> Iterator[str]:
    """The table of one network."""
    peers = [peer for peer in PEERS if any(peer in cells for cells in comparisons.values())]
    yield f"**{ALL_SIZES[network].title}**, N = {ALL_SIZES[network].samples}"
    yield ""
    head = ["quantity", "× plain step", "× its memory", *(f"× {peer}" for peer in peers)]
    yield (
        "| "
        + " | ".join([*head, "× BackPACK's memory"][: len(head) + ("BackPACK" in peers)])
        + " |"
    )
    yield "|---" * (len(head) + ("BackPACK" in peers)) + "|"
    for name in COMPARISONS:
        if (cells := comparisons.get(name)) is None:
            continue
        own = cells["ours"].get("skipped", "")
        row = [name, number(time_ratio(cells, "plain"), own), number(memory_ratio(cells, "plain"))]
        for peer in peers:
            row.append(number(time_ratio(cells, peer), cells.get(peer, {}).get("skipped", "")))
        if "BackPACK" in peers:
            row.append(number(memory_ratio(cells, "BackPACK")))
        yield "| " + " | ".join(row) + " |"
    yield ""


@dataclass(frozen=True)
class Target:
    """A bound on ratios.

    Attributes:
        title: what is bounded.
        values: the measured ratios by (network, quantity).
        bound: the largest that is allowed.
    """

    title: str
    values: dict[tuple[str, str], float]
    bound: float

    def row(self) -> str:
        """A row of the table of targets; the worst cells are named."""
        if not self.values:
            return f"| {self.title} | ≤ {self.bound} | not measured | | |"
        worst = sorted(self.values.items(), key=lambda item: -item[1])
        above = ", ".join(f"{n} {q} {v:.2f}" for (n, q), v in worst if v > self.bound) or "—"
        within = sum(v <= self.bound for v in self.values.values())
        return f"| {self.title} | ≤ {self.bound} | {worst[0][1]:.2f} | {within} of {len(worst)} | {above} |"


def targets(networks: dict[str, dict[str, Cells]]) -> Iterator[Target]:
    """Everything that is asked for, and what was measured."""

    def collect(
        ratio: Any, other: str, quantities: Any = COMPARISONS, only: Any = ALL_SIZES
    ) -> dict[Any, float]:
        rows = {
            (network, name): ratio(cells, other)
            for network, comparisons in networks.items()
            for name, cells in comparisons.items()
            if network in only and name in quantities
        }
        return {key: value for key, value in rows.items() if value is not None}

    faster = collect(time_ratio, "BackPACK")
    yield Target("time / BackPACK", faster, 1.0)
    yield Target(
        "geometric mean of these",
        {("all", "cells"): geometric_mean(faster.values())} if faster else {},
        0.5,
    )
    yield Target("memory / BackPACK", collect(memory_ratio, "BackPACK"), 1.0)
    reduced = [q for q in COMPARISONS if q in FIRST_ORDER[1:] or q.startswith("DiagGGN")]
    small = collect(memory_ratio, "BackPACK", reduced, ("3c3d", "lstm"))
    yield Target("memory / BackPACK, reduced quantities, 3C3D and sequences", small, 0.5)
    yield Target("time / vmap(grad), BatchGrad", collect(time_ratio, "vmap(grad)"), 0.8)
    yield Target("time / curvlinops, KFAC and KFLR", collect(time_ratio, "curvlinops"), 0.7)
    yield Target(
        "time / plain step, BatchL2Grad", collect(time_ratio, "plain", ["BatchL2Grad"]), 1.15
    )
    squares = ["SumGradSquared", "Variance"]
    for network, bound in {"3c3d": 1.8, "mlp": 1.5}.items():
        values = collect(time_ratio, "plain", squares, [network])
        yield Target(
            f"time / plain step, SumGradSquared and Variance, {NETWORKS[network].title}",
            values,
            bound,
        )
    yield Target("time / plain step, DiagGGNMC", collect(time_ratio, "plain", ["DiagGGNMC"]), 1.7)
    for name, network, bound in (
        ("KFAC", "mlp", 2.0),
        ("KFAC", "3c3d", 2.5),
        ("DiagGGNExact", "3c3d", 6.0),
    ):
        values = collect(time_ratio, "plain", [name], [network])
        yield Target(f"time / plain step, {name}, {NETWORKS[network].title}", values, bound)
    for name, cells in COMPARISONS.items():
        if name.endswith("ReLU"):
            beside = next(iter(cells.beside))
            yield Target(f"time / {beside}, {name}", collect(time_ratio, beside, [name]), 1.1)
    together = {}
    for network, comparisons in networks.items():
        if cells := comparisons.get("first order together"):
            ratios = [
                ratio for name in FIRST_ORDER if (ratio := time_ratio(cells, name)) is not None
            ]
            together |= {(network, "together"): min(ratios)} if ratios else {}
    yield Target("time / dearest alone, all first-order quantities together", together, 1.3)
    images = ("logistic", "mlp", "2c2d", "3c3d", "allcnnc")
    yield Target(
        "time / plain step, `record()`, CNNs",
        collect(time_ratio, "plain", ["record()"], images[2:]),
        1.02,
    )
    yield Target(
        "the same, transformer", collect(time_ratio, "plain", ["record()"], ["transformer"]), 1.08
    )


def write(saved: dict[str, Any], device: str) -> None:
    """Print the tables, write them into the page, draw the picture."""
    networks = {name: saved["networks"][name] for name in ALL_SIZES if name in saved["networks"]}
    lines = ["| target | bound | worst | within | above |", "|---|---|---|---|---|"]
    lines += [*(target.row() for target in targets(networks)), ""]
    for network, comparisons in networks.items():
        lines += table(network, comparisons)
    environment = ", ".join(f"{k} {v}" for k, v in saved["environment"].items())
    text = f"Measured with {environment}.\n\n" + "\n".join(lines)
    print(text)
    replace_in_page(device, text)
    if device == "cpu":
        draw({name: networks[name] for name in NETWORKS if name in networks})


def replace_in_page(name: str, text: str) -> None:
    """Put a text between two marks of the page."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    page = PAGE.read_text()
    PAGE.write_text(
        re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n\n{text}\n\n{end}", page, flags=re.DOTALL)
    )


def draw(networks: dict[str, dict[str, Cells]]) -> None:
    """Times and memory relative to BackPACK's, one panel per network."""
    try:
        from matplotlib import pyplot
        from matplotlib.ticker import NullFormatter
    except ImportError:
        print("matplotlib is not installed; no picture.")
        return
    shown = {
        network: {n: c for n, c in comparisons.items() if time_ratio(c, "BackPACK") is not None}
        for network, comparisons in networks.items()
    }
    shown = {network: comparisons for network, comparisons in shown.items() if comparisons}
    if not shown:
        return
    figure, axes = pyplot.subplots(
        1, len(shown), figsize=(3 * len(shown), 5), sharey=True, squeeze=False
    )
    names = [
        name for name in COMPARISONS if any(name in comparisons for comparisons in shown.values())
    ][::-1]
    for ax, (network, comparisons) in zip(axes[0], shown.items(), strict=True):
        for ratio, mark, label in ((time_ratio, "o", "time"), (memory_ratio, "x", "memory")):
            points = [(ratio(comparisons[n], "BackPACK"), names.index(n)) for n in comparisons]
            ax.plot(*zip(*points, strict=True), mark, label=label)
        ax.axvline(1, color="gray", linewidth=1)
        ax.set(xscale="log", title=NETWORKS[network].title.split(",")[0])
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_yticks(range(len(names)), names)
        ax.grid(alpha=0.3)
    axes[0][0].legend()
    figure.supxlabel("this project / BackPACK (left of 1: faster, smaller)")
    figure.tight_layout()
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=100)
