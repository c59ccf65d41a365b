"""What an error takes down, and what it is told with: one quantity of one parameter, or all of a pass."""

import pytest
import torch
from torch import nn

from lightning_curv import BatchGrad, DiagGGNExact, Extension, Variance, curvature, record
from lightning_curv.engine.backprop import Backprop
from lightning_curv.engine.sum_check import SumCheck
from lightning_curv.extensions import ExactGGN, LossGradient


class Broken(Extension):
    """Fails at biases."""

    savefield = "broken"

    def __init__(self, source):
        self.source = source

    def evaluate(self, jacobian):
        if jacobian.parameter.ndim == 1:
            raise ValueError("on purpose")
        return jacobian.squared_norms()


def loss_of(net):
    output = net(torch.arange(6.0).reshape(3, 2))
    return nn.functional.cross_entropy(output, torch.tensor([0, 1, 0]))


@pytest.mark.parametrize("source", [LossGradient(), ExactGGN()], ids=["own pass", "columns"])
def test_an_error_says_which_quantity_of_which_parameter_it_concerns(source):
    net = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="on purpose") as caught, curvature(Broken(source)):
        loss_of(net).backward()
    notes = getattr(caught.value, "__notes__", [])
    if hasattr(caught.value, "add_note"):  # Python 3.11
        assert notes == ["This concerns Broken() of parameter `0.bias`."]
    assert not hasattr(net[0].weight, "broken")


@pytest.mark.parametrize("source", [LossGradient(), ExactGGN()], ids=["own pass", "columns"])
def test_where_a_pass_goes_on_only_the_quantity_that_failed_is_missing(source):
    net = nn.Linear(2, 2)
    broken, others = Broken(source), [Variance(), BatchGrad(), DiagGGNExact()]
    with record():
        loss = loss_of(net)
    backprop = Backprop(loss, [broken, *others], defer=True)
    backprop.before()
    backprop.run()
    backprop.after()
    ((failed, error),) = backprop.failures
    assert failed == (broken,)
    assert str(error) == "on purpose"
    for p in net.parameters():
        assert not hasattr(p, "broken")
        torch.testing.assert_close(p.grad_batch.sum(0), p.grad)
        assert p.variance.shape == p.diag_ggn_exact.shape == p.shape


def test_gradients_that_do_not_add_up_take_down_all_that_is_made_of_them(monkeypatch):
    def fail(self, jacobian):
        raise RuntimeError("does not add up")

    monkeypatch.setattr(SumCheck, "compare", fail)
    net, of_gradients, of_columns = nn.Linear(2, 2), [Variance(), BatchGrad()], DiagGGNExact()
    with record():
        loss = loss_of(net)
    backprop = Backprop(loss, [of_columns, *of_gradients], check=True, defer=True)
    backprop.before()
    backprop.run()
    backprop.after()
    ((failed, error),) = backprop.failures
    assert {*failed} == {*of_gradients}
    assert str(error) == "does not add up"
    for p in net.parameters():
        assert p.diag_ggn_exact.shape == p.grad.shape
        assert not hasattr(p, "variance")
        assert not hasattr(p, "grad_batch")
