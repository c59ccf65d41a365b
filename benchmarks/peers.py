"""This project beside the plain gradient, BackPACK, `torch.func`, curvlinops and Opacus: time and memory of one step.

    OMP_NUM_THREADS=1 python benchmarks/peers.py                                # everything; an hour or more
    OMP_NUM_THREADS=1 python benchmarks/peers.py --networks mlp --quantities KFAC Variance --peers
    BackPACK
    OMP_NUM_THREADS=1 python benchmarks/peers.py --sizes other --isa avx2       # sizes that nothing was tuned for
    python benchmarks/peers.py --report                                         # tables and picture from saved results

All contenders of a quantity take turns in one process on one thread; the tables show medians over
rounds of ratios within a round. A step is forward pass, loss, backward pass and the quantity, and
for products one product with every parameter's block. Peers that are not installed, or do not have
a quantity, are named. Results are merged into ``benchmarks/results/peers.json``
(``peers_cuda.json``, with ``--isa avx2`` ``peers_avx2.json``), and the tables of ``docs/performance.md``
are written from it. What ``--isa`` names is all that torch, MKL and oneDNN may use of the processor's
vector instructions, in a process of its own, since they look at their environment once.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import resource
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contenders import COMPARISONS, PEERS, Comparison, clear, installed, ours, plain
from measure import Contender, compare
from networks import ALL_SIZES, NETWORKS, OTHER_SIZES
from report import line, write
from torch import nn

RESULTS = Path(__file__).parent / "results"
ISA = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
    },
}
SIZES = {"published": NETWORKS, "other": OTHER_SIZES, "all": ALL_SIZES}


def measure(
    network: str, comparison: Comparison, peers: list[str], options: argparse.Namespace
) -> dict[str, Any]:
    """The contenders of one quantity on one network."""
    torch.manual_seed(0)
    chosen = ALL_SIZES[network]
    net = chosen.build(nn.Sigmoid if comparison.smooth else nn.ReLU).to(options.device)
    x, y = (t.to(options.device) for t in chosen.data(options.samples or chosen.samples))
    makers = {"plain": partial(plain, names=()), "ours": partial(ours, names=comparison.names)}
    makers |= {name: partial(ours, names=names) for name, names in comparison.beside.items()}
    makers |= {name: partial(PEERS[name], names=comparison.names) for name in peers}
    contenders = {}
    for name, make in makers.items():
        model = copy.deepcopy(net)
        if (step := make(model, x, y)) is not None:
            contenders[name] = Contender(step, partial(clear, model))
    rounds = (
        options.repeats if comparison.names else 5 * options.repeats
    )  # what is small needs more rounds
    compare(contenders, rounds, options.limit, options.device)
    if contenders["plain"].skipped:
        raise RuntimeError(f"{network}: the plain step failed: {contenders['plain'].skipped}")
    return {name: contender.report() for name, contender in contenders.items()}


def environment(device: str) -> dict[str, Any]:
    """What the results depend on."""
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    found = {"torch": torch.__version__, "python": platform.python_version(), "device": name}
    if device == "cpu":
        found["vector instructions"] = torch.backends.cpu.get_cpu_capability()
    return found


def processor() -> str:
    """The processor's own name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    facts = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    told = [facts[key].strip() for key in ("model name", "cpu family", "model") if key in facts]
    return " / ".join(told) or platform.machine()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=ALL_SIZES, help="those of --sizes")
    parser.add_argument("--sizes", choices=SIZES, default="published")
    parser.add_argument("--isa", choices=ISA, help="vector instructions that libraries may use")
    parser.add_argument(
        "--quantities", nargs="+", choices=COMPARISONS, default=list(COMPARISONS), metavar="NAME"
    )
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--repeats", type=int, default=7, help="rounds")
    parser.add_argument("--limit", type=float, default=20, help="seconds that one step may take")
    parser.add_argument("--memory", type=float, default=8, help="GiB that the process may take")
    parser.add_argument("--samples", type=int, help="N, if not the network's own")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--results", type=Path, help="the file to merge into")
    parser.add_argument(
        "--report", action="store_true", help="measure nothing, write tables and picture"
    )
    options = parser.parse_args()
    options.networks = options.networks or list(SIZES[options.sizes])
    kind = "cuda" if options.device == "cuda" else options.isa
    options.results = options.results or RESULTS / (
        "peers.json" if kind in (None, "avx512") else f"peers_{kind}.json"
    )
    return options


def main() -> None:
    options = parse()
    allowed = ISA.get(options.isa or "", {})
    if any(os.environ.get(name) != value for name, value in allowed.items()):
        command = [sys.executable, __file__, *sys.argv[1:]]
        sys.exit(subprocess.run(command, env={**os.environ, **allowed}).returncode)
    saved = (
        json.loads(options.results.read_text()) if options.results.exists() else {"networks": {}}
    )
    if not options.report:
        warnings.filterwarnings("ignore")
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        size = int(options.memory * 2**30)
        resource.setrlimit(
            resource.RLIMIT_DATA, (size, resource.getrlimit(resource.RLIMIT_DATA)[1])
        )
        peers = installed(options.peers)
        saved["environment"] = environment(options.device)
        for network in options.networks:
            chosen = ALL_SIZES[network]
            print(f"{chosen.title}, N = {options.samples or chosen.samples}")
            for name in options.quantities:
                if name.endswith("ReLU") and not chosen.rectified:
                    continue
                measured = measure(network, COMPARISONS[name], peers, options)
                saved["networks"].setdefault(network, {})[name] = measured
                print(f"  {name:24} {line(measured)}", flush=True)
                options.results.write_text(json.dumps(saved) + "\n")
    if options.results.parent == RESULTS:
        write(saved, "avx2" if options.isa == "avx2" else options.device)


if __name__ == "__main__":
    sys.exit(main())
