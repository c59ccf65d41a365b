"""Networks that are drawn at random, compared with plain autograd: which quantities are right?

    OMP_NUM_THREADS=1 python benchmarks/fuzz.py --cases 600 [--first 0] [--out results.json]

Nothing is random but the seeds 0, 1, 2, ...: a case is the same in every run. See
`zoo/generated.py` for what is drawn. Ends with an error if a quantity was wrong, crashed, or was
refused in more than 3 % of the cells (no generated network gives a mathematical reason).
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
from zoo.generated import network, parts
from zoo.outcomes import CHECKS, Cell, cells

QUANTITIES = (
    "BatchGrad",
    "BatchL2Grad",
    "Variance",
    "DiagGGNExact",
    "DiagGGNMC",
    "KFAC",
    "GGNMP",
    "HMP",
)
MOST_REFUSED = 0.03


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=600)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--quantities", nargs="+", choices=list(CHECKS), default=list(QUANTITIES))
    parser.add_argument("--seconds", type=float, default=60, help="limit of one backward pass")
    parser.add_argument("--out", type=Path, help="where to write the cells, as JSON")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    start, found = time.perf_counter(), list[Cell]()
    for seed in range(arguments.first, arguments.first + arguments.cases):
        row = network(seed)
        new = cells(row, row.samples[0], arguments.quantities, arguments.seconds)
        found += new
        bad = [cell for cell in new if cell.outcome not in ("right", "unverified")]
        for cell in bad:
            print(f"{cell} [N = {row.samples[0]}; {parts(seed)}]", flush=True)
        if seed % 50 == 49:
            print(
                f"{seed + 1 - arguments.first} networks, {time.perf_counter() - start:.0f} s",
                flush=True,
            )
        if arguments.out:
            arguments.out.write_text(json.dumps([cell.report() for cell in found], indent=1))
    counts = Counter(cell.outcome for cell in found)
    print(f"{arguments.cases} networks, {len(found)} cells: {dict(counts)}")
    refused = counts["refused"] > MOST_REFUSED * len(found)
    sys.exit(bool(counts["wrong"] or counts["crash"] or counts["skipped"]) or refused)


if __name__ == "__main__":
    main()
