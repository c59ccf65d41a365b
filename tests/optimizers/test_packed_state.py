"""State in the form in which `torch.distributed.checkpoint` takes it."""

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.nn import functional as F

from lightning_curv import KFACOptimizer, curvature
from lightning_curv.optimizers.packed_state import packed, unpacked

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def params():
    return [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]


def state():
    values = [{"factors": [torch.eye(2)]}, {}]
    return packed(
        {"state": {1: {"step": 4}}, "param_groups": [{"lr": 0.1}]}, params(), values, steps=3
    )


def test_values_come_back_beside_the_other_state():
    rest, values = unpacked(state(), "Optimizer")
    assert rest == {"state": {1: {"step": 4}}, "param_groups": [{"lr": 0.1}]}
    assert values.keys() == {0, 1}
    assert torch.equal(values[0]["factors"][0], torch.eye(2))
    assert values[1] == {}


def test_of_a_view_only_its_own_numbers_are_kept():
    whole = torch.zeros(100_000)
    saved = packed({"state": {}, "param_groups": []}, params()[:1], [whole[:2]], steps=0)
    assert len(saved["state"][0]["packed"]) < 10_000


def test_state_that_was_not_packed_stays_as_it_is():
    plain = {"state": {0: {"step": 4}}, "param_groups": []}
    assert unpacked(plain, "Optimizer") == (plain, {})


def test_values_that_were_loaded_under_the_number_as_text_replace_those_of_a_fresh_optimizer(
    tmp_path,
):
    """So torch does with what is no tensor in the state of an optimizer."""
    groups = [{"lr": 0.1}]
    fresh = packed({"state": {}, "param_groups": groups}, params(), [None, None], steps=0)
    saved = packed({"state": {}, "param_groups": groups}, params(), ["one", "two"], steps=3)
    checkpoint.save({"optimizer": saved}, checkpoint_id=tmp_path)
    loaded = {"optimizer": fresh}
    checkpoint.load(loaded, checkpoint_id=tmp_path)
    assert {"0", 0} <= loaded["optimizer"]["state"].keys()
    assert unpacked(loaded["optimizer"], "Optimizer")[1] == {0: "one", 1: "two"}


@pytest.mark.parametrize("lost", ["packed", "step", "packed_steps"])
def test_a_value_that_was_not_loaded_is_refused_by_name(lost):
    loaded = state()
    if lost == "packed_steps":
        loaded["state"][1][lost] = torch.zeros(1)
    else:
        del loaded["state"][1][lost]
    with pytest.raises(RuntimeError, match="Optimizer expects all of its state, found a part"):
        unpacked(loaded, "Optimizer")


def test_whole_parameters_have_no_state_that_torch_loads_in_parts(tmp_path):
    model = nn.Linear(2, 1)
    optimizer, fresh = (KFACOptimizer(model.parameters(), lr=0.1) for _ in range(2))
    with curvature(*optimizer.required_extensions()):
        F.mse_loss(model(torch.ones(3, 2)), torch.ones(3, 1)).backward()
    optimizer.step()
    checkpoint.save({"optimizer": optimizer}, checkpoint_id=tmp_path)
    why = "makes a step of learning rate 0 to see what that is"
    with pytest.raises(
        RuntimeError, match=f"KFACOptimizer expects the state of its 1 steps.*{why}"
    ):
        checkpoint.load({"optimizer": fresh}, checkpoint_id=tmp_path)
    model.zero_grad()
    with pytest.raises(RuntimeError, match=why):
        get_optimizer_state_dict(model, fresh)
