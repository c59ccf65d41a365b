"""Nested tensors: as the batch that is padded they are samples; as values of the network they are refused."""

import pytest
import torch
from torch import nn
from zoo import assert_close

from lightning_curv import curvature, record
from lightning_curv.errors import UnsupportedError
from lightning_curv.extensions import GGNMP, HMP, KFAC, PCHMP, BatchGrad, DiagGGNExact, DiagHessian

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
LAYOUTS = {"jagged": torch.jagged, "strided": torch.strided}
NETWORKS = {  # from a nested tensor to numbers
    "padded": lambda net, t: torch.nested.to_padded_tensor(net(t), 0.0),
    "values": lambda net, t: net(t).values(),
    "unbound": lambda net, t: torch.cat(net(t).unbind()),
    "beside": lambda net, t: torch.nested.to_padded_tensor(t * net[0].weight.sum(), 0.0),
}


def problem(layout):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    sequences = [torch.randn(length, 3).double() for length in (2, 4, 1)]
    return net, sequences, torch.nested.nested_tensor(sequences, layout=LAYOUTS[layout])


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_nested_batch_that_is_padded_has_its_components_as_samples(layout, factor):
    net, sequences, nested = problem(layout)
    with curvature(BatchGrad(), DiagHessian()):
        padded = torch.nested.to_padded_tensor(nested * factor if factor > 1 else nested, 0.0)
        net(padded).square().sum().backward()
    rows = torch.zeros(3, 4, 3).double()
    for row, sequence in zip(rows, sequences):
        row[: len(sequence)] = factor * sequence
    expected = [torch.autograd.grad(net(row).square().sum(), net[0].weight)[0] for row in rows]
    assert_close(net[0].weight.grad_batch, torch.stack(expected))


@pytest.mark.parametrize("name", NETWORKS)
def test_nested_values_of_a_network_are_refused(name):
    net, _, nested = problem("jagged")

    def loss():
        return NETWORKS[name](net, nested).square().sum()

    plain = torch.autograd.grad(loss(), net[0].weight)[0]
    with record():
        recorded = loss()
    assert torch.equal(torch.autograd.grad(recorded, net[0].weight)[0], plain)
    for extension in (BatchGrad(), HMP(), GGNMP(), PCHMP(), DiagGGNExact(), DiagHessian(), KFAC()):
        with (
            pytest.raises(UnsupportedError, match=r"found a nested tensor.*Pad it before"),
            curvature(extension),
        ):
            loss().backward()


def test_values_of_a_nested_batch_are_no_samples_of_one_row():
    net, _, nested = problem("jagged")
    with record():
        loss = net(nested.values()).square().sum()
    with pytest.raises(UnsupportedError), curvature(BatchGrad(), batch_size=3):
        loss.backward()
