"""Every quantity on many architectures, compared with plain autograd: which are right, refused, wrong or crash?

    OMP_NUM_THREADS=1 python benchmarks/models.py [--suite transformers] [--only bert gpt2 ...]
    [--out results.json]

The networks are tiny and have random weights; nothing is downloaded. Networks whose package is
missing are skipped; ``pip install -e ".[models]"`` brings the packages. See `zoo/` for the rows,
the references and the judgement. Ends with an error if a quantity was wrong or crashed, and, where
``CI=true`` is set, if a package was missing.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import logging
import os
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from zoo import NETWORKS
from zoo.network import Network
from zoo.outcomes import CHECKS, Cell, cells

OUTCOMES = ("right", "refused", "unjustified", "wrong", "crash", "slow", "unverified", "skipped")


def main() -> None:
    arguments = _arguments()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows = _known(arguments.out) if arguments.resume else []
    done = {cell.model for cell in rows}
    start, missing = time.perf_counter(), Counter()
    for network, samples in _chosen(arguments):
        if reason := _missing(network.package):
            missing[f"`{network.package}` cannot be imported ({reason})"] += 1
            continue
        if _name(network, samples) in done:
            continue
        new = cells(network, samples, arguments.quantities, arguments.seconds, arguments.alone)
        for cell in new:
            print(cell, flush=True)
        rows += new
        if arguments.out:
            arguments.out.write_text(json.dumps([cell.report() for cell in rows], indent=1))
    _summarize(rows)
    for reason, count in missing.items():
        print(f"{count} networks skipped: {reason}")
    print(f"{time.perf_counter() - start:.0f} s")
    failed = any(cell.outcome in ("wrong", "crash") for cell in rows)
    sys.exit(failed or (bool(missing) and os.environ.get("CI") == "true"))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="names of networks; may hold * and ?"
    )
    parser.add_argument(
        "--suite", nargs="+", choices=sorted({network.suite for network in NETWORKS})
    )
    parser.add_argument("--quantities", nargs="+", choices=list(CHECKS), default=list(CHECKS))
    parser.add_argument("--seconds", type=float, default=20, help="limit of one backward pass")
    parser.add_argument("--out", type=Path, help="where to write the cells, as JSON")
    parser.add_argument(
        "--resume", action="store_true", help="keep the networks that are in the file already"
    )
    parser.add_argument(
        "--alone", action="store_true", help="a backward pass for every quantity (slower)"
    )
    return parser.parse_args()


def _chosen(arguments: argparse.Namespace) -> Iterator[tuple[Network, int]]:
    """Networks and numbers of samples."""
    for network in NETWORKS:
        if arguments.suite and network.suite not in arguments.suite:
            continue
        for samples in network.samples:
            names = (network.name, _name(network, samples))
            if not arguments.only or any(
                fnmatch.fnmatch(n, pattern) for n in names for pattern in arguments.only
            ):
                yield network, samples


def _name(network: Network, samples: int) -> str:
    return network.name if samples == network.samples[0] else f"{network.name} N={samples}"


@cache
def _missing(package: str) -> str:
    """Why a package cannot be imported; empty if it can."""
    try:
        module = import_module(package)
        if package == "transformers":
            module.PreTrainedModel  # noqa: B018 (imports what every model needs, which takes longer than a network may)
    except Exception as error:  # what it needs itself may be missing, or not fit
        return f"{type(error).__name__}: {error}"
    return ""


def _known(path: Path | None) -> list[Cell]:
    if path is None or not path.exists():
        return []
    return [Cell(**cell) for cell in json.loads(path.read_text())]


def _summarize(found: list[Cell]) -> None:
    """Tables of counts, per suite and per quantity, and the reasons of refusals."""
    for title, key in (
        ("suite", lambda cell: cell.suite),
        ("quantity", lambda cell: cell.quantity),
    ):
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for cell in found:
            counts[key(cell)][_outcome(cell)] += 1
        counts["all"] = sum(counts.values(), Counter())
        print(f"\n{title:28}" + "".join(f"{outcome:>13}" for outcome in OUTCOMES))
        for name, row in counts.items():
            print(f"{name:28}" + "".join(f"{row[outcome] or '·':>13}" for outcome in OUTCOMES))
    print(f"\n{len({cell.model for cell in found})} networks, {len(found)} cells")
    causes: dict[Any, list[Cell]] = defaultdict(list)
    for cell in found:
        if cell.outcome == "refused":
            causes[cell.cause, cell.justified].append(cell)
    for (cause, justified), refused in causes.items():
        models = dict.fromkeys(cell.model for cell in refused)
        print(
            f"\nRefused, {cause} ({'justified' if justified else 'unjustified'}): {len(refused)} cells of {len(models)}"
        )
        print(
            f"  {', '.join(models)}\n  {refused[0].quantity} of {refused[0].model}: {refused[0].message}"
        )
    bad: dict[tuple[str, str, str], list[Cell]] = defaultdict(list)
    for cell in found:
        if cell.outcome in ("wrong", "crash", "slow", "unverified", "skipped"):
            bad[cell.model, cell.outcome, cell.message[:60]].append(cell)
    for (model, outcome, _), alike in bad.items():
        print(
            f"\n{model}: {outcome}: {', '.join(cell.quantity for cell in alike)}\n  {alike[0].message[:300]}"
        )


def _outcome(cell: Cell) -> str:
    return "unjustified" if cell.outcome == "refused" and not cell.justified else cell.outcome


if __name__ == "__main__":
    main()
