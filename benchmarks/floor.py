"""What quantities cannot do without: operations and bytes counted, beside the time that they take.

    OMP_NUM_THREADS=1 python benchmarks/floor.py [--networks mlp 2c2d 3c3d] [--repeats 9]

The floor of a quantity is the plain step as measured, plus the products of matrices that the
quantity adds at the rate of one large product. Squares, copies of patches, sums, normalisations,
the recurrence of an LSTM and Python count as nothing. Where the results do not fit into memory that
the process has used before, their first touch comes on top, at the rate at which fresh memory in
huge pages is filled.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections import Counter
from functools import partial
from statistics import median

import torch
from contenders import clear, ours, plain
from measure import Contender, compare
from networks import NETWORKS
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_curv import Extension, curvature
from lightning_curv.kernels.huge_pages import empty
from lightning_curv.kernels.onednn import mm
from lightning_curv.terms.chunks import Matrices
from lightning_curv.terms.jacobian import Jacobian

QUANTITIES = (
    "BatchGrad",
    "BatchL2Grad",
    "SumGradSquared",
    "Variance",
    "DiagGGNMC",
    "KFAC",
    "DiagGGNExact",
)


class Work(Extension):
    """Operations of the products, and bytes of the results, of every quantity for one parameter, in ``work``."""

    savefield = "work"

    def evaluate(self, jacobian: Jacobian) -> Counter[str]:
        """A multiplication and an addition are two operations; those of embeddings and normalisations do not count."""
        size, samples = jacobian.parameter.numel(), jacobian.samples
        work: Counter[str] = Counter({"BatchGrad bytes": 4 * samples * size})
        work.update(
            {
                f"{name} bytes": 4 * size
                for name in ("SumGradSquared", "Variance", "DiagGGNMC", "DiagGGNExact")
            }
        )
        (term,) = jacobian.terms
        m = Matrices(term)
        both, out, inp, positions = (
            m.size(letters) for letters in (m.both, m.outputs, m.inputs, m.shared)
        )
        if term.x is None:
            return work + Counter({"KFAC bytes": 4 * out**2})
        if term.classes or not m.inputs:
            return work
        product, rows = 2 * samples * both * out * inp * positions, samples * both * positions
        work["product"] = product
        if term.shared:
            work["BatchGrad"] = product
            work["BatchL2Grad"] = (
                product if jacobian.forms_norms else 2 * rows * positions * (out + inp)
            )
        work["KFAC"] = rows * (out**2 + inp**2)  # half of the products: they are symmetric
        work["KFAC bytes"] = 4 * both * (out**2 + inp**2)
        return work


def count(net: nn.Module, x: Tensor, y: Tensor) -> Counter[str]:
    """The work of all parameters; ``"plain"``: the products of the plain step."""
    with curvature(Work()):
        output = net(x)
        F.cross_entropy(output, y).backward()
    classes = output.shape[1]
    columns = output[0].numel() // classes * (classes - 1)
    work: list[Counter[str]] = [p.work for p in net.parameters()]
    total = sum(work, Counter())
    product = total["product"]
    backwards = product - work[0]["product"]  # a pass to the outputs of the first layer
    total["plain"] = 2 * product + backwards
    total["SumGradSquared"] = total["Variance"] = product
    total["DiagGGNMC"] = backwards + product
    total["KFAC"] += backwards
    shared = total[
        "BatchGrad"
    ]  # by sample and column; where nothing is shared the squares are summed first
    total["DiagGGNExact"] = columns * (backwards + shared) + product - shared
    return total


def rates() -> tuple[float, float]:
    """Operations per second of a large product, and bytes per second of memory that is filled for the first time."""
    a = torch.randn(1024, 1024)
    products, fills = [], []
    for _ in range(25):
        start = time.process_time()
        mm(a, a)
        products.append(time.process_time() - start)
        start = time.process_time()
        empty(a, 2**24).fill_(1)
        fills.append(time.process_time() - start)
    return 2 * 1024**3 / min(products), 2**26 / min(fills)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["mlp", "3c3d"])
    parser.add_argument("--limit", type=float, default=3, help="seconds that one step may take")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    operations, fresh = rates()
    print(f"{operations / 1e9:.0f} GFLOP/s, {1e9 / fresh:.2f} s per GB of fresh memory\n")
    print(
        "| network | quantity | GFLOP of a step | added | MB of results | floor × plain | in fresh memory | measured |"
    )
    print("|---|---|---|---|---|---|---|")
    for network in options.networks:
        torch.manual_seed(0)
        net = NETWORKS[network].build(nn.ReLU)
        x, y = NETWORKS[network].data(NETWORKS[network].samples)
        work = count(copy.deepcopy(net), x, y)
        for name in QUANTITIES:
            models = copy.deepcopy(net), copy.deepcopy(net)
            steps = plain(models[0], x, y), ours(models[1], x, y, (name,))
            contenders = [
                Contender(step, partial(clear, model))
                for step, model in zip(steps, models, strict=True)
            ]
            compare(dict(zip("ab", contenders, strict=True)), options.repeats, options.limit)
            if any(contender.skipped for contender in contenders):
                continue
            base, own_seconds = (contender.seconds for contender in contenders)
            floor = 1 + work[name] / operations / median(base)
            touched = floor + work[f"{name} bytes"] / fresh / median(base)
            ratio = median(b / a for a, b in zip(base, own_seconds, strict=True))
            counted = f"{work['plain'] / 1e9:.2f} | {work[name] / 1e9:.2f} | {work[f'{name} bytes'] / 1e6:.1f}"
            print(
                f"| {network} | {name} | {counted} | {floor:.2f} | {touched:.2f} | {ratio:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
