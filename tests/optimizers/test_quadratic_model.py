"""The quadratic model: its curvature without passes, its minimizer, and the step that follows from it."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F
from zoo import NAMES, ROW, assert_close, compute

from lightning_curv import KFACOptimizer, curvature
from lightning_curv.extensions import JacobianExact, JacobianMC
from lightning_curv.optimizers.step_size.levenberg_marquardt import LevenbergMarquardt
from lightning_curv.optimizers.step_size.quadratic_model import (
    change,
    curvature_along,
    minimizer,
    shortened,
)
from lightning_curv.terms.directional import directional_derivatives


@pytest.mark.parametrize("name", NAMES)
def test_directional_derivatives_are_products_with_the_jacobian(name):
    problem = ROW[name].make()
    compute(problem, JacobianMC(2), JacobianExact())
    for key, p in problem.parameters().items():
        if p.grad is not None:
            for jacobian in (p.jacobian_mc, p.jacobian_exact):
                vectors = torch.randn(3, *p.shape, dtype=p.dtype)
                expected = torch.stack([jacobian.dot(vector) for vector in vectors])
                found = directional_derivatives(jacobian, vectors)
                assert_close(found, expected, ROW[name].rtol, key, rounding=1e-13)


@pytest.mark.parametrize(
    "settings",
    [{}, {"stride": 2, "padding": 1}, {"dilation": 2}, {"stride": 2, "dilation": 3}],
    ids=str,
)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_directional_derivatives_of_convolutions(dims, settings):
    layer = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dims - 1](2, 3, 2, **settings, dtype=torch.float64)
    x = torch.randn(4, 2, *[7] * dims, dtype=torch.float64)
    with curvature(JacobianMC()):
        output = layer(x).flatten(1)
        nn.functional.mse_loss(output, torch.zeros_like(output)).backward()
    vectors = torch.randn(2, *layer.weight.shape, dtype=torch.float64)
    expected = torch.stack([layer.weight.jacobian_mc.dot(vector) for vector in vectors])
    torch.testing.assert_close(directional_derivatives(layer.weight.jacobian_mc, vectors), expected)


def problem():
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    return net, torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def gauss_newton(net, x, scale):
    """The GGN of scale · Σ ‖f - y‖²/2, by brute force."""
    params = dict(net.named_parameters())
    J = jacrev(lambda p: functional_call(net, p, (x,)))({k: p.detach() for k, p in params.items()})
    J = torch.cat([J[k].flatten(0, 1).flatten(1) for k in params], dim=1)
    return scale * J.T @ J


def test_curvature_along_directions_is_the_gauss_newton_matrix():
    net, x, y = problem()
    with curvature(JacobianExact()):
        nn.functional.mse_loss(net(x), y).backward()
    G = gauss_newton(net, x, 2 / y.numel())
    vectors = [torch.randn(3, *p.shape, dtype=p.dtype) for p in net.parameters()]
    U = torch.cat([v.flatten(1) for v in vectors], dim=1)
    found = curvature_along(
        [{i: p.jacobian_exact for i, p in enumerate(net.parameters())}], vectors
    )
    torch.testing.assert_close(found, U @ G @ U.T)


def test_step_minimizes_the_model_by_brute_force():
    net, x, y = problem()
    optimizer = KFACOptimizer(net.parameters(), damping=0.3, curvature="exact", safeguards=False)
    for step in range(3):
        start = flat([p.detach().clone() for p in net.parameters()])
        last = flat(
            [optimizer.state[p].get("velocity", torch.zeros_like(p)) for p in net.parameters()]
        ).clone()
        optimizer.zero_grad()
        with curvature(*optimizer.required_extensions()):
            nn.functional.mse_loss(net(x), y).backward()
        C = gauss_newton(net, x, 2 / y.numel()) + 0.3 * torch.eye(len(start), dtype=start.dtype)
        g = flat([p.grad for p in net.parameters()])
        optimizer.step()
        moved = flat([p.detach() for p in net.parameters()]) - start
        # In the span of d and last the residual C δ + g is orthogonal to the step itself and to the
        # last one.
        torch.testing.assert_close(
            moved @ (C @ moved + g), torch.zeros((), dtype=g.dtype), atol=1e-9, rtol=0
        )
        torch.testing.assert_close(
            last @ (C @ moved + g), torch.zeros((), dtype=g.dtype), atol=1e-9, rtol=0
        )
        assert optimizer.last_step["predicted"] < 0
        assert (optimizer.last_step["momentum"] != 0) == (step > 0)


def test_direction_is_made_of_the_running_mean_of_the_gradients():
    """The update lies in the span of the last one and of the mean, solved with the dense damped block."""
    layer = nn.Linear(3, 2, dtype=torch.float64)
    optimizer = KFACOptimizer(
        layer.parameters(), damping=0.1, curvature="exact", gradient_decay=0.6, inverse_interval=1
    )
    total, weight, last = torch.zeros(8, dtype=torch.float64), 0.0, None
    for _ in range(4):
        start = flat([p.detach().clone() for p in layer.parameters()])
        optimizer.zero_grad()
        with curvature(*optimizer.required_extensions()):
            nn.functional.mse_loss(
                layer(torch.randn(5, 3).double()), torch.randn(5, 2).double()
            ).backward()
        grad = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], dim=1).flatten()
        total, weight = grad + 0.6 * total, 1 + 0.6 * weight
        optimizer.step()
        B, A = optimizer.state[layer.weight]["factors"]
        pi = ((A.trace() / 4) / (B.trace() / 2)).sqrt()
        damped = [
            B + 0.1**0.5 / pi * torch.eye(2).double(),
            A + 0.1**0.5 * pi * torch.eye(4).double(),
        ]
        d = torch.linalg.solve(torch.kron(*damped), total / weight).view(2, 4)
        d = flat([d[:, :3], d[:, 3]])
        moved = flat([p.detach() for p in layer.parameters()]) - start
        span = torch.stack([d] if last is None else [d, last], dim=1)
        torch.testing.assert_close(
            span @ torch.linalg.lstsq(span, moved[:, None]).solution, moved[:, None]
        )
        last = moved


def test_gradients_without_noise_are_not_averaged():
    net, x, y = problem()
    optimizer = KFACOptimizer(net.parameters())
    means = []
    for _ in range(12):
        optimizer.zero_grad()
        with curvature(*optimizer.required_extensions()):
            nn.functional.mse_loss(net(x), y).backward()
        optimizer.step(loss_fn=lambda: nn.functional.mse_loss(net(x), y))
        means.append(optimizer.state[net[0].weight]["gradient"].clone())
    assert optimizer.full_batch is True
    assert not torch.equal(means[3], means[4])
    assert torch.equal(means[-2], means[-1])


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("divided", [True, False])
def test_model_of_accumulated_micro_batches_by_brute_force(divided, interval):
    """The micro-batches differ, also in size of their curvature; the step minimizes the model of their total."""
    net, x, y = problem()
    x = x * torch.linspace(0.1, 3, 8, dtype=torch.float64)[:, None]
    optimizer = KFACOptimizer(
        net.parameters(),
        damping=0.3,
        curvature="exact",
        factor_interval=interval,
        safeguards=False,
    )
    optimizer.curvature_scale = 4
    for _ in range(3):
        start = flat([p.detach().clone() for p in net.parameters()])
        last = flat(
            [optimizer.state[p].get("velocity", torch.zeros_like(p)) for p in net.parameters()]
        ).clone()
        optimizer.zero_grad()
        scale = 1 / 4 if divided else 1.0
        G = scale * sum(gauss_newton(net, part, 2 / 4) for part in x.split(2))
        C = G + 0.3 * torch.eye(len(start), dtype=start.dtype)
        for k in range(4):
            with curvature(
                *(optimizer.required_extensions() if k == 3 else optimizer.accumulated_extensions())
            ):
                (scale * nn.functional.mse_loss(net(x[2 * k :][:2]), y[2 * k :][:2])).backward()
            if k < 3:
                optimizer.accumulate()
        g = flat([p.grad for p in net.parameters()])
        optimizer.step()
        moved = flat([p.detach() for p in net.parameters()]) - start
        assert moved.norm() > 1e-3
        torch.testing.assert_close(
            moved @ (C @ moved + g), torch.zeros((), dtype=g.dtype), atol=1e-9, rtol=0
        )
        torch.testing.assert_close(
            last @ (C @ moved + g), torch.zeros((), dtype=g.dtype), atol=1e-9, rtol=0
        )
        predicted = (0.5 * moved @ G @ moved + g @ moved).item()
        assert optimizer.last_step["predicted"] == pytest.approx(predicted, rel=1e-9)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_minimizer_solves_the_system(size):
    root, b = torch.randn(size, 5, dtype=torch.float64), torch.randn(size, dtype=torch.float64)
    scale = torch.logspace(-8, 8, size, dtype=torch.float64)  # directions of very different length
    A = (root @ root.T) * scale * scale[:, None]
    w = torch.tensor(minimizer(A.tolist(), (scale * b).tolist()), dtype=torch.float64)
    torch.testing.assert_close((A @ w) / scale, -b, rtol=1e-6, atol=1e-6)


def test_dependent_directions_do_no_harm():
    d, b = (
        torch.tensor([1.0, 2.0], dtype=torch.float64),
        torch.tensor([1.0, 2.0], dtype=torch.float64),
    )
    A = d[:, None] * d  # the second direction is twice the first
    w = minimizer(A.tolist(), b.tolist())
    torch.testing.assert_close(A @ torch.tensor(w, dtype=torch.float64), -b)
    assert change(A.tolist(), b.tolist(), w) == pytest.approx(-0.5)


@pytest.mark.parametrize("most", [1e-3, 0.4, 1.0, 5.0, float("inf")])
def test_shortened_step_promises_at_most_so_much(most):
    c, s = 0.8, -2.0
    factor = shortened(c, s, most)
    assert -(factor * s + factor**2 * c) == pytest.approx(min(most, 1.2))


@pytest.mark.parametrize(
    ("lossfunc", "size"), [(F.mse_loss, 8), (F.mse_loss, 64), (F.huber_loss, 64)]
)
def test_small_batches_of_a_regression(lossfunc, size):
    """One draw of the targets per sample hides curvature from the direction and from the model of the loss alike."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)
    )
    x = torch.randn(size, 10)
    y, optimizer, losses = x[:, :3].sin(), KFACOptimizer(net.parameters()), []
    for _ in range(8):
        optimizer.zero_grad()
        with curvature(*optimizer.extensions):
            loss = lossfunc(net(x), y)
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert -optimizer.last_step["predicted"] <= losses[-1] * (1 + 1e-5)
    assert max(losses) < 1.5 * losses[0]
    assert losses[-1] < 0.2 * losses[0]


