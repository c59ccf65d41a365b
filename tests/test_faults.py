"""What goes wrong in a step stays in it: exceptions, memory, inf and NaN, empty and changing batches."""

import gc
import weakref

import pytest
import torch
from monitoring import Net, assert_nothing_left_behind, assert_same_parameters, fit, kfac, series

from lightning_curv import CurvatureCallback
from lightning_curv.extensions import GGNTraceMC, SumGradSquared
from lightning_curv.extensions.spectrum import HessianTraceMC

pytestmark = pytest.mark.filterwarnings("ignore:At step .* are too small:UserWarning")  # they are, for speed
QUANTITIES = ["default", "mean_gsnr", "hessian_trace"]
FAILING = {
    "mean_gsnr": (SumGradSquared, "evaluate"),
    "ggn_trace": (GGNTraceMC, "evaluate"),
    "hessian_trace": (HessianTraceMC, "compute"),
}


def run_out_of_memory(monkeypatch, owner, method, held):
    """From its sixth call on, that is in the second step or later, after allocating a tensor that is watched."""
    original, calls = getattr(owner, method), []

    def fail(self, argument):
        calls.append(None)
        if len(calls) < 6:
            return original(self, argument)
        tensor = torch.ones(1000)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("out of memory on purpose")

    monkeypatch.setattr(owner, method, fail)


@pytest.mark.parametrize("name", FAILING)
def test_out_of_memory_in_a_quantity_turns_off_that_quantity_alone(monkeypatch, tmp_path, name):
    plain, watched, held = Net(optimizer=kfac), Net(optimizer=kfac), []
    fit(plain, CurvatureCallback(QUANTITIES), tmp_path=tmp_path / "plain")
    run_out_of_memory(monkeypatch, *FAILING[name], held)
    gc.disable()
    try:
        with pytest.warns(UserWarning, match=f"CurvatureCallback stops logging {name}: out of memory") as caught:
            fit(watched, CurvatureCallback(QUANTITIES, strict=False), tmp_path=tmp_path / "watched")
        assert [reference() for reference in held] == [None]
    finally:
        gc.enable()
    assert sum("stops logging" in str(warning.message) for warning in caught) == 1
    for other in ("grad_norm", "grad_variance", "sample_norm_max", *FAILING):
        logged, expected = series(tmp_path / "watched", other), series(tmp_path / "plain", other)
        assert logged.items() <= expected.items()
        assert len(logged) == 8 if other != name else 0 < len(logged) < 8
    assert_same_parameters(plain, watched)
    assert_nothing_left_behind(watched)


@pytest.mark.parametrize("name", FAILING)
def test_out_of_memory_stops_a_strict_run_with_the_name_of_the_quantity(monkeypatch, name):
    net = Net()
    run_out_of_memory(monkeypatch, *FAILING[name], [])
    with pytest.raises(torch.OutOfMemoryError, match=f"out of memory on purpose .*needs this for {name}"):
        fit(net, CurvatureCallback(QUANTITIES))
    assert_nothing_left_behind(net)


def test_what_an_optimizer_needs_is_never_turned_off(monkeypatch):
    from lightning_curv.extensions import JacobianMC

    def fail(self, jacobian):
        raise torch.OutOfMemoryError("out of memory on purpose")

    monkeypatch.setattr(JacobianMC, "evaluate", fail)
    net = Net(optimizer=kfac)
    with pytest.raises(torch.OutOfMemoryError, match=r"^out of memory on purpose$"):
        fit(net, CurvatureCallback(strict=False))
    assert_nothing_left_behind(net)
