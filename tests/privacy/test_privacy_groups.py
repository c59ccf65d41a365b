"""A clip norm for every parameter group, against single samples in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_curv import curvature
from lightning_curv.optimizers import (
    DPSGD,
    GradientCanaries,
    PerGroupClipping,
    PoissonSampling,
    PrivacyAccountant,
)


class Network(nn.Module):
    """A convolution and a tied layer in the body, a head, and a layer that is not used."""

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleList([nn.Conv1d(2, 4, 3, padding=1), nn.Linear(5, 5), nn.LayerNorm(5)])
        self.head, self.unused = nn.Linear(20, 3), nn.Linear(2, 2)

    def forward(self, x):
        convolution, linear, norm = self.body
        return self.head(norm(linear(linear(convolution(x)).tanh())).flatten(1))


def make(clip_norms=(0.02, 0.3), default=0.7, **settings):
    torch.manual_seed(0)
    net = Network().double()
    groups = [
        {"params": list(net.body.parameters()), "clip_norm": clip_norms[0]},
        {"params": list(net.head.parameters()), "clip_norm": clip_norms[1]},
        {"params": list(net.unused.parameters())},
    ]
    options = {
        "noise_multiplier": 0.0,
        "expected_batch_size": 1.0,
        "clipping": "per_group",
        "clip_norm": default,
    }
    return net, DPSGD(groups, lr=0.1, **{**options, **settings})


def data(n=12):
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(n, 2, 5, generator=generator, dtype=torch.float64)
    return X * torch.linspace(0.01, 3, n, dtype=torch.float64)[:, None, None], torch.arange(n) % 3


def backward(net, optimizer, keep=slice(None)):
    X, y = data()
    with curvature(*optimizer.extensions, batch_size=len(X[keep])):
        F.cross_entropy(net(X[keep]), y[keep]).backward()


def clipped(net, limits):
    """Σ of samples one by one, every group clipped on its own; and how many samples were clipped in each."""
    groups = [list(net.body.parameters()), list(net.head.parameters())]
    totals, counts = [[torch.zeros_like(p) for p in group] for group in groups], [0, 0]
    for x, y in zip(*data()):
        loss = F.cross_entropy(net(x[None]), y[None])
        for i, group in enumerate(groups):
            grads = torch.autograd.grad(loss, group, retain_graph=True)
            norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
            counts[i] += norm > limits[i]
            for total, g in zip(totals[i], grads):
                total += min(1.0, limits[i] / norm) * g
    return [t for group in totals for t in group], counts


@pytest.mark.parametrize("limits", [(2.2, 3.7), (0.02, 0.3), (1e3, 1e3)])
def test_clipped_sum_equals_single_samples(limits):
    net, optimizer = make(limits)
    expected, counts = clipped(net, limits)
    if limits == (2.2, 3.7):
        assert all(0 < count < 12 for count in counts)
    backward(net, optimizer)
    optimizer.step()
    for p, total in zip([*net.body.parameters(), *net.head.parameters()], expected):
        torch.testing.assert_close(p.grad, total, rtol=1e-9, atol=1e-12)


def test_one_sample_changes_the_sum_by_no_more_than_the_whole_norm():
    net, optimizer = make((0.02, 0.01))
    assert optimizer.clip_norm == math.hypot(0.02, 0.01, 0.7)
    for i in range(len(data()[0])):
        backward(net, optimizer, slice(i, i + 1))
        totals = optimizer.statistics.totals()
        assert float(torch.cat([t.flatten() for t in totals]).norm()) <= math.hypot(0.02, 0.01) * (
            1 + 1e-12
        )
        optimizer.zero_grad()


def test_noise_is_that_of_the_whole_norm():
    drawn = []
    for seed in range(30):
        net, optimizer = make((3.0, 4.0), default=12.0, noise_multiplier=2.0, noise_seed=seed)
        optimizer.step()
        drawn += [p.grad.flatten() for p in net.parameters()]
    assert float(torch.cat(drawn).std()) == pytest.approx(2 * 13.0, rel=0.03)


def test_norms_are_in_the_checkpoint_and_groups_may_be_added():
    _, optimizer = make((0.02, 0.3))
    _, other = make((5.0, 6.0))
    other.load_state_dict(optimizer.state_dict())
    assert other.clip_norm == optimizer.clip_norm == math.hypot(0.02, 0.3, 0.7)
    more = nn.Linear(5, 5).double()
    optimizer.add_param_group({"params": list(more.parameters()), "clip_norm": 2.0})
    assert optimizer.clip_norm == math.hypot(0.02, 0.3, 0.7, 2.0)
    with curvature(*optimizer.extensions, batch_size=12):
        more(data()[0][:, 0] * 1e3).square().sum(1).mean().backward()
    total = torch.cat([t.flatten() for t in optimizer.statistics.totals()])
    assert 2.0 < float(total.norm()) <= 12 * 2.0


def test_samples_that_are_not_finite_in_one_group_count_in_none():
    net, optimizer = make()
    X, y = data()
    X[3] = math.nan
    with curvature(*optimizer.extensions, batch_size=12):
        F.cross_entropy(net(X), y).backward()
    spoilt = optimizer.statistics.totals()
    assert optimizer.statistics.discarded == 1
    optimizer.zero_grad()
    backward(net, optimizer, [i for i in range(12) if i != 3])
    for a, b in zip(spoilt, optimizer.statistics.totals()):
        torch.testing.assert_close(a, b)


def test_schedules_move_the_norm_of_groups_without_one():
    _, optimizer = make((3.0, 4.0), default=lambda step: 12.0 + step)
    optimizer.step()
    assert optimizer.clip_norm == math.hypot(3.0, 4.0, 13.0)


def test_an_audit_of_groups():
    accountant = PrivacyAccountant(PoissonSampling(1.0))
    _, optimizer = make((0.02, 0.3), noise_multiplier=1.0, accountant=accountant)
    canaries = GradientCanaries(optimizer, count=20)
    canaries.backward(range(20))
    optimizer.step()
    assert not canaries.audit(delta=1e-5).refuted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_norms": (0.0, 1.0)}, "`clip_norm` must be positive, found 0.0"),
        ({"default": -1.0}, "`clip_norm` must be positive, found -1.0"),
        ({"clipping": "group"}, "`clipping` must be one of .*'per_group', found 'group'"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_factors_need_the_parameters():
    with pytest.raises(NotImplementedError, match="call `factors_of`"):
        PerGroupClipping(make()[1].optimizer).factors(torch.ones(2, 2), 2)