def test_a_scalar_parameter_takes_part():
    temperature, layer = nn.Parameter(torch.tensor(2.0)), nn.Linear(4, 3)
    optimizer = KFACOptimizer([temperature, *layer.parameters()])
    for _ in range(2):
        optimizer.zero_grad()
        with curvature(*optimizer.extensions):
            F.cross_entropy(
                temperature * layer(torch.eye(4)), torch.tensor([0, 1, 2, 0])
            ).backward()
        before = temperature.item()
        optimizer.step()
    assert temperature.item() != before


def test_scale_of_the_loss_does_not_change_the_step():
    moves = []
    for scale in (1.0, 100.0, 0.01):
        torch.manual_seed(0)
        net, x, y = problem()
        start = flat([p.detach().clone() for p in net.parameters()])
        optimizer = KFACOptimizer(net.parameters(), curvature="exact")

        def closure():
            optimizer.zero_grad()
            with curvature(*optimizer.extensions):
                loss = scale * nn.functional.mse_loss(net(x), y)
                loss.backward()
            return loss

        for _ in range(5):
            optimizer.step(closure)
        moves.append(flat([p.detach() for p in net.parameters()]) - start)
    torch.testing.assert_close(moves[1], moves[0])
    torch.testing.assert_close(moves[2], moves[0])


