"""A step whose flags and numbers the host reads later is the one that it makes when it reads everything at once."""

import math
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_curv import DiagGGNOptimizer, KFACOptimizer, curvature
from lightning_curv.optimizers.linear_algebra import running_mean
from lightning_curv.optimizers.linear_algebra.readings import Readings, Surprise
from lightning_curv.optimizers.step.pending import Watch
from lightning_curv.optimizers.step_size.trust_region import TrustRegion

N = 16
FIXED = {"factor_interval": 1, "inverse_interval": 1}
OPTIMIZERS = {
    "KFAC": KFACOptimizer,
    "KFAC, no safeguards": lambda p: KFACOptimizer(p, safeguards=False),
    "KFAC, measured in every step": lambda p: KFACOptimizer(p, factor_interval=1),
    "KFAC, fixed": lambda p: KFACOptimizer(p, lr=0.3, weight_decay=0.01, **FIXED),
    "KFAC, fixed damping": lambda p: KFACOptimizer(p, lr=0.3, damping=0.03, factor_interval=3),
    "EKFAC": lambda p: KFACOptimizer(p, lr=0.3, eigen=True),
    "diagonal": lambda p: DiagGGNOptimizer(p, weight_decay=0.01),
    "diagonal, elementwise": lambda p: DiagGGNOptimizer(p, lr=0.03, bound="elementwise"),
    "diagonal, automatic": lambda p: DiagGGNOptimizer(p, lr="auto", damping="auto"),
}
AUTOMATIC = ("KFAC", "KFAC, measured in every step", "diagonal, automatic")


@pytest.fixture
def later(monkeypatch):
    """Makes the processor a device for which the host does not wait."""

    def switch():
        monkeypatch.setattr(running_mean, "in_place", lambda means: False)
        of_devices = Watch.next
        monkeypatch.setattr(Watch, "next", lambda self, _: of_devices(self, []))

    return switch


def network():
    torch.manual_seed(0)
    layers = [nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)]
    return nn.Sequential(*layers).double()


def trained(make, steps=14, change=lambda step, x, net: x):
    """The parameters after every step, and what was warned of."""
    net = network()
    optimizer = make(net.parameters())
    generator, targets = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    found = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            x = torch.randn(N, 5, dtype=torch.float64, generator=generator)
            y = x[:, :3].argmax(1)
            optimizer.zero_grad()
            with curvature(*optimizer.required_extensions(), generator=targets):
                F.cross_entropy(net(change(step, x, net)), y).backward()
            optimizer.step()
            found.append([p.detach().clone() for p in net.parameters()])
    return found, [str(w.message) for w in caught], optimizer


