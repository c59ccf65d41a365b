"""Private steps of models whose parameters are shared among processes."""

import pytest
import torch
from packages import needs
from private_ranks import (
    CLIPPING,
    FORMS,
    PRIVATE,
    RUNS,
    Net,
    accumulated,
    batch,
    batches_of,
    fit,
    network,
    observed,
    private,
    trained,
    union,
    values,
    work,
)
from processes import spawn
from sharded_ranks import alone, on_processors
from torch.nn import functional as F

from lightning_curv import PrivacyCallback

needs("dp_accounting")
pytestmark = [pytest.mark.filterwarnings("ignore"), on_processors]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the processes write."""
    folder = tmp_path_factory.mktemp("private")
    spawn(work, str(folder), world=4, groups=(4, 2))
    return folder


@pytest.fixture(scope="module")
def all_results(folder):
    """What every process found, by the number of processes."""
    return {
        w: [torch.load(folder / f"{w} {r}.pt", weights_only=False) for r in range(w)]
        for w in (4, 2)
    }


@pytest.fixture(scope="module")
def results(all_results):
    """What two processes found."""
    return all_results[2]


def close(one, other, relative=1e-9):
    return one.shape == other.shape and torch.allclose(one, other, rtol=relative, atol=relative)


CASES = [(2, name, "flat") for name in PRIVATE]
CASES += [(2, "layers", rule) for rule in CLIPPING]
CASES += [(4, name, "flat") for name in PRIVATE if "replicas" in name or name == "layers"]


@pytest.mark.parametrize(("world", "name", "clipping"), CASES)
def test_steps_are_those_of_one_process_on_the_union_batch(all_results, world, name, clipping):
    """With the same noise, in batches of unequal size, some of them empty in one process or in all."""
    expected = trained(alone(name), union(world), clipping=clipping)
    without_noise = trained(alone(name), union(world), clipping=clipping, noise_multiplier=0.0)
    assert not close(expected[0][0], without_noise[0][0], relative=1e-2)
    for found in all_results[world]:
        for ours, theirs in zip(found["steps"][name, clipping], expected, strict=True):
            assert len(ours) == len(theirs) >= 4
            assert all(map(close, ours, theirs))


@pytest.mark.parametrize("name", ["root", "layers"])
def test_passes_of_one_step_are_clipped_apart_and_steps_without_a_pass_leave_nothing_stale(
    results, name
):
    """FSDP leaves the outermost parameters gathered behind a pass for validation: the step must be seen."""
    batches = [[b[step] for b in map(batches_of, range(2))] for step in range(4)]
    expected = accumulated(alone(name), [tuple(map(torch.cat, zip(*step))) for step in batches])
    for found in results:
        assert all(map(close, found["accumulated"][name], expected))


def test_replicas_have_the_same_bits(all_results):
    assert all(found["identical"] for found in all_results[4])


def test_noise_is_drawn_once_for_every_entry_and_independent_over_parts(results):
    """The deviation is σC in every part; no two entries share noise, nor do an entry and the next step."""
    released, _ = results[0]["noise"]
    steps, entries = released.shape
    assert torch.equal(released, results[1]["noise"][0])
    for found in results:
        part = found["noise"][1] / 3.0  # σC
        count = part.numel()
        assert 0 < part.shape[1] < entries
        assert abs(float(part.mean())) < 5 / count**0.5
        assert abs(float(part.square().mean()) - 1) < 5 * (2 / count) ** 0.5
    correlations = torch.corrcoef(released.T) - torch.eye(entries)
    assert float(correlations.abs().max()) < 6 / steps**0.5
    in_time = (released[1:] * released[:-1]).mean(0) / 9.0
    assert float(in_time.abs().max()) < 6 / steps**0.5


RAW = "RuntimeError: Expected gradients from backward passes inside `curvature(*optimizer.extensions)`, found one"


@pytest.mark.parametrize("attack", ["no private pass", "added to a release", "added to a part"])
def test_no_raw_gradient_reaches_the_parts_of_the_inner_optimizer(results, attack):
    assert all(found["attacks"][attack].startswith(RAW) for found in results)


def test_a_raw_gradient_in_one_process_ends_the_step_in_all(results):
    assert results[0]["one process"].startswith(RAW)
    assert results[1]["one process"].startswith("OtherProcessError: Expected process 0")
    assert RAW in results[1]["one process"]


def test_a_private_pass_stores_no_gradient_and_frees_the_parameters(results):
    """What an ordinary pass has left with FSDP is in no step."""
    for found in results:
        stored, gathered, clean, mixed = found["leftovers"]
        assert len(stored) == 6
        assert not any(stored)
        assert not any(gathered)
        assert all(map(close, mixed, clean))


def test_other_leaves_get_ordinary_gradients(results):
    """The mean over the processes by a parameter that the optimizer lacks, and by inputs their own."""
    model, means = network(), []
    for rank, found in enumerate(results):
        x, y = batch(rank, 0, 3)
        x.requires_grad_()
        loss = F.cross_entropy(model(x), y)
        raw, of_input = torch.autograd.grad(loss, [model[0].weight, x])
        means.append(raw / 2)
        assert close(found["bystander"][1], of_input)
        assert found["bystander"][2] is None
        assert found["bystander"][3].abs().max() > 0
    assert close(results[0]["bystander"][0], sum(means))


def test_another_quantity_beside_a_private_pass_leaves_the_step_private(results):
    model = network()
    optimizer = private(model)
    expected = trained(model, [tuple(map(torch.cat, zip(batch(0, 0, 3), batch(1, 0, 3))))])[0]
    assert optimizer.steps == 0
    for rank, found in enumerate(results):
        ours, norms = found["observed"]
        assert all(map(close, ours, expected))
        _, of_whole_parameters = observed(network(), rank)
        assert all(map(close, norms, of_whole_parameters))


def test_clipping_bounds_a_sample_in_mixed_precision(results):
    """The sum is one of float32, whatever the network runs in, and only one process has the sample."""
    for found in results:
        grads = found["lone sample"]
        norm = float(torch.cat([g.double().flatten() for g in grads]).norm())
        assert all(g.dtype == torch.float32 for g in grads)
        assert norm <= 1e-3 * (1 + 2**-20)
        assert norm >= 1e-3 * (1 - 2**-6)


def test_a_mesh_of_some_processes_is_refused_by_name(all_results):
    expected = (
        "UnsupportedError: Private steps need all 4 processes to share the batch, found a mesh of 2"
    )
    for found in all_results[4]:
        messages, groups = found["refused mesh"]
        assert all(error.startswith(expected) for error in messages)
        assert groups == 1


def test_audits_are_refused_by_name(results):
    expected = (
        "UnsupportedError: An audit needs whole parameters in every process, found sharded ones"
    )
    assert all(found["audit"].startswith(expected) for found in results)


@pytest.mark.parametrize("name", RUNS)
def test_lightning_trains_as_one_process_does(results, name):
    """Batches of the same draw, empty ones among them, under the same account."""
    size, accumulate = RUNS[name]
    net, callback = Net(), PrivacyCallback(seed=2)
    fit(net, callback, 2 * size, accumulate_grad_batches=accumulate)
    for found in results:
        parameters, history = found["lightning"][name]
        assert history == callback.accountant.history
        assert all(map(close, parameters, values(net)))


@pytest.fixture(scope="module")
def uninterrupted():
    """The parameters and the account of one process that makes both epochs."""
    net, callback = Net(), PrivacyCallback(seed=2)
    fit(net, callback, 8, max_epochs=2)
    return values(net), callback.accountant.history


@pytest.mark.parametrize("form", FORMS)
def test_a_resumed_run_ends_where_an_uninterrupted_one_ends(results, uninterrupted, form):
    expected, history = uninterrupted
    for found in results:
        parameters, resumed_history = found["resumed"][form]
        assert resumed_history == history
        assert all(map(close, parameters, expected))


def test_a_process_without_sharding_goes_on_from_one_file(results, folder, uninterrupted):
    expected, history = uninterrupted
    net, callback = Net(), PrivacyCallback(exact_resume=True)
    fit(net, callback, 8, max_epochs=2, ckpt_path=folder / "one file")
    assert callback.accountant.history == history
    assert all(map(close, values(net), expected))


@pytest.mark.parametrize("part", [False, True])
def test_who_writes_into_sharded_weights_is_found(results, part):
    for found in results:
        assert (
            "found that something else changed `net.0.weight` around a batch"
            in found["watched"][part]
        )


def test_half_precision_of_the_network_is_refused_in_batches_that_shrink(results):
    for found in results:
        assert (
            "`same_shapes=True` where parameters are of half precision" in found["watched"]["half"]
        )
