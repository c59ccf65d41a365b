"""Second-order optimizers against tuned first-order ones: curves over steps and CPU time.

    OMP_NUM_THREADS=1 python benchmarks/optimizers.py digits regression lenet transformer
    autoencoder

Runs three seeds of each workload, stores the curves in `benchmarks/results/`, prints the table of
`docs/optimizers.md` and draws `docs/images/optimizers.png` from everything stored. `--grid` tunes
the baseline's learning rate again. Times are process time on one thread and leave out the
measurements; the steps of the methods are interleaved.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from workloads import WORKLOADS, Curve, Workload, interleaved

from lightning_curv import DiagGGNOptimizer, KFACOptimizer, curvature

RESULTS = Path(__file__).parent / "results"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "optimizers.png"
SECOND_ORDER: dict[str, Any] = {
    "KFAC": lambda params: KFACOptimizer(params),
    "EKFAC": lambda params: KFACOptimizer(params, eigen=True),
    "DiagGGN": lambda params: DiagGGNOptimizer(params),
}


def train(
    workload: Workload, method: str, seed: int, lr: float | None = None, steps: int | None = None
) -> Iterator[tuple[float, Curve]]:
    """Train; after every step the share of all steps that is done, and metric, step and CPU seconds so far."""
    torch.manual_seed(seed)
    net, (train_data, test_data) = workload.net(), workload.data(seed)
    second_order = method in SECOND_ORDER
    name, best, count = workload.baseline
    steps = steps or (workload.steps if second_order else count)
    if second_order:
        optimizer = SECOND_ORDER[method](net.parameters())
    else:
        optimizer = getattr(torch.optim, name)(net.parameters(), lr=lr or best)
    decays = workload.decay or not second_order
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if decays else None
    generator = torch.Generator().manual_seed(seed)
    curve: Curve = []
    seconds = 0.0
    for step, (inputs, targets) in enumerate(workload.batches(train_data, seed), start=1):

        def loss_fn(inputs: torch.Tensor = inputs, targets: torch.Tensor = targets) -> torch.Tensor:
            return workload.loss(net(inputs), targets)

        start = time.process_time()
        optimizer.zero_grad()
        if second_order:
            with curvature(*optimizer.required_extensions(), generator=generator):
                loss_fn().backward()
            optimizer.step(loss_fn=loss_fn)
        else:
            loss_fn().backward()
            optimizer.step()
        if schedule is not None:
            schedule.step()
        seconds += time.process_time() - start
        if (
            step % (workload.marks if second_order else max(workload.marks, count // 100)) == 0
            or step == steps
        ):
            with torch.no_grad():
                curve.append(
                    {
                        "step": step,
                        "seconds": seconds,
                        **workload.measure(net, train_data, test_data),
                    }
                )
        yield step / steps, curve
        if step == steps:
            return


def first(curve: Curve, target: float) -> dict[str, float] | None:
    """The first point at which the metric reaches the target."""
    return next((point for point in curve if metric(point) <= target), None)


def metric(point: dict[str, float]) -> float:
    """The training metric, or where there is none the one on test data."""
    return point.get("train", point.get("test", float("nan")))


def report(name: str, results: dict[str, list[Curve]]) -> None:
    """Print steps and time to the baseline's final metric, per method the mean over the seeds."""
    ends = [metric(curve[-1]) for curve in results["baseline"]]
    target = sum(ends) / len(ends)
    print(
        f"\n{name}: target {target:.4g} (mean of the baseline's {', '.join(f'{end:.4g}' for end in ends)})"
    )
    for method, curves in results.items():
        reached = (
            [first(curve, target) for curve in curves]
            if method != "baseline"
            else [c[-1] for c in curves]
        )
        finals = ", ".join(f"{metric(curve[-1]):.4g}" for curve in curves)
        accuracy = [f"{curve[-1]['accuracy']:.3f}" for curve in curves if "accuracy" in curve[-1]]
        if all(reached):
            steps = sum(point["step"] for point in reached if point) / len(reached)
            seconds = sum(point["seconds"] for point in reached if point) / len(reached)
            to_target = f"{steps:.0f} steps, {seconds:.2f} s"
        else:
            to_target = (
                f"reached by {sum(point is not None for point in reached)} of {len(reached)}"
            )
        last = curves[0][-1]
        print(
            f"  {method:9} {to_target:24} after {last['step']:.0f} steps: {finals} {' '.join(accuracy)}"
        )


def draw() -> None:
    """Draw all stored curves, over steps and over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    stored = {
        name: RESULTS / f"{name}.json" for name in WORKLOADS if (RESULTS / f"{name}.json").exists()
    }
    figure, axes = plt.subplots(
        len(stored), 2, figsize=(11, 3.1 * len(stored)), squeeze=False, layout="constrained"
    )
    for row, (name, path) in zip(axes, stored.items(), strict=True):
        for method, curves in json.loads(path.read_text()).items():
            label = (
                f"{WORKLOADS[name].baseline[0]}, tuned, cosine" if method == "baseline" else method
            )
            for number, curve in enumerate(curves):
                for axis, key in zip(row, ("step", "seconds"), strict=True):
                    colour = {"baseline": "0.5", "KFAC": "C0", "EKFAC": "C1", "DiagGGN": "C2"}[
                        method
                    ]
                    points = [(point[key], metric(point)) for point in curve]
                    axis.loglog(
                        *zip(*points, strict=True),
                        color=colour,
                        label=None if number else label,
                        lw=1.2,
                    )
        for axis, unit in zip(row, ("steps", "CPU seconds"), strict=True):
            axis.set(xlabel=unit, ylabel=WORKLOADS[name].metric)
            axis.grid(alpha=0.3, which="both", lw=0.4)
        row[0].set_title(WORKLOADS[name].title, loc="left", fontsize=9)
        row[0].legend(fontsize=8)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workloads", nargs="*", metavar="workload", default=[])
    parser.add_argument(
        "--methods", nargs="+", default=["baseline", "KFAC"], choices=["baseline", *SECOND_ORDER]
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--grid", action="store_true", help="tune the learning rate of the baseline instead"
    )
    parser.add_argument("--steps", type=int, help="of the baseline, with --grid")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    RESULTS.mkdir(exist_ok=True)
    for name in arguments.workloads:
        workload, path = WORKLOADS[name], RESULTS / f"{name}.json"
        if arguments.grid:
            for lr in workload.grid:
                curves = interleaved(
                    {"baseline": train(workload, "baseline", 0, lr, arguments.steps)}
                )
                print(name, lr, metric(curves["baseline"][-1]), flush=True)
            continue
        results = json.loads(path.read_text()) if path.exists() else {}
        chosen = [
            interleaved({method: train(workload, method, seed) for method in arguments.methods})
            for seed in range(arguments.seeds)
        ]
        results.update(
            {method: [curves[method] for curves in chosen] for method in arguments.methods}
        )
        path.write_text(json.dumps(results))
        if "baseline" in results:
            report(name, results)
    draw()


if __name__ == "__main__":
    main()
