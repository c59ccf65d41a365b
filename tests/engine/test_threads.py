"""Threads that train models of their own do not hear each other's backward passes."""

import sys
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_curv import BatchL2Grad, DiagGGNExact, SumGradSquared, curvature

STEPS = 150


class Reused(nn.Module):
    """One layer, three times."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        for _ in range(3):
            x = self.layer(x).tanh()
        return x


def quantities(net, x, y):
    with curvature(BatchL2Grad(), SumGradSquared(), DiagGGNExact()):
        F.cross_entropy(net(x), y).backward()
    weight = net.layer.weight
    values = [vars(weight).pop(name, None) for name in FIELDS]
    return values


FIELDS = ("batch_l2", "sum_grad_squared", "diag_ggn_exact")


@pytest.fixture
def eager_switches():
    """Threads take turns as often as the interpreter lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_every_thread_gets_its_own_quantities(eager_switches):
    torch.manual_seed(0)
    found, errors = {}, []
    nets = [Reused().double() for _ in range(3)]
    batches = [(torch.randn(5, 6, dtype=torch.float64), torch.arange(5)) for _ in nets]
    expected = [quantities(net, *batch) for net, batch in zip(nets, batches, strict=True)]

    def train(thread):
        try:
            found[thread] = [quantities(nets[thread], *batches[thread]) for _ in range(STEPS)]
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=train, args=(i,)) for i in range(len(nets))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not errors
    for thread, steps in found.items():
        assert len(steps) == STEPS
        for values in steps:
            for value, truth in zip(values, expected[thread], strict=True):
                torch.testing.assert_close(value, truth)


def test_a_graph_of_another_thread_is_freed_by_the_pass_of_this_one():
    """The forward pass runs in one thread, the backward pass in another; a second one is refused."""
    net, x = Reused(), torch.randn(4, 6)
    losses = []

    def forward():
        with curvature(BatchL2Grad()):
            losses.append(F.cross_entropy(net(x), torch.arange(4)))

    thread = threading.Thread(target=forward)
    thread.start()
    thread.join()
    [loss] = losses
    with curvature(BatchL2Grad()):
        loss.backward()
        assert net.layer.weight.batch_l2.shape == (4,)
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
