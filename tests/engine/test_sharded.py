"""Models whose parameters are shared among processes."""

import itertools

import pytest
import torch
from checkpoint_ranks import BEFORE, CASES, FITS, WORLDS, Run, fit, in_one_process, work
from processes import spawn
from sharded_ranks import (
    ACCUMULATED,
    OPTIMIZERS,
    SHARDED,
    TIED,
    WORLD,
    Net,
    Tied,
    network,
    on_processors,
    run,
    trained,
    union,
)

pytestmark = on_processors

REFUSED = {
    "tensor parallel": "UnsupportedError: BatchL2Grad() needs whole parameters in the forward pass, found a `DTensor`",
    "accumulate": "RuntimeError: `accumulate` expects gradients on the sharded parameters",
    "products": "UnsupportedError: GGNMP() needs the parameters of its graph after the pass",
    "kfac": "UnsupportedError: Curvature needs parameters that are whole in the forward pass",
    "private": "UnsupportedError: Private steps need parameters that are whole in the forward pass",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where processes write what they find, and their checkpoints."""
    folder = tmp_path_factory.mktemp("sharded")
    spawn(work, str(folder), world=max(WORLDS), groups=WORLDS)
    return folder


@pytest.fixture(scope="module")
def rounds(folder):
    """What every process found in every round."""
    return [
        [torch.load(folder / f"{number} {rank}.pt") for rank in range(world)]
        for number, world in enumerate(WORLDS)
    ]


@pytest.fixture(scope="module")
def all_results(rounds):
    """What every process found, by the number of processes."""
    return {len(found): found for found in rounds}


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
    """Equal up to rounding: bfloat16 has eight digits, sums over ranks another order, private sums a grid."""
    relative = 2**-6 if "mixed" in name else 1e-9
    absolute = 1e-9 if "private" in name else relative**2
    return one.shape == other.shape and torch.allclose(one, other, rtol=relative, atol=absolute)


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
        for resume in (False, True):
            assert all(map(close, found["optimized"][name, resume], expected))


@pytest.mark.parametrize("name", TIED)
def test_optimizers_of_tied_and_frozen_parameters_end_where_one_process_ends(results, name):
    expected = run(Tied(), OPTIMIZERS[name], union(WORLD))
    for found in results:
        assert all(map(close, found["optimized"][name, "tied"], expected))


def test_optimizers_of_layers_that_are_sharded_and_others_that_are_not(results):
    expected = run(network(), OPTIMIZERS["kfac"], union(WORLD))
    for found in results:
        assert all(map(close, found["optimized"]["kfac", "some"], expected))


def named(case):
    return " ".join(map(str, case))


def resumed(rounds, kind, case):
    """What the processes found that went on."""
    return [found[kind][case] for found in itertools.chain(*rounds) if case in found[kind]]


@pytest.mark.filterwarnings("ignore:(?s).*(repeatable noise|finds its learning rate)")
@pytest.mark.parametrize("case", CASES, ids=named)
def test_a_run_goes_on_as_if_it_had_not_been_interrupted(rounds, case):
    before, after, kind, name, _ = case
    expected = in_one_process(kind, name, before, after)
    found = resumed(rounds, "loops", case)
    assert len(found) == after
    for parameters in found:
        assert all(close(*pair, name) for pair in zip(parameters, expected, strict=True))


def uninterrupted(before, after, name):
    """The parameters after a run of one process that has the batches of all, and how far they have come."""
    return fit(Run(name, lambda step: before if step < BEFORE else after))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", FITS, ids=named)
def test_a_run_of_a_trainer_goes_on_as_if_it_had_not_been_interrupted(rounds, case):
    before, after, name, _ = case
    expected, distance = uninterrupted(before, after, name)
    found = resumed(rounds, "fits", case)
    assert len(found) == after
    for parameters, its_distance in found:
        assert all(map(close, parameters, expected))
        assert its_distance == pytest.approx(distance, rel=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_a_process_without_sharding_goes_on_from_one_file(folder):
    expected, _ = uninterrupted(WORLD, 1, "kfac")
    found, _ = fit(Run("kfac"), ckpt_path=folder / f"fit {WORLD} kfac one file")
    assert all(map(close, found, expected))


def test_a_part_of_the_state_is_refused_by_name(results):
    """Of a fresh Adam torch asks for no moments, and flattened states have no place for what is packed."""
    for found in results:
        assert found["parts"]["moments"].startswith(
            "RuntimeError: DPOptimizer expects all of its state, found a part"
        )
        assert found["parts"]["flattened"].startswith(
            "NotImplementedError: Flattening optimizer state_dict"
        )


def test_a_trial_step_counts_for_nothing(results):
    """Torch makes one to see what state there will be: no noise is drawn, nothing is accounted, no parameter moves."""
    for found in results:
        names, spent, same_noise, same_parameters = found["trial"]
        assert {"exp_avg", "exp_avg_sq", "packed"} <= names
        assert spent == (0, [])
        assert same_noise
        assert same_parameters


def test_kept_jacobians_outlive_the_gathered_parameters(results):
    for found in results:
        for plain, sharded in found["kept"]:
            assert close(sharded, plain)
            assert plain.abs().max() > 0.01
