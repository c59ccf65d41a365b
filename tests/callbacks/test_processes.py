"""Two and three processes against one process on the union batch: statistics, Kronecker factors, parameters."""

import warnings

import pytest
import torch
from process_runs import (
    CASES,
    SAMPLED,
    SIZE,
    STEPS,
    WORLDS,
    Net,
    batches,
    run_alone,
    work,
)
from processes import spawn
from torch.nn import functional as F


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What every process saw, by number of processes, rank, run, and whether it was monitored."""
    folder = tmp_path_factory.mktemp("processes")
    spawn(work, str(folder), world=max(WORLDS), groups=WORLDS)
    return {
        (world, rank, name, monitored): torch.load(
            folder / f"{world}-{rank}-{name}-{monitored}", weights_only=False
        )
        for world, name in CASES
        for rank in range(world)
        for monitored in (True, False)
    }


@pytest.fixture(scope="module")
def alone():
    """The same runs in one process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {(world, name): run_alone(name, world) for world, name in CASES if name != "branch"}


def runs(*without):
    return [(world, name) for world, name in CASES if name not in without]


@pytest.mark.parametrize(
    ("world", "name"), runs("branch", "compressed", "failing", "some_samples", "monte_carlo")
)
def test_values_are_those_of_one_process_on_the_union_batch(results, alone, world, name):
    expected = alone[world, name]["values"]
    for rank in range(world):
        found = results[world, rank, name, True]["values"]
        assert len(found) == len(expected) == STEPS
        for step, (values, others) in enumerate(zip(found, expected)):
            assert values == pytest.approx(others, rel=1e-6), (rank, step)


@pytest.mark.parametrize(("world", "name"), runs())
def test_all_processes_log_the_same(results, world, name):
    for rank in range(1, world):
        assert results[world, rank, name, True]["values"] == results[world, 0, name, True]["values"]


@pytest.mark.parametrize(("world", "name"), runs())
def test_parameters_stay_identical_over_ranks_and_with_monitoring(results, world, name):
    reference = results[world, 0, name, False]["parameters"]
    for rank in range(world):
        for monitored in (True, False):
            for step, expected in zip(
                results[world, rank, name, monitored]["parameters"], reference, strict=True
            ):
                assert all(map(torch.equal, step, expected)), (rank, monitored)


@pytest.mark.parametrize(("world", "name"), runs("branch", "compressed"))
def test_parameters_and_curvature_are_those_of_one_process(results, alone, world, name):
    for kind in ("parameters", "curvature"):
        for rank in range(world):
            for found, expected in zip(
                results[world, rank, name, True][kind], alone[world, name][kind], strict=True
            ):
                for one, other in zip(found, expected, strict=True):
                    if one.numel():  # or another process has it
                        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("world", "name"), runs())
def test_one_reduction_per_logged_step(results, world, name):
    monitored, plain = (results[world, 0, name, flag]["collectives"] for flag in (True, False))
    assert [m - p for m, p in zip(monitored, plain, strict=True)] == [1] * STEPS


@pytest.mark.parametrize(
    ("world", "name"), [case for case in CASES if case[1] in ("kfac", "sharded", "auto")]
)
def test_every_inverse_is_computed_by_one_process(results, alone, world, name):
    work = [results[world, rank, name, True]["inverted"] for rank in range(world)]
    assert sum(work) == alone[world, name]["inverted"]
    assert max(work) < sum(work)
    assert min(work) > 0 or name == "sharded"  # which has fewer blocks than processes


@pytest.mark.parametrize("world", WORLDS)
def test_sharded_inverses_are_kept_once(results, alone, world):
    def size(run):
        return sum(tensor.numel() for tensor in run["curvature"][-1])

    whole = size(alone[world, "sharded"])
    factors = sum(tensor.numel() for tensor in alone[world, "sharded"]["curvature"][-1]) / 2
    kept = [size(results[world, rank, "sharded", True]) - factors for rank in range(world)]
    assert sum(kept) == whole - factors
    assert max(kept) < whole - factors
    assert size(results[world, 0, "kfac", True]) == whole


@pytest.mark.parametrize("world", WORLDS)
def test_a_quantity_that_fails_in_one_process_is_left_out_in_all(results, alone, world):
    for rank in range(world):
        for values, others in zip(
            results[world, rank, "failing", True]["values"], alone[world, "failing"]["values"]
        ):
            lost = {
                name for name in others if name.split("/")[1] in ("mean_gsnr", "early_stopping")
            }
            assert len(lost) >= 2
            assert values == pytest.approx(
                {name: v for name, v in others.items() if name not in lost}, rel=1e-6
            )