# Adaptation of the damping


def test_good_ratios_lower_the_damping_and_bad_ones_raise_it():
    rule = LevenbergMarquardt()
    assert rule.adapted(1.0, 1.1) == pytest.approx(0.95**5)
    assert rule.adapted(1.0, 0.5) == 1.0
    for bad in (0.1, -3.0, float("nan"), float("inf")):
        assert rule.adapted(1.0, bad) == pytest.approx(0.95**-5)
    assert rule.adapted(1e-3, 1.0) == 1e-3
    assert rule.adapted(1e-3, 1.0, full_batch=True) < 1e-3
    assert rule.adapted(1e3, 0.0) == 1e3


def test_damping_decays_where_no_ratio_is_known():
    rule = LevenbergMarquardt()
    assert rule.annealed(1.0) == 0.95
    assert rule.annealed(rule.rest) == rule.rest
    assert rule.annealed(1e-5) == 1e-5


def test_loss_fn_adapts_the_damping_and_leaves_random_numbers_alone():
    net, x, y = problem()
    optimizer, calls = KFACOptimizer(net.parameters(), curvature="exact"), []

    def loss_fn():
        calls.append(torch.rand(()).item())
        assert not torch.is_grad_enabled()
        return nn.functional.mse_loss(net(x), y)

    for _ in range(10):
        optimizer.zero_grad()
        with curvature(*optimizer.extensions):
            nn.functional.mse_loss(net(x), y).backward()
        state = torch.get_rng_state()
        optimizer.step(loss_fn=loss_fn)
        assert torch.equal(torch.get_rng_state(), state)
    assert len(calls) == 5  # before and after steps 5 and 10, and once to know the batch again
    assert len(set(calls)) == 1
    assert optimizer.relative_damping < optimizer.adaptation.start
    assert optimizer.last_step["reduction_ratio"] == pytest.approx(1, abs=0.5)
    assert optimizer.full_batch is True


