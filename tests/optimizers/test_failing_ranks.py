"""An error in one process ends the others at once, with its name and its reason."""

import pytest
import torch
from failing_ranks import CASES, work
from processes import spawn


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The errors of both processes, and their warnings."""
    folder = tmp_path_factory.mktemp("failing")
    spawn(work, str(folder))
    return {case: [torch.load(folder / f"{case} {rank}.pt") for rank in (0, 1)] for case in CASES}


@pytest.mark.parametrize(
    "case", [case for case in CASES if case not in ("mistake_of_the_user", "recovered")]
)
def test_the_others_name_the_process_and_the_reason(results, case):
    (waiting, _), (failed, _) = results[case]
    reason = CASES[case][1]
    assert failed.startswith(reason)
    assert waiting.startswith("OtherProcessError: Expected process 1 to take part in this step")
    assert reason in waiting


def test_an_error_of_torch_about_a_lost_connection_is_explained(results):
    """A process that waits in a collective of torch's own ends when the connection does."""
    (waiting, told), (failed, _) = results["mistake_of_the_user"]
    assert failed == CASES["mistake_of_the_user"][1]
    assert not waiting.startswith("OtherProcessError")
    assert len(told) == 1
    assert "Expected process 1" in told[0]
    assert failed in told[0]


def test_who_has_recovered_from_the_same_error_waits_for_the_others(results):
    for error, told in results["recovered"]:
        assert error == "no error"
        assert not told