def test_of_compressed_gradients_the_mean_is_what_arrived_and_the_squares_are_those_of_the_samples(
    results,
):
    """PowerSGD, from the third step on: nothing is corrected."""
    run, (x, y), net = results[3, 0, "compressed", True], batches(3, 1), Net()
    before = [p.detach().clone() for p in net.parameters()]
    velocity = [torch.zeros_like(p) for p in before]
    for step, after in enumerate(run["parameters"]):
        moves = [(p - q) / 0.1 for p, q in zip(before, after, strict=True)]
        arrived = torch.cat([(m - 0.9 * v).flatten() for m, v in zip(moves, velocity, strict=True)])
        rows = _gradients(net, x[step].flatten(0, 1), y[step].flatten())
        is_compressed = bool((arrived - rows.mean(0)).norm() > 0.01 * arrived.norm())
        assert is_compressed is (step >= 2)
        values = run["values"][step]
        trace = (rows.square().sum(1).mean() - arrived @ arrived) / (1 - 1 / len(rows))
        expected = {
            "grad_norm": arrived.norm(),
            "grad_variance": trace,
            "sample_norm_max": rows.norm(dim=1).max(),
        }
        for name, value in expected.items():
            assert values[f"curvature/{name}"] == pytest.approx(value.item(), rel=1e-5), (
                name,
                step,
            )
        velocity, before = moves, after
        for p, new in zip(net.parameters(), after, strict=True):
            p.data.copy_(new)


def test_monte_carlo_quantities_converge_to_those_of_one_process(results, alone):
    found, expected = (
        results[2, 0, "monte_carlo", True]["values"],
        alone[2, "monte_carlo"]["values"],
    )
    for values, others in zip(found, expected, strict=True):
        assert {name.split("/")[1] for name in values} == {*SAMPLED}
        assert values == pytest.approx(others, rel=0.2)


@pytest.mark.parametrize("world", WORLDS)
def test_every_process_measures_samples_of_its_own(results, world):
    """Estimates are those of the formulas with the chosen samples of all processes, about the gradient of all."""
    runs = [results[world, rank, "some_samples", True] for rank in range(world)]
    (x, y), net = batches(world, 2), Net()
    assert len({tuple(torch.cat(run["subsets"]).tolist()) for run in runs}) == world
    for step in range(STEPS):
        rows = torch.stack(
            [
                _gradients(net, x[i, r], y[i, r])
                for i in (2 * step, 2 * step + 1)
                for r in range(world)
            ]
        )
        subsets = torch.stack([run["subsets"][i] for i in (2 * step, 2 * step + 1) for run in runs])
        chosen = torch.stack([part[subset] for part, subset in zip(rows, subsets)]).flatten(0, 1)
        mean, samples = rows.mean((0, 1)), 2 * world * SIZE
        deviation = chosen - mean
        trace = deviation.square().sum(1).mean() / (1 - 1 / samples)
        along = (deviation @ mean).square().mean() / (1 - 1 / samples)
        across = (trace - along / (mean @ mean)).clamp(min=0)
        variance = deviation.square().mean(0) / (1 - 1 / samples)
        expected = {
            "grad_norm": mean.norm(),
            "grad_variance": trace,
            "grad_signal": mean @ mean - trace / samples,
            "norm_test": (trace / samples).sqrt() / mean.norm(),
            "inner_product_test": (along / samples).sqrt() / (mean @ mean),
            "orthogonality_test": (across / samples).sqrt() / mean.norm(),
            "mean_gsnr": (mean.square() / variance).mean(),
            "sample_norm_max": chosen.norm(dim=1).max(),
        }
        for name, value in expected.items():
            assert runs[0]["values"][step][f"curvature/{name}"] == pytest.approx(
                value.item(), rel=1e-5
            ), (name, step)
        for p, after in zip(net.parameters(), runs[0]["parameters"][step], strict=True):
            p.data.copy_(after)


def _gradients(net, x, y):
    """Of every sample, [N, P]."""
    rows = []
    for n in range(len(x)):
        loss = F.cross_entropy(net.net(x[n : n + 1]), y[n : n + 1])
        rows.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*net.parameters()])])
        )
    return torch.stack(rows)