def test_loss_fn_of_changing_batches_is_no_full_batch():
    net, x, y = problem()
    optimizer = KFACOptimizer(net.parameters())
    for step in range(12):
        batch = slice(0, 4) if step % 2 else slice(4, 8)

        def loss_fn():
            return nn.functional.mse_loss(net(x[batch]), y[batch])

        optimizer.zero_grad()
        with curvature(*optimizer.extensions):
            loss_fn().backward()
        optimizer.step(loss_fn=loss_fn)
    assert optimizer.full_batch is False


def test_overflow_rejects_the_step():
    net, x, y = problem()
    optimizer = KFACOptimizer(net.parameters())
    for _ in range(2):
        before = flat([p.detach().clone() for p in net.parameters()])
        optimizer.zero_grad()
        with curvature(*optimizer.extensions):
            nn.functional.mse_loss(net(x), y).backward()
        if not optimizer.steps:
            optimizer.step()
    for p in net.parameters():
        p.jacobian_mc.terms[0].g.fill_(1e200)
    with pytest.warns(RuntimeWarning, match="inf or NaN"):
        optimizer.step()
    assert torch.equal(flat([p.detach() for p in net.parameters()]), before)


def test_minimizer_of_what_is_not_finite_is_nan():
    assert all(map(math.isnan, minimizer([[float("nan")] * 2] * 2, [1.0, 1.0])))
    assert all(map(math.isnan, minimizer([[1.0, 0.0], [0.0, 1.0]], [1.0, float("inf")])))
