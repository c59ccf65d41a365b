"""Curvature that is kept between two measurements: when it is measured, and what the steps between read."""

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_curv import KFACOptimizer, curvature
from lightning_curv.optimizers import second_order
from lightning_curv.optimizers.step.schedule import Schedule
from lightning_curv.optimizers.step_size.calibration import averaged_curvature, keep_step
from lightning_curv.optimizers.step_size.loss_limits import LossLimits, LossValue


def classes():
    """Four clusters, and a network that has not seen them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    labels = torch.randint(4, (512,))
    centers = 2 * torch.randn(4, 3, dtype=torch.float64)
    return net, centers[labels] + torch.randn(512, 3, dtype=torch.float64), labels


def quick(net, burn_in=2, **settings):
    """An optimizer that begins to keep curvature early."""
    optimizer = KFACOptimizer(net.parameters(), **settings)
    optimizer.schedule = replace(optimizer.schedule, burn_in=burn_in, settles=burn_in)
    return optimizer


def train(net, optimizer, x, y, steps, loss=F.cross_entropy, asked=None, **arguments):
    """Some steps on batches of 64 that follow from the number of the step."""
    for _ in range(steps):
        generator = torch.Generator().manual_seed(optimizer.steps)
        chosen = torch.randperm(len(x), generator=generator)[:64]
        extensions = optimizer.required_extensions()
        if asked is not None:
            asked.append([type(extension).__name__ for extension in extensions])
        optimizer.zero_grad()
        with curvature(*extensions, generator=generator):
            loss(net(x[chosen]), y[chosen]).backward()
        optimizer.step(**arguments)


def test_it_is_measured_in_ten_steps_and_then_kept_for_eight_at_most():
    net, x, y = classes()
    optimizer = KFACOptimizer(net.parameters())
    asked, before = [], F.cross_entropy(net(x), y).item()
    train(net, optimizer, x, y, 80, asked=asked)
    measured = [step for step, names in enumerate(asked) if "LossValue" not in names]
    assert measured[:11] == [*range(10), 11]
    gaps = [later - earlier for earlier, later in itertools.pairwise(measured[10:])]
    assert max(gaps) == 8
    assert all(names == ["LossValue"] for step, names in enumerate(asked) if step not in measured)
    other, *_ = classes()
    every_step = KFACOptimizer(other.parameters(), factor_interval=1)
    train(other, every_step, x, y, 80)
    after, expected = F.cross_entropy(net(x), y).item(), F.cross_entropy(other(x), y).item()
    assert before - after > 0.95 * (before - expected)


def test_the_interval_doubles_while_curvature_holds_and_is_halved_where_it_does_not():
    schedule = Schedule(8, keeps=True)
    assert [schedule.next_interval(30, k, holds=True) for k in (1, 2, 4, 8)] == [2, 4, 8, 8]
    assert [schedule.next_interval(30, k, holds=False) for k in (8, 4, 2, 1)] == [4, 2, 1, 1]
    assert [schedule.next_interval(step, 1, holds=True) for step in (0, 8, 9)] == [1, 1, 2]


def due(schedule, kept, units, steps):
    """The steps in which each inverse is due."""
    return [{s for s in steps if schedule.invert_due(s, u, units, kept)} for u in range(units)]


@pytest.mark.parametrize(("kept", "every"), [(1, 10), (2, 10), (4, 20), (8, 40)])
@pytest.mark.parametrize("units", [1, 6, 25])
def test_inverses_of_kept_curvature_are_renewed_more_rarely(kept, every, units):
    schedule = Schedule(8, invert=10, keeps=True)
    for steps in due(schedule, kept, units, range(40, 40 + 3 * every)):
        assert len(steps) == 3
        assert max(steps) - min(steps) == 2 * every


def test_no_inverse_waits_longer_where_the_interval_changes():
    schedule = Schedule(8, invert=10, keeps=True)
    rarest, *others = (due(schedule, kept, 9, range(40, 200)) for kept in (8, 4, 2, 1))
    for steps in others:
        assert all(few <= more for few, more in zip(rarest, steps, strict=True))


def test_inverses_wait_for_kept_curvature_as_the_schedule_says():
    net, x, y = classes()
    optimizer = KFACOptimizer(net.parameters())
    train(net, optimizer, x, y, 40)
    assert optimizer.interval == 8
    counts = []
    inverted = optimizer.curvature.inverted
    optimizer.curvature.inverted = lambda parts, *rest: (
        counts.append(len(parts)) or inverted(parts, *rest)
    )
    train(net, optimizer, x, y, 40)
    assert optimizer.interval == 8
    assert sum(counts) == 4  # two factors of two layers


@pytest.mark.parametrize(
    ("factor", "holds"), [(1.0, True), (3.9, True), (0.01, True), (4.1, False), (math.inf, False)]
)
def test_curvature_holds_until_it_has_grown_by_a_factor_of_four(factor, holds):
    memory = {}
    averaged_curvature(memory, [[2.0]], [1.0], math.inf)
    assert not memory["holds"]
    averaged_curvature(memory, [[2.0 * factor * 9]], [3.0], math.inf)
    assert memory["holds"] is holds


def test_undefined_steps_are_not_kept():
    memory = {}
    keep_step(memory, [-1.0], 2.0)
    kept = copy.deepcopy(memory)
    keep_step(memory, [math.nan], 1.0)
    keep_step(memory, [-1.0], math.inf)
    assert memory == kept


def test_the_loss_between_measurements_is_that_of_the_measured_steps():
    net, x, y = classes()
    params = [*net.parameters()]
    with curvature(LossLimits()):
        F.cross_entropy(net(x), y).backward()
    *_, loss, _ = params[0].loss_limits
    with curvature(LossValue(params)):
        F.cross_entropy(net(x), y).backward()
    for param in params:
        torch.testing.assert_close(param.loss_limits, loss[None])


def test_nothing_is_recorded_for_the_loss():
    net, x, y = classes()
    with curvature(LossValue([*net.parameters()])):
        loss = F.cross_entropy(net(x), y)
        assert not loss.grad_fn.metadata
        loss.backward()


@pytest.mark.parametrize("settings", [{}, {"safeguards": False}, {"eigen": True}])
def test_resuming_between_measurements_is_bit_exact(settings):
    net, x, y = classes()
    optimizer = quick(net, **settings)
    train(net, optimizer, x, y, 11)
    assert not optimizer._measures
    other = copy.deepcopy(net)
    resumed = quick(other, **settings)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert not resumed._measures
    train(net, optimizer, x, y, 12)
    train(other, resumed, x, y, 12)
    for a, b in zip(net.parameters(), other.parameters()):
        assert torch.equal(a, b)


def test_a_step_taken_back_is_followed_by_a_measurement():
    net, x, y = classes()
    optimizer = quick(net)
    train(net, optimizer, x, y, 10)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(optimizer.state[p]["velocity"], alpha=1e4)
            optimizer.state[p]["velocity"].mul_(1e4)
    while "rejected" not in optimizer.last_step:
        assert optimizer.steps < 12
        train(net, optimizer, x, y, 1)
    assert optimizer._measures


def gaussian(outputs, labels):
    mean, variance = outputs[:, 0], F.softplus(outputs[:, 1])
    return F.gaussian_nll_loss(mean, labels.double(), variance)


def test_without_a_lower_bound_it_is_measured_in_every_step():
    net, x, y = classes()
    asked = []
    train(net, quick(net), x, y, 12, loss=gaussian, asked=asked)
    assert all("LossValue" not in names for names in asked)


def test_whoever_gives_loss_fn_has_a_model_of_every_step():
    net, x, y = classes()
    asked = []
    train(net, quick(net, 6), x, y, 20, asked=asked, loss_fn=lambda: F.cross_entropy(net(x), y))
    assert all("LossValue" not in names for names in asked)


def test_a_number_as_interval_keeps_the_model_of_every_step():
    net, x, y = classes()
    optimizer = KFACOptimizer(net.parameters(), factor_interval=4)
    train(net, optimizer, x, y, 30)
    assert all(
        "jacobian_mc" in [e.savefield for e in optimizer.required_extensions()] for _ in range(2)
    )


def test_micro_batches_between_measurements():
    net, x, y = classes()
    optimizer = quick(net)
    for _ in range(12):
        optimizer.curvature_scale = 2
        optimizer.zero_grad()
        for part in (slice(0, 128), slice(128, 256)):
            with curvature(*optimizer.accumulated_extensions()):
                (F.cross_entropy(net(x[part]), y[part]) / 2).backward()
            if part.start == 0:
                optimizer.accumulate()
        loss = F.cross_entropy(net(x[:256]), y[:256]).item()
        optimizer.step()
        *_, found, _ = optimizer.region.memory["limits"]
        assert found == pytest.approx(loss)
    assert not optimizer._measures


def test_jacobians_that_were_not_asked_for_are_dropped():
    net, x, y = classes()
    optimizer = quick(net)
    for _ in range(6):
        optimizer.zero_grad()
        with curvature(*optimizer.extensions):
            F.cross_entropy(net(x), y).backward()
        optimizer.step()
        assert not any(
            hasattr(p, "jacobian_mc") or hasattr(p, "loss_limits") for p in net.parameters()
        )


def test_between_measurements_dampings_are_those_of_the_inverses_that_are_due(monkeypatch):
    net, x, y = classes()
    optimizer = quick(net)
    train(net, optimizer, x, y, 11)
    assert not optimizer._measures
    asked, due = [], []
    block_damping, inverted = second_order.block_damping, optimizer.curvature.inverted
    monkeypatch.setattr(
        second_order,
        "block_damping",
        lambda curvature, state, *rest: (
            asked.append(id(state)) or block_damping(curvature, state, *rest)
        ),
    )
    monkeypatch.setattr(
        optimizer.curvature,
        "inverted",
        lambda parts, *rest: due.extend(id(state) for state, *_ in parts) or inverted(parts, *rest),
    )
    steps = 0
    while not optimizer._measures:
        asked.clear(), due.clear()
        train(net, optimizer, x, y, 1)
        assert sorted(asked) == sorted({*due})
        steps += 1
    assert steps


@pytest.mark.parametrize("settings", [{}, {"eigen": True}, {"lr": 0.1, "factor_interval": 8}])
def test_a_bias_that_is_frozen_while_curvature_is_kept_leaves_its_block(settings):
    net, x, y = classes()
    optimizer = quick(net, **settings)
    train(net, optimizer, x, y, 11)
    assert not optimizer._measures
    net[0].bias.requires_grad_(False)
    before = [p.detach().clone() for p in net.parameters()]
    train(net, optimizer, x, y, 1)
    assert [torch.equal(p, q) for p, q in zip(net.parameters(), before)] == [
        False,
        True,
        False,
        False,
    ]
    assert optimizer._measures is ("lr" not in settings)
    train(net, optimizer, x, y, 12)
    assert torch.equal(net[0].bias, before[1])
    assert all(p.isfinite().all() for p in net.parameters())
