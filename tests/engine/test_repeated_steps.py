"""What follows from the structure of a step is decided in its first one, not again in those like it."""

import torch
from torch import nn
from torch.nn import functional as F

from lightning_curv import BatchL2Grad, curvature, record
from lightning_curv.recording import row_numbers
from lightning_curv.recording.records import marks
from lightning_curv.terms import term


def step(net, x, y):
    with curvature(BatchL2Grad()):
        F.cross_entropy(net(x), y).backward()
    return [p.batch_l2 for p in net.parameters()]


def test_the_numbers_of_rows_of_a_flattened_batch_are_told_from_others_once(monkeypatch):
    net = nn.Sequential(nn.Flatten(), nn.Linear(8, 3))
    x, y = torch.randn(5, 2, 4), torch.randint(3, (5,))
    first = step(net, x, y)
    taken = []
    original = row_numbers._fingerprint
    monkeypatch.setattr(row_numbers, "_fingerprint", lambda n: (taken.append(n), original(n))[1])
    second = step(net, x, y)
    assert not taken
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_lasting_numbers_have_the_fingerprint_of_any_others():
    numbers = {5: torch.arange(5)[:, None]}
    lasting = row_numbers.LastingNumbers(numbers)
    assert row_numbers.fingerprint(lasting) == row_numbers.fingerprint(numbers)
    moved = row_numbers.LastingNumbers({5: torch.arange(5).flip(0)[:, None]})
    assert row_numbers.fingerprint(moved) != row_numbers.fingerprint(numbers)


def test_the_letters_of_a_term_are_looked_through_once(monkeypatch):
    net = nn.Linear(4, 3)
    x, y = torch.randn(5, 2, 4), torch.randn(5, 2, 3)

    def of_mse():
        with curvature(BatchL2Grad()):
            F.mse_loss(net(x), y).backward()

    of_mse()
    before = term.shared_letters.cache_info().misses
    of_mse()
    assert term.shared_letters.cache_info().misses == before


def test_sums_of_the_networks_values_leave_no_record():
    w = nn.Parameter(torch.ones(3))
    x = torch.randn(4, 3)
    with record():
        values = F.linear(x, torch.eye(3)) * w
        leaf = torch.randn(4, 3, requires_grad=True)
        data = leaf.sin()
        total = data + data
        with torch.no_grad():
            constant = values + values
    assert marks(values.grad_fn).use is not None
    assert marks(total.grad_fn) is None
    assert constant.grad_fn is None
