"""Layers that only some processes use: nobody waits for anybody, and all end with the same parameters."""

import pytest
import torch
from processes import spawn
from uneven_ranks import CASES, work


@pytest.fixture(scope="module", params=[2, 3])
def results(request, tmp_path_factory):
    """What every process ended with, by optimizer and pattern."""
    world, folder = request.param, tmp_path_factory.mktemp("uneven")
    spawn(work, str(folder), world=world)
    return {
        case: [torch.load(folder / f"{case[0]} {case[1]} {rank}.pt") for rank in range(world)]
        for case in CASES
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_all_processes_end_with_the_same_parameters(results, case):
    (before, first), *others = results[case]
    for _, other in others:
        assert all(map(torch.equal, first, other))
    assert not torch.equal(before[0], first[0])  # the trunk has learned
    used = case[1] != "nobody"
    assert torch.equal(before[2], first[2]) is not used
