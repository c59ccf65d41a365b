"""DiagGGNOptimizer against its formulas; the fields are set by hand, so no engine takes part."""

import copy
import io
import math

import pytest
import torch
from torch import nn

from lightning_curv import curvature
from lightning_curv.optimizers import DiagGGNOptimizer

LAM = 0.1


def with_diagonal(p):
    """A fresh field and gradient on `p`, as a backward pass leaves them."""
    p.diag_ggn_mc, p.grad = torch.rand_like(p).detach(), torch.randn_like(p)
    return p


def parameter(*shape, dtype=torch.float64):
    return with_diagonal(nn.Parameter(torch.randn(*shape).to(dtype)))


def plain(params, lr=1.0, damping=LAM, betas=(0.0, 0.0), bound=None, **settings):
    """The bare update: no running means, no bound."""
    settings.setdefault("safeguards", False)
    return DiagGGNOptimizer(params, lr=lr, damping=damping, betas=betas, bound=bound, **settings)


def update(optimizer, p):
    before = p.detach().clone()
    optimizer.step()
    return p.detach() - before


def test_bare_update():
    p = parameter(2, 3)
    torch.testing.assert_close(update(plain([p]), p), -p.grad / (p.diag_ggn_mc + LAM))


def test_one_step_solves_separable_least_squares():
    scale, target = torch.rand(4, dtype=torch.float64) + 0.5, torch.randn(4, dtype=torch.float64)
    p = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    (0.5 * (scale * p - target).square().sum()).backward()
    p.diag_ggn_exact = scale.square()
    plain([p], damping=1e-12, curvature="exact").step()
    torch.testing.assert_close(p.detach(), target / scale)


def test_gradient_and_diagonal_are_bias_corrected_means():
    p, gradients, diagonals = parameter(3), [], []
    optimizer = plain([p], betas=(0.6, 0.8))
    for _ in range(3):
        with_diagonal(p)
        gradients.append(p.grad)
        diagonals.append(p.diag_ggn_mc)
        moved = update(optimizer, p)

    def mean(values, beta):
        weights = torch.tensor([beta**2, beta, 1.0], dtype=torch.float64)
        return weights @ torch.stack(values) / weights.sum()

    torch.testing.assert_close(moved, -mean(gradients, 0.6) / (mean(diagonals, 0.8) + LAM))


def test_trust_bound_limits_the_whole_step():
    params = [parameter(2, 3), parameter(4)]
    before = [p.detach().clone() for p in params]
    plain(params, lr=0.5, bound="trust", kl_clip=1e-3).step()
    d = [p.grad / (p.diag_ggn_mc + LAM) for p in params]
    squared = sum((x.square() * p.diag_ggn_mc).sum() for x, p in zip(d, params))
    shrink = math.sqrt(1e-3 / squared)
    assert shrink < 1
    for p, b, x in zip(params, before, d):
        torch.testing.assert_close(p.detach() - b, -0.5 * shrink * x)


def test_elementwise_bound_clips_each_element():
    p = parameter(20)
    d = p.grad / (p.diag_ggn_mc + LAM)
    moved = update(plain([p], lr=0.03, bound="elementwise", max_update=0.1), p)
    torch.testing.assert_close(moved, -0.03 * d.clamp(-0.1, 0.1))


@pytest.mark.parametrize("bound", ["trust", "elementwise"])
def test_learning_rate_schedule_acts_after_the_bound(bound):
    def length(schedule):
        torch.manual_seed(0)
        p = parameter(2, 3)
        optimizer = plain([p], lr=0.3, bound=bound)
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: schedule)
        return update(optimizer, p)

    torch.testing.assert_close(length(0.25), 0.25 * length(1.0))


def test_weight_decay_is_decoupled():
    p = parameter(2, 3)
    before = p.detach().clone()
    plain([p], lr=0.5, weight_decay=0.1).step()
    torch.testing.assert_close(p.detach(), 0.95 * before - 0.5 * p.grad / (p.diag_ggn_mc + LAM))


def test_interval_asks_for_extensions_only_when_due():
    p, asked = parameter(2, 3), []
    optimizer = plain([p], interval=3)
    for _ in range(5):
        asked.append([extension.savefield for extension in optimizer.required_extensions()])
        if asked[-1]:
            with_diagonal(p)
        optimizer.step()
    assert asked == [["diag_ggn_mc"], [], [], ["diag_ggn_mc"], []]
    assert (
        DiagGGNOptimizer([p], curvature="exact").required_extensions()[0].savefield
        == "diag_ggn_exact"
    )


