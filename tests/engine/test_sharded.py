"""Models whose parameters are shared among processes."""

import pytest
import torch
from processes import spawn
from sharded_ranks import (
    ACCUMULATED,
    OPTIMIZERS,
    RESHARDED,
    SHARDED,
    TIED,
    WORLD,
    WORLDS,
    Net,
    Tied,
    network,
    run,
    trained,
    union,
    work,
)

REFUSED = {
    "tensor parallel": "UnsupportedError: BatchL2Grad() needs whole parameters in the forward pass, found a `DTensor`",
    "accumulate": "RuntimeError: `accumulate` expects gradients on the sharded parameters",
    "products": "UnsupportedError: GGNMP() needs the parameters of its graph after the pass",
    "kfac": "UnsupportedError: Curvature needs parameters that are whole in the forward pass",
    "private": "UnsupportedError: Private steps need parameters that are whole in the forward pass",
}


@pytest.fixture(scope="module")
def all_results(tmp_path_factory):
    """What every process found, by the number of processes."""
    folder = tmp_path_factory.mktemp("sharded")
    spawn(work, str(folder), world=max(WORLDS), groups=WORLDS)
    return {w: [torch.load(folder / f"{w} {rank}.pt") for rank in range(w)] for w in WORLDS}


@pytest.fixture(scope="module")
def results(all_results):
    """What two processes found."""
    return all_results[WORLD]


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_refused_by_name(results, case):
    for found in results:
        assert found["refusals"][case].startswith(REFUSED[case])


REPLICAS = [(4, name) for name in SHARDED if "replicas" in name]


@pytest.mark.parametrize(("world", "name"), [*((WORLD, name) for name in SHARDED), *REPLICAS])
def test_quantities_are_those_of_whole_parameters(all_results, world, name):
    """They are left on the sharded parameters, of this process' samples; the gradient is that of all."""
    for found in all_results[world]:
        for fields, expected, gradients, means in found["quantities"][name]:
            assert fields.keys() == expected.keys()
            assert len(fields) > 30
            for key, value in expected.items():
                for one, other in zip(flat(fields[key]), flat(value), strict=True):
                    assert close(one, other, name), key
            for one, other in zip(gradients, means, strict=True):
                assert close(one, other.to(one), name)


def flat(value):
    return value if isinstance(value, (list, tuple)) else [value]


def close(one, other, name=""):
    """Equal up to rounding: bfloat16 has eight digits, and sums over ranks another order."""
    relative = 2**-6 if "mixed" in name else 1e-9
    return one.shape == other.shape and torch.allclose(one, other, rtol=relative, atol=relative**2)


@pytest.mark.parametrize(
    ("world", "name"), [*((WORLD, name) for name in ACCUMULATED), (4, "replicas")]
)
def test_micro_batches_are_exchanged_once(all_results, world, name):
    for found in all_results[world]:
        assert all(close(one, other) for one, other in found["accumulated"][name])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "accumulate"), [("lightning", 1), ("lightning, accumulated", 2)])
def test_the_callback_logs_what_one_process_logs_on_the_union_batch(results, name, accumulate):
    values, parameters = trained(Net(), union(WORLD), accumulate)
    assert len(values[-1]) >= 19
    for found in results:
        series, trained_parameters = found[name]
        for step, expected in zip(series, values, strict=True):
            # They are published in single precision, after differences such as 1 − a mean.
            assert step == pytest.approx(expected, rel=1e-6, abs=1e-7)
        assert all(map(close, trained_parameters, parameters))


def test_noise_from_parts_hears_the_gradients_of_sharded_parameters(results):
    for found in results:
        (first, *_), _ = found["lightning, parts"]
        assert first["curvature/grad_variance"] > 0
        assert first == pytest.approx(results[0]["lightning, parts"][0][0])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_end_where_one_process_ends_on_the_union_batch(results, name):
    expected = run(network(), OPTIMIZERS[name], union(WORLD))
    for found in results:
        assert all(map(close, found["optimized"][name, False], expected))
        # Sharded inverses are not saved.
        for one, other in zip(
            found["optimized"].get((name, True), expected), expected, strict=True
        ):
            assert close(one, other)


@pytest.mark.parametrize("name", TIED)
def test_optimizers_of_tied_and_frozen_parameters_end_where_one_process_ends(results, name):
    expected = run(Tied(), OPTIMIZERS[name], union(WORLD))
    for found in results:
        assert all(map(close, found["optimized"][name, "tied"], expected))


def test_optimizers_of_layers_that_are_sharded_and_others_that_are_not(results):
    expected = run(network(), OPTIMIZERS["kfac"], union(WORLD))
    for found in results:
        assert all(map(close, found["optimized"]["kfac", "some"], expected))


@pytest.mark.parametrize("name", RESHARDED)
def test_four_processes_save_and_two_go_on_as_one_process_does(all_results, name):
    """By `torch.distributed.checkpoint`; a mesh of 2 × 2 before, of 2 × 1 after it."""
    batches = union(4)[:2]
    expected = {4: run(network(), OPTIMIZERS[name], batches)}
    expected[WORLD] = run(network(), OPTIMIZERS[name], batches + union(WORLD)[2:])
    for world, all_found in all_results.items():
        for found in all_found:
            assert all(map(close, found["resharded"][name], expected[world]))


def test_state_of_which_a_part_was_saved_or_loaded_is_refused_by_name(all_results):
    for found in all_results[4]:
        for error in found["lost"]:
            assert error.startswith(("RuntimeError: KFACOptimizer expects", "RuntimeError: "))
            assert "makes a step of learning rate 0 to see what that is" in error


def test_kept_jacobians_outlive_the_gathered_parameters(results):
    for found in results:
        for plain, sharded in found["kept"]:
            assert close(sharded, plain)
            assert plain.abs().max() > 0.01