def assert_numbers_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def assert_equal(found, expected):
    for here, there in zip(found, expected, strict=True):
        for one, other in zip(here, there, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_but_the_time_of_reading_differs(name, later):
    expected, _, optimizer = trained(OPTIMIZERS[name])
    later()
    found, told, postponed = trained(OPTIMIZERS[name])
    assert_equal(found, expected)
    assert not told
    assert_numbers_equal(postponed.last_step, optimizer.last_step)
    assert_numbers_equal(postponed.region.memory, optimizer.region.memory)
    assert postponed.steps == optimizer.steps


def nan_at(*steps):
    return lambda step, x, net: x * math.nan if step in steps else x


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_undefined_batches_move_nothing(name, later):
    later()
    found, told, _ = trained(OPTIMIZERS[name], change=nan_at(5, 9))
    assert_equal([found[5], found[9]], [found[4], found[8]])
    assert all(p.isfinite().all() for p in found[-1])
    assert sum("inf or NaN in the gradients" in message for message in told) == 2
    assert not torch.equal(found[-1][0], found[9][0])


@pytest.mark.parametrize("name", AUTOMATIC)
def test_a_step_with_a_surprise_is_made_once_more_with_everything_read_at_once(name, later):
    def change(step, x, net):
        # The loss explodes at once, and again.
        return 1e3 * x.flip(1) if step in (6, 7) else nan_at(9)(step, x, net)

    expected, told_at_once, _ = trained(OPTIMIZERS[name], 40, change)
    later()
    found, told, optimizer = trained(OPTIMIZERS[name], 40, change)
    assert_equal(found, expected)
    assert told == told_at_once
    assert optimizer._watch.steps == 0  # long ago


def led_astray(step, x, net):
    """At step 6 the last update is made so long that the loss explodes."""
    if step == 6:
        for p, update in led_astray.updates(net):
            p.data.add_(update, alpha=1e5)
            update.mul_(1 + 1e5)
    return x


@pytest.mark.parametrize("optimizer", [partial(KFACOptimizer, lr=0.3, **FIXED), DiagGGNOptimizer])
def test_a_step_that_led_astray_is_taken_back_one_step_later(optimizer, later):
    later()
    made = []

    def make(params):
        made.append(optimizer(params))
        return made[0]

    def updates(net):
        made[0]._settle()
        return [(p, made[0].state[p]["velocity"]) for p in net.parameters()]

    led_astray.updates = updates
    found, _, _ = trained(make, 9, led_astray)
    # The step after it is not made; the one behind that takes it back.
    for taken_back, before in zip(found[7], found[4], strict=True):
        torch.testing.assert_close(taken_back, before)
    assert made[0].region.radius < 1.0


@pytest.mark.parametrize("name", ["KFAC, fixed", "KFAC"])
def test_a_failed_inverse_is_repaired(name, later, monkeypatch):
    later()
    cholesky, calls = torch.linalg.cholesky_ex, []

    def failing(matrix):
        calls.append(len(calls))
        root, info = cholesky(matrix)
        return root, torch.ones_like(info) if len(calls) == 30 else info

    monkeypatch.setattr(torch.linalg, "cholesky_ex", failing)
    found, told, optimizer = trained(OPTIMIZERS[name], 25)
    assert len(calls) > 30
    assert not told
    assert all(p.isfinite().all() for p in found[-1])
    assert optimizer._watch.steps < 20


def test_statistics_that_are_not_finite_are_told_one_step_later(later):
    later()
    net = network()
    optimizer = KFACOptimizer(net.parameters(), lr=0.3, **FIXED)
    x, y = torch.randn(N, 5, dtype=torch.float64), torch.arange(N) % 3
    told = []
    for step in range(4):
        optimizer.zero_grad()
        with curvature(*optimizer.required_extensions()):
            F.cross_entropy(net(x), y).backward()
        if step == 2:
            net[0].weight.jacobian_mc.terms[0].g[:] = math.nan
            before = net[0].weight.detach().clone()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        told.append([str(w.message) for w in caught])
        if step == 2:
            assert torch.equal(net[0].weight, before)
    assert told[:3] == [[], [], []]
    (message,) = told[3]
    assert "inf or NaN in the curvature of" in message
    assert not torch.equal(net[0].weight, before)


def test_a_checkpoint_waits_for_the_step(later):
    expected, _, at_once = trained(OPTIMIZERS["KFAC"])
    later()
    _, _, optimizer = trained(OPTIMIZERS["KFAC"])
    saved = optimizer.state_dict()
    torch.testing.assert_close(
        saved["memories"], at_once.state_dict()["memories"], rtol=1e-6, atol=1e-9
    )
    assert saved["steps"] == len(expected)


def test_readings_raise_where_something_does_not_hold():
    readings = Readings(at_once=False)
    assert readings.finite([torch.ones(2), torch.tensor([1.0, math.inf])]) == [True, True]
    with pytest.raises(Surprise):
        readings.read()
    answer = readings.ask(torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64) / 3)
    readings.hold(torch.tensor([True]))
    readings.read()
    assert (
        answer.numbers == (torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64) / 3).tolist()
    )


def test_a_norm_that_overflows_is_no_surprise():
    large = torch.full((4,), 3e38)
    for at_once in (True, False):
        readings = Readings(at_once)
        assert readings.finite([large]) == [True]
        readings.read()


@pytest.mark.parametrize("loss", [0.5, 0.95, 1.5, 40.0])
@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("used", [0.1, 0.9])
@pytest.mark.parametrize("radius", [0.25, 1.0, 12.0, 20.0])
def test_the_region_says_the_same_on_the_device(loss, bounded, used, radius):
    region = TrustRegion()
    region.accept(1.0)
    region.memory["radius"] = radius
    region.took(layers=used * radius, promised=0.3, share=0.0)
    found = region.radius_on_device(torch.tensor(loss), torch.tensor(bounded))
    changes = torch.tensor([0.3, 5.0, 0.7])
    region.accept(loss, bounded)
    assert float(found) == region.radius
    shrink = region.shrink_on_device(changes, found)
    assert float(shrink) == pytest.approx(region.shrink(changes.tolist()))
    assert float(region.shrink_on_device(torch.tensor([3.0]), found)) == region.shrink([3.0]) == 1.0