def test_missing_or_used_curvature_raises():
    p = parameter(2, 3)
    optimizer = plain([p])
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"`.diag_ggn_mc` was written.*`CurvatureCallback\(\)`"):
        optimizer.step()


def test_field_of_the_wrong_shape_raises():
    p = parameter(2, 3)
    p.diag_ggn_mc = torch.rand(3, 2)
    with pytest.raises(
        ValueError,
        match=r"must be one tensor of its parameter's shape \(2, 3\), found \[\(3, 2\)\]",
    ):
        plain([p]).step()


def test_parameter_without_diagonal_takes_adam_steps():
    p, other = parameter(2, 3), nn.Parameter(torch.zeros(3))
    other.grad = torch.tensor([1.0, -2.0, 3.0])
    optimizer = plain([p, other], fallback_lr=1e-2)
    torch.testing.assert_close(update(optimizer, other), -1e-2 * other.grad.sign())
    assert list(optimizer.summary().values()) == ["curvature", "fallback"]


def test_closure_runs_first():
    p = nn.Parameter(torch.ones(3))

    def closure():
        loss = p.square().sum()
        loss.backward()
        p.diag_ggn_mc = torch.full((3,), 2.0)
        return loss

    assert plain([p], damping=1e-9).step(closure).item() == 3
    torch.testing.assert_close(p.detach(), torch.zeros(3))


def test_non_finite_gradient_skips_the_step():
    p = parameter(2, 3)
    p.grad[0, 0] = math.nan
    before, optimizer = p.detach().clone(), plain([p])
    with pytest.warns(
        RuntimeWarning, match="inf or NaN in the gradients of .*; this step is skipped"
    ):
        optimizer.step()
    assert torch.equal(p, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_resuming_is_bit_exact(dtype):
    p = parameter(2, 3, dtype=dtype)
    optimizer = DiagGGNOptimizer([p])
    for _ in range(3):
        with_diagonal(p)
        optimizer.step()
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    twin = nn.Parameter(p.detach().clone())
    resumed = DiagGGNOptimizer([twin])
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert resumed.state[twin]["diagonal"].dtype == torch.promote_types(dtype, torch.float32)
    for _ in range(3):
        with_diagonal(p)
        twin.grad, twin.diag_ggn_mc = p.grad.clone(), p.diag_ggn_mc.clone()
        optimizer.step()
        resumed.step()
    assert torch.equal(p, twin)


def test_copied_optimizer_goes_on():
    optimizer = plain([parameter(2, 3)])
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    p = with_diagonal(twin.param_groups[0]["params"][0])
    torch.testing.assert_close(update(twin, p), -p.grad / (p.diag_ggn_mc + LAM))


def test_defaults_train_a_network():
    net = nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 3))
    X = torch.randn(96, 8)
    Y = X[:, :3].argmax(1)
    optimizer, losses = DiagGGNOptimizer(net.parameters(), interval=2), []
    for _ in range(60):
        optimizer.zero_grad()
        with curvature(*optimizer.required_extensions()):
            loss = nn.functional.cross_entropy(net(X), Y)
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert set(optimizer.summary().values()) == {"curvature"}


BAD = {
    "lr": (-1.0, "`lr` must be positive, found -1.0"),
    "damping": (0.0, "`damping` must be positive, found 0.0"),
    "betas": ((0.9, 1.0), r"`betas` must lie in \[0, 1\), found 1.0"),
    "weight_decay": (-1.0, "`weight_decay` must not be negative, found -1.0"),
    "interval": (0, "`interval` must be an integer of at least 1, found 0"),
    "bound": ("global", "`bound` must be one of 'trust', 'elementwise', None, found 'global'"),
    "kl_clip": (0.0, "`kl_clip` must be positive, found 0.0"),
    "max_update": (0.0, "`max_update` must be positive, found 0.0"),
    "curvature": ("hessian", "`curvature` must be one of 'mc', 'exact', found 'hessian'"),
    "mc_samples": (0, "`mc_samples` must be an integer of at least 1, found 0"),
    "fallback_lr": (0.0, "`fallback_lr` must be positive, found 0.0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_raise(name):
    value, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        DiagGGNOptimizer([parameter(2)], **{name: value})
