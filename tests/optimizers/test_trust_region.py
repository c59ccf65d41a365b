"""Bounds of a step, and steps that are taken back."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_curv import KFACOptimizer, curvature
from lightning_curv.losses.likelihoods import Gaussian, Poisson
from lightning_curv.optimizers.step_size.calibration import averaged_curvature
from lightning_curv.optimizers.step_size.trust_region import TrustRegion


@pytest.mark.parametrize(
    "likelihood",
    [
        Gaussian(torch.tensor([[0.5, 2.0, 0.1]])),
        Poisson(torch.ones(1, 3), torch.tensor([[0.1, 3.0, 50.0]])),
        Poisson(torch.ones(1, 3), torch.tensor([[0.1, 3.0, 50.0]]), torch.ones(1, 3)),
    ],
    ids=["gaussian", "log_rates", "rates"],
)
def test_random_signs_have_the_curvature_as_their_second_moment(likelihood):
    """By enumeration: a draw is signs times the roots of H, and all signs are equally likely."""
    roots = likelihood.diagonal.sqrt()
    generator = torch.Generator().manual_seed(0)
    drawn = {tuple((likelihood.sample(generator) / roots).flatten().tolist()) for _ in range(100)}
    patterns = set(itertools.product([-1.0, 1.0], repeat=3))
    assert drawn == patterns
    columns = torch.tensor(list(patterns)) * roots
    torch.testing.assert_close(
        columns.T @ columns / len(patterns), likelihood.diagonal.diag_embed()[0]
    )


def trained(steps, spoil=lambda step, net: None, **settings):
    """A network, its optimizer and the parameters before every step; `spoil` acts between steps."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    x = torch.randn(64, 3, dtype=torch.float64)
    y = x[:, :1] * x[:, 1:2]
    optimizer = KFACOptimizer(net.parameters(), curvature="exact", **settings)
    seen = []
    for step in range(steps):
        spoil(step, net)
        seen.append([p.detach().clone() for p in net.parameters()])
        optimizer.zero_grad()
        with curvature(*optimizer.required_extensions()):
            F.mse_loss(net(x), y).backward()
        optimizer.step()
    return net, optimizer, seen


def multiply_last_update(optimizers, factor):
    """Make the last update of every parameter longer, as a model that is far off does."""

    def spoil(step, net):
        if step == 4:
            optimizer = optimizers[0]
            for p in net.parameters():
                update = optimizer.state[p]["velocity"]
                p.data.add_(update, alpha=factor - 1)
                update.mul_(factor)

    return spoil


def test_a_step_that_leads_astray_is_taken_back(monkeypatch):
    made = []
    original = KFACOptimizer.__init__

    def remember(self, *args, **kwargs):
        original(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(KFACOptimizer, "__init__", remember)
    net, optimizer, seen = trained(5, multiply_last_update(made, 1e3))
    assert optimizer.last_step["rejected"]
    for p, before in zip(net.parameters(), seen[3]):
        torch.testing.assert_close(p.detach(), before)
    assert optimizer.region.radius < 1
    assert optimizer.steps == 4  # a step that was taken back is none
    made.clear()
    _, optimizer, _ = trained(5, multiply_last_update(made, 1e3), safeguards=False)
    assert "rejected" not in optimizer.last_step


def test_layers_move_by_less_than_their_length_however_far_the_targets_are():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 1))
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = KFACOptimizer(net.parameters())
    with curvature(*optimizer.required_extensions()):
        F.mse_loss(net(torch.randn(32, 3)), torch.full((32, 1), 1e6)).backward()
    optimizer.step()
    changes = [
        float((p.detach() - b).norm() / b.norm())
        for p, b in zip(net.parameters(), before)
        if p.dim() > 1
    ]
    assert sum(sorted(changes)[:-1]) <= 1.0 + 1e-5


def test_a_single_layer_is_not_bounded():
    """Least squares of targets far away: the model is exact, and one step solves it."""
    layer, x = nn.Linear(2, 1, dtype=torch.float64), torch.randn(100, 2, dtype=torch.float64)
    y = 1e4 + 1e3 * x[:, :1]
    optimizer = KFACOptimizer(layer.parameters(), curvature="exact", damping=1e-12)
    with curvature(*optimizer.required_extensions()):
        F.mse_loss(layer(x), y).backward()
    optimizer.step()
    torch.testing.assert_close(layer(x), y, rtol=1e-6, atol=1e-3)


