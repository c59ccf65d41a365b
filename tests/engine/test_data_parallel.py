"""Loops of one's own under `DistributedDataParallel`, with batches of unequal size."""

import pytest
import torch
from data_parallel_ranks import ALL, HOOKS, SETTINGS, TRAINED, WORLD, train, work
from processes import spawn


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What every process found."""
    folder = tmp_path_factory.mktemp("data_parallel")
    spawn(work, str(folder), world=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in ALL]


def close(one, other):
    return torch.allclose(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("setting", SETTINGS)
def test_quantities_are_those_of_the_samples_of_the_process(results, setting):
    """The gradient is that of all; passes of ours count as none of those after which DDP averages."""
    for found in results:
        for fields, expected, gradients, means in found[setting]:
            assert fields.keys() == expected.keys()
            assert len(fields) > 30
            for key, value in expected.items():
                values = zip(
                    *(v if isinstance(v, (list, tuple)) else [v] for v in (fields[key], value))
                )
                assert all(close(*pair) for pair in values), key
            assert len(gradients) == len(means)
            assert all(map(close, gradients, means))


@pytest.mark.parametrize(("optimizer", "setting"), TRAINED)
def test_optimizers_end_where_one_process_ends_that_accumulates_the_batches(
    results, optimizer, setting
):
    """The mean of the processes' losses is trained: batches of unequal size have equal weight."""
    expected = train(optimizer, setting, ALL)
    for found in results:
        assert all(map(close, found[optimizer, setting], expected))


@pytest.mark.parametrize("optimizer", ["kfac", "diagonal"])
@pytest.mark.parametrize("hook", HOOKS)
def test_compressed_gradients_are_what_optimizers_get_equal_in_all_processes(
    results, hook, optimizer
):
    first, *_ = results[0][hook, optimizer]
    for found in results:
        parameters, gradients, means, _ = found[hook, optimizer]
        assert all(map(torch.equal, parameters, first))
        error = max(float((g - m).norm() / m.norm()) for g, m in zip(gradients, means, strict=True))
        assert 1e-6 < error < (1e-3 if hook == "fp16" else 2)


def test_quantities_where_some_processes_run_out_of_batches(results):
    for found in results:
        for gradients, means in found["join"]:
            assert all(map(close, gradients, means))


@pytest.mark.parametrize("optimizer", ["kfac", "step size"])
def test_optimizers_take_no_steps_in_which_some_processes_take_no_part(results, optimizer):
    for found in results:
        assert found["behind join"] == 1
        taken, error = found["refused", optimizer]
        assert taken == 0
        assert "needs all processes in every step, found a model in `join`" in error
        taken, error = found["ended", optimizer]
        assert taken == 2
        assert "exhausted" in error
