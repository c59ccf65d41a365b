"""`curvature` around `fabric.backward`: quantities against brute force, and training with KFAC."""

import subprocess
import sys
from pathlib import Path

import fabric_runs
import pytest
import torch
from torch.nn import functional as F

# With 64-true, Fabric hands outputs on in float32.
TOLERANCE = {"32-true": 1e-5, "64-true": 1e-6, "bf16-mixed": 0.03, "16-mixed": 1e-2}


def gradients_of_samples(net, x, y):
    """[N, *p] by name, in float64."""
    rows = []
    for n in range(len(x)):
        loss = F.cross_entropy(net(x[n : n + 1].double()), y[n : n + 1])
        rows.append(torch.autograd.grad(loss, list(net.parameters())))
    return {name: torch.stack(g) for (name, _), g in zip(net.named_parameters(), zip(*rows))}


def assert_true(net, batches, quantities, scale, tolerance):
    """Of every micro-batch: a summand of the gradient is `scale` g_n / N."""
    for (x, y), found in zip(batches, quantities):
        for name, g in gradients_of_samples(net, x, y).items():
            norms, variance = found[name]
            terms = scale * g
            truth = terms.div(len(x)).flatten(1).square().sum(1)
            torch.testing.assert_close(
                norms, truth, rtol=tolerance, atol=tolerance * float(truth.max())
            )
            truth = terms.div(len(x)).var(0, correction=0)
            torch.testing.assert_close(
                variance, truth, rtol=tolerance, atol=tolerance * float(truth.max())
            )


@pytest.mark.parametrize("precision", TOLERANCE)
def test_quantities_of_accumulated_batches_are_true(precision):
    fabric = fabric_runs.fabric(precision, devices=1)
    net, quantities, gradients = fabric_runs.step_of_quantities(fabric)
    x, y = fabric_runs.batches()
    parts = [(x[0, part, 0], y[0, part, 0]) for part in range(fabric_runs.PARTS)]
    scale = (64 if precision == "16-mixed" else 1) / fabric_runs.PARTS  # the loss is scaled
    assert_true(net, parts, quantities, scale, TOLERANCE[precision])
    for name, found in gradients.items():
        means = [gradients_of_samples(net, *part)[name].mean(0) for part in parts]
        truth = scale * sum(means)
        error = (found - truth).abs().max() / truth.abs().max()
        assert error < TOLERANCE[precision]


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fabric")
    script = Path(fabric_runs.__file__)
    subprocess.run([sys.executable, str(script), str(folder)], check=True, timeout=300)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_every_process_has_the_quantities_of_its_samples(processes):
    net = fabric_runs.network().double()
    x, y = fabric_runs.batches(world=2)
    for rank, (quantities, gradients, _) in enumerate(processes):
        parts = [(x[0, part, rank], y[0, part, rank]) for part in range(fabric_runs.PARTS)]
        assert_true(net, parts, quantities, 1 / fabric_runs.PARTS, 1e-4)
        union = gradients_of_samples(net, x[0].reshape(-1, 4), y[0].reshape(-1))
        for name, found in gradients.items():
            torch.testing.assert_close(found, union[name].mean(0), rtol=1e-4, atol=1e-6)


def test_kfac_of_two_processes_is_that_of_one_on_their_union(processes):
    alone = fabric_runs.trained(fabric_runs.fabric(devices=1), world=2, union=True)
    first, second = (parameters for *_, parameters in processes)
    start = [p.detach() for p in fabric_runs.network().parameters()]
    for p, q, truth, begin in zip(first, second, alone, start):
        assert torch.equal(p, q)
        torch.testing.assert_close(p, truth, rtol=1e-4, atol=1e-5)
        assert not torch.equal(p, begin)