def test_steps_of_a_log_density_go_a_nat_at_most():
    layer, x = nn.Linear(2, 1, dtype=torch.float64), torch.randn(100, 2, dtype=torch.float64)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = KFACOptimizer(layer.parameters(), curvature="exact")
    with curvature(*optimizer.required_extensions()):
        F.poisson_nll_loss(layer(x), torch.full((100, 1), 1e4)).backward()
    optimizer.step()
    # Rates are one at the start, where the curvature of the loss by the outputs is one.
    assert 0.5 * layer(x).square().mean().item() == pytest.approx(1.0, rel=1e-6)


def test_radius_grows_only_after_steps_that_kept_their_promise():
    def after(losses):
        region = TrustRegion()
        region.memory["radius"] = 0.25
        for loss in losses:
            region.accept(loss)
            region.took(layers=region.radius, promised=1.0, share=0.0)
        return region.radius

    assert after([10.0, 9.5]) == 0.5
    assert after([10.0, 9.9]) == 0.25
    assert after([10.0, 9.5, 9.0, 8.5, 8.0, 7.5]) == 2.0


def test_noise_of_small_batches_is_no_failure():
    """Losses of single samples of a squared error: none of a thousand is suspected twice in a row."""
    noise = torch.distributions.Chi2(torch.tensor(1.0))
    torch.manual_seed(0)
    region, suspected = TrustRegion(), 0
    for loss in noise.sample((1000,)).tolist():
        suspected += region.suspects(loss)
        region.accept(loss)
        region.took(layers=0.1, promised=0.0, share=0.0)
    assert suspected < 30


def test_steps_become_shorter_where_the_loss_stalls_and_longer_where_it_falls():
    region = TrustRegion()
    for step in range(200):
        region.accept(1.0 + 0.1 * (-1) ** step, samples=64)
    stalled = region.memory["multiple"]
    assert stalled < 0.5
    for step in range(100):
        region.accept(0.9**step, samples=64)
    assert stalled < region.memory["multiple"] < 1
    fixed = TrustRegion()
    for _ in range(200):
        fixed.accept(1.0)
    assert fixed.memory["multiple"] == 1


def test_curvature_of_small_batches_is_averaged_per_length():
    memory = {}
    first = averaged_curvature(memory, [[4.0]], [2.0], samples=16)
    assert first == [[4.0]]
    # Decay 1/2: the new one has the weight 1 / (1 + 1/2); lengths count for themselves.
    (second,) = averaged_curvature(memory, [[36.0]], [3.0], samples=16)
    assert second == [pytest.approx(9 * (1 + (4 - 1) / 1.5))]
    # Of a large batch the mean is next to nothing.
    (third,) = averaged_curvature(memory, [[5.0]], [1.0], samples=10**9)
    assert third == [pytest.approx(5.0)]


def test_memory_is_saved():
    _, optimizer, _ = trained(3)
    saved = optimizer.state_dict()["memories"]
    assert saved[0]["weight"] > 1
    assert saved[1]["unit"]
    _, other, _ = trained(1)
    other.load_state_dict(optimizer.state_dict())
    assert other.memories == optimizer.memories
    assert math.isfinite(other.region.radius)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, True),
        ({"safeguards": False}, True),  # of the quadratic model
        ({"lr": 0.1, "momentum": 0.0}, True),  # to be taken back
        ({"lr": 0.1, "safeguards": False}, True),  # of the momentum
        ({"lr": 0.1, "momentum": 0.0, "safeguards": False}, False),
    ],
)
def test_updates_are_kept_where_something_reads_them(settings, kept):
    net, optimizer, _ = trained(3, **settings)
    assert all(("velocity" in optimizer.state[p]) is kept for p in net.parameters())


def test_a_momentum_that_is_set_to_zero_leaves_no_update():
    net, optimizer, _ = trained(3, lr=0.1, safeguards=False)
    optimizer.param_groups[0]["momentum"] = 0.0
    with curvature(*optimizer.required_extensions()):
        F.mse_loss(net(torch.ones(2, 3).double()), torch.ones(2, 1).double()).backward()
    optimizer.step()
    assert not any("velocity" in optimizer.state[p] for p in net.parameters())


def test_weights_are_measured_once_in_a_step(monkeypatch):
    seen = []
    norms = torch._foreach_norm

    def spy(tensors, *order):
        seen.extend(tensor for tensor in tensors if isinstance(tensor, nn.Parameter))
        return norms(tensors, *order)

    monkeypatch.setattr(torch, "_foreach_norm", spy)
    net, _, steps = trained(4)
    weights = [p for p in net.parameters() if p.dim() > 1]
    assert [sum(tensor is weight for tensor in seen) for weight in weights] == [len(steps)] * len(
        weights
    )
