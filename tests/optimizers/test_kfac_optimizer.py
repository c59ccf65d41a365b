"""KFACOptimizer against dense solves; the fields are set by hand, so no engine takes part."""

import copy
import gc
import io
import math
import multiprocessing
import pickle
import sys
import warnings
import weakref

import pytest
import torch
from processes import leave_group
from torch import distributed as dist
from torch import nn

from lightning_curv import KFAC, KFLR, curvature
from lightning_curv.optimizers import KFACOptimizer
from lightning_curv.optimizers.curvature.kronecker import KroneckerCurvature

LAM = 0.1


def psd(*shape, d):
    root = torch.randn(*shape, d, d, dtype=torch.float64)
    return root @ root.mT / d


def dense(factor):
    return torch.diag(factor) if factor.dim() == 1 else factor


def eye(factor):
    return torch.eye(len(factor), dtype=factor.dtype)


def parameter(*shape, dtype=torch.float64, grad=True):
    p = nn.Parameter(torch.randn(*shape).to(dtype))
    if grad:
        p.grad = torch.randn(*shape).to(dtype)
    return p


def with_factors(p, *sizes):
    """A fresh field and gradient on `p`, as a backward pass leaves them."""
    p.kfac = [psd(d=d).to(p.dtype) for d in sizes or p.shape]
    p.grad = torch.randn_like(p)
    return p


class GivenFactors(KroneckerCurvature):
    """Takes the factors that a test left on the parameters."""

    def __init__(self, extension, max_factor_size):
        super().__init__(extension, KFLR(), None, max_factor_size)

    def pairs(self, fields):
        return {}

    def measure(self, state, block, fields, step, samples=0.0):
        return self.checked(list(fields[0]), block)


def plain(
    params, lr=1.0, damping=LAM, momentum=0.0, kl_clip=None, max_factor_size=8192, **settings
):
    """The bare update: no momentum, no clip; factors set by hand."""
    settings.setdefault("safeguards", False)
    optimizer = KFACOptimizer(
        params, lr=lr, damping=damping, momentum=momentum, kl_clip=kl_clip, **settings
    )
    optimizer.curvature = GivenFactors(
        KFLR() if settings.get("curvature") == "exact" else KFAC(), max_factor_size
    )
    return optimizer


def update(optimizer, p):
    before = p.detach().clone()
    optimizer.step()
    return p.detach() - before


def saved_and_loaded(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_same_state(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_state(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same_state(x, y)
    else:
        assert a == b


# Preconditioned directions


def expected_two_factors(first, second, grad):
    """Dense solve with kron(B + sqrt(lam)/pi I, A + pi sqrt(lam) I), pi = sqrt((tr A / d_A) / (tr B / d_B))."""
    B, A = dense(first), dense(second)
    pi = math.sqrt((A.trace() / len(A)) / (B.trace() / len(B)))
    block = torch.kron(B + math.sqrt(LAM) / pi * eye(B), A + pi * math.sqrt(LAM) * eye(A))
    return torch.linalg.solve(block, grad.flatten()).view_as(grad)


TWO_FACTORS = {
    "linear": ((3, 4), lambda: [psd(d=3), psd(d=4)]),
    "convolution": ((3, 2, 2, 2), lambda: [psd(d=3), psd(d=8)]),
    "transposed": ((4, 3), lambda: [psd(d=4), psd(d=3)]),
    "embedding": ((5, 3), lambda: [torch.rand(5, dtype=torch.float64), psd(d=3)]),
    "diagonal second": ((3, 5), lambda: [psd(d=3), torch.rand(5, dtype=torch.float64)]),
    "two diagonals": ((3, 5), lambda: [torch.rand(n, dtype=torch.float64) for n in (3, 5)]),
}


@pytest.mark.parametrize("case", TWO_FACTORS)
def test_direction_is_the_dense_solve(case):
    shape, factors = TWO_FACTORS[case]
    p = parameter(*shape)
    p.kfac = factors()
    torch.testing.assert_close(update(plain([p]), p), -expected_two_factors(*p.kfac, p.grad))


def test_direction_of_groups_is_one_dense_solve_per_group():
    p = parameter(6, 2, 2)  # convolution with 3 groups: weight [3, 2, 4]
    B, A = psd(3, d=2), psd(3, d=4)
    p.kfac = [B, A]
    blocks = p.grad.view(3, 2, 4)
    expected = torch.stack([expected_two_factors(B[q], A[q], blocks[q]) for q in range(3)]).view(
        6, 2, 2
    )
    torch.testing.assert_close(update(plain([p]), p), -expected)


@pytest.mark.parametrize(
    "factor", [psd(d=4), torch.rand(4, dtype=torch.float64)], ids=["bias", "norm scale"]
)
def test_direction_of_one_factor(factor):
    p = parameter(4)
    p.kfac = [factor]
    torch.testing.assert_close(
        update(plain([p]), p), -torch.linalg.solve(dense(factor) + LAM * eye(factor), p.grad)
    )


def test_direction_of_three_factors():
    p = with_factors(parameter(2, 3, 4))
    means = [f.trace() / len(f) for f in p.kfac]
    scale = (LAM / math.prod(means)) ** (1 / 3)
    damped = [f + m * scale * eye(f) for f, m in zip(p.kfac, means)]
    block = torch.kron(torch.kron(damped[0], damped[1]), damped[2])
    expected = torch.linalg.solve(block, p.grad.flatten()).view_as(p)
    torch.testing.assert_close(update(plain([p]), p), -expected)


def test_scalar_parameter():
    p = nn.Parameter(torch.tensor(1.0))
    p.grad, p.kfac = torch.tensor(2.0), [torch.tensor([0.4])]
    torch.testing.assert_close(update(plain([p]), p), torch.tensor(-4.0))


def test_zero_factor_leaves_the_damping():
    p = parameter(2, 3)
    p.kfac = [torch.zeros(2, 2), torch.zeros(3, 3)]
    torch.testing.assert_close(update(plain([p]), p), -p.grad / LAM)


def test_large_factor_becomes_its_diagonal():
    p = with_factors(parameter(3, 6))
    expected = expected_two_factors(p.kfac[0], p.kfac[1].diagonal(), p.grad)
    torch.testing.assert_close(update(plain([p], max_factor_size=4), p), -expected)


def test_large_grouped_factor_becomes_its_diagonal():
    p = parameter(6, 6)
    B, A = psd(2, d=3), psd(2, d=6)
    p.kfac = [B, A]
    blocks = p.grad.view(2, 3, 6)
    expected = torch.stack(
        [expected_two_factors(B[q], A[q].diagonal(), blocks[q]) for q in range(2)]
    )
    torch.testing.assert_close(update(plain([p], max_factor_size=4), p).view(2, 3, 6), -expected)


def test_one_step_solves_linear_regression():
    X, Y = torch.randn(20, 4, dtype=torch.float64), torch.randn(20, 3, dtype=torch.float64)
    W = nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    ((X @ W.T - Y).square().sum() / (2 * len(X))).backward()
    W.kfac = [eye(W), X.T @ X / len(X)]
    plain([W], damping=1e-14).step()
    torch.testing.assert_close(
        W.detach(), torch.linalg.lstsq(X, Y).solution.T, rtol=1e-5, atol=1e-5
    )


# Running means and intervals


def test_factors_are_bias_corrected_means():
    p, seen = parameter(2, 3), []
    optimizer = plain([p], factor_decay=0.7)
    for _ in range(4):
        seen.append(with_factors(p).kfac)
        optimizer.step()
    weights = torch.tensor([0.7 ** (3 - k) for k in range(4)], dtype=torch.float64)
    for mean, values in zip(optimizer.state[p]["factors"], zip(*seen)):
        torch.testing.assert_close(
            mean, torch.einsum("k,kij->ij", weights / weights.sum(), torch.stack(values))
        )


def test_without_decay_the_last_factors_count():
    p = parameter(2, 3)
    optimizer = plain([p], factor_decay=0.0)
    for _ in range(3):
        with_factors(p)
        optimizer.step()
    for mean, factor in zip(optimizer.state[p]["factors"], p.kfac):
        assert torch.equal(mean, factor)


def test_factor_interval_asks_for_extensions_only_when_due():
    p, asked = parameter(2, 3), []
    optimizer = plain([p], factor_interval=3)
    for _ in range(7):
        asked.append(len(optimizer.required_extensions()))
        if asked[-1]:
            with_factors(p)
        optimizer.step()
    assert asked == [1, 0, 0, 1, 0, 0, 1]
    assert [extension.savefield for extension in optimizer.extensions] == ["kfac"]


def test_inverses_refresh_often_at_first_then_at_the_interval_one_after_the_other():
    p, refreshed = parameter(2, 3), [[], []]
    optimizer = plain([p], inverse_interval=10)
    for step in range(41):
        with_factors(p)
        before = list(optimizer.state[p].get("inverses", [None, None]))
        optimizer.step()
        for steps, old, new in zip(refreshed, before, optimizer.state[p]["inverses"]):
            if old is not new:
                steps.append(step)
    assert refreshed == [[0, 1, 2, 5, 10, 15, 20, 30, 40], [0, 1, 2, 7, 12, 17, 25, 35]]


def test_late_parameter_is_preconditioned_at_once():
    first, late = with_factors(parameter(2, 3)), parameter(2, 3, grad=False)
    optimizer = plain([first, late], inverse_interval=100)
    for _ in range(25):
        with_factors(first)
        optimizer.step()
    with_factors(first), with_factors(late)
    expected = expected_two_factors(*late.kfac, late.grad)
    torch.testing.assert_close(update(optimizer, late), -expected)


def test_exact_curvature_reads_its_own_field():
    p = parameter(2, 3)
    p.kflr = [psd(d=2), psd(d=3)]
    optimizer = plain([p], curvature="exact")
    assert [extension.savefield for extension in optimizer.required_extensions()] == ["kflr"]
    torch.testing.assert_close(update(optimizer, p), -expected_two_factors(*p.kflr, p.grad))


# Stale and missing curvature

MISSING = r"no parameter whose `.kfac` was written.*`CurvatureCallback\(\)`.*with curvature\(\*optimizer.extensions\)"


def test_missing_curvature_raises_and_changes_nothing():
    p = parameter(2, 3)
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match=MISSING):
        plain([p], weight_decay=0.1).step()
    assert torch.equal(p, before)


def test_curvature_of_an_earlier_backward_raises():
    p = with_factors(parameter(2, 3))
    optimizer = plain([p])
    optimizer.step()
    with pytest.raises(RuntimeError, match=MISSING):
        optimizer.step()


def test_only_weak_references_to_fields_are_kept():
    p = with_factors(parameter(2, 3))
    plain([p]).step()
    old = weakref.ref(p.kfac[1])
    p.kfac = None
    gc.collect()
    assert old() is None


def test_parameter_without_new_curvature_keeps_its_own():
    used, unused = with_factors(parameter(2, 3)), with_factors(parameter(2, 3))
    optimizer = plain([used, unused])
    optimizer.step()
    with_factors(used)
    unused.grad = torch.randn_like(unused)
    torch.testing.assert_close(
        update(optimizer, unused), -expected_two_factors(*unused.kfac, unused.grad)
    )


def test_factors_of_the_wrong_size_raise():
    p = with_factors(parameter(2, 3), 2, 4)
    with pytest.raises(
        ValueError,
        match=r"cover the elements of parameters of shapes \[\(2, 3\)\].*shapes \[\(2, 2\), \(4, 4\)\]",
    ):
        plain([p]).step()


def test_curvature_scale_makes_up_for_accumulation():
    p = with_factors(parameter(2, 3))
    expected = expected_two_factors(*p.kfac, p.grad)
    p.kfac[0] = p.kfac[0] / 4
    optimizer = plain([p])
    optimizer.curvature_scale = 4
    torch.testing.assert_close(update(optimizer, p), -expected)


# Data parallelism


def two_ranks(rank, port, results):
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    p, partly, unseen = (parameter(2, 3) for _ in range(3))
    optimizer = plain([p, partly, unseen])
    torch.manual_seed(rank + 1)
    p.kfac = [psd(d=2), psd(d=3)]
    if rank == 0:
        partly.kfac = [psd(d=2), psd(d=3)]
    before = p.detach().clone()
    optimizer.step()
    results[rank] = [p.kfac, p.grad, p.detach() - before, list(optimizer.summary().values())]
    leave_group()


@pytest.mark.skipif(
    not dist.is_available() or sys.platform != "linux", reason="needs gloo and fork"
)
def test_factors_are_averaged_over_ranks():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("fork")
    results = context.Manager().dict()
    ranks = [
        context.Process(target=two_ranks, args=(rank, store.port, results)) for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    (first, grad, moved, kinds), (second, _, other_moved, other_kinds) = results[0], results[1]
    assert torch.equal(moved, other_moved)
    assert kinds == other_kinds == ["curvature", "fallback", "fallback"]
    B, A = ((a + b) / 2 for a, b in zip(first, second))
    torch.testing.assert_close(moved, -expected_two_factors(B, A, grad))


# Closure


def test_closure_runs_first_once_with_gradients_enabled():
    p, calls = parameter(2, 3, grad=False), []

    def closure():
        calls.append(torch.is_grad_enabled())
        loss = p.square().sum()
        p.grad = None
        loss.backward()
        p.kfac = [psd(d=2), psd(d=3)]
        return loss

    before = p.detach().clone()
    loss = plain([p]).step(closure)
    assert calls == [True]
    assert loss.item() == before.square().sum().item()
    torch.testing.assert_close(p.detach() - before, -expected_two_factors(*p.kfac, 2 * before))


def test_no_closure_returns_none():
    p = with_factors(parameter(2, 3))
    assert plain([p]).step() is None


def test_closure_without_gradients_is_no_step():
    p = parameter(2, 3, grad=False)
    optimizer = plain([p])
    assert optimizer.step(lambda: "skipped") == "skipped"
    assert optimizer.steps == 0


# Step length


def directions(params):
    return [expected_two_factors(*p.kfac, p.grad) for p in params]


def test_trust_clip_bounds_the_whole_step():
    params = [with_factors(parameter(2, 3)), with_factors(parameter(3, 4))]
    expected = directions(params)
    squared = sum((d * p.grad).sum() for d, p in zip(expected, params))
    before = [p.detach().clone() for p in params]
    plain(params, lr=0.5, kl_clip=1e-3).step()
    shrink = math.sqrt(1e-3 / squared)
    assert shrink < 1
    for p, b, d in zip(params, before, expected):
        torch.testing.assert_close(p.detach() - b, -0.5 * shrink * d)


def test_trust_clip_leaves_short_steps():
    p = with_factors(parameter(2, 3))
    (expected,) = directions([p])
    torch.testing.assert_close(update(plain([p], lr=0.5, kl_clip=1e6), p), -0.5 * expected)


def test_learning_rate_acts_after_the_clip():
    """Rates of 0.1 and 1 make steps of different lengths while the clip is active."""

    def length(lr):
        torch.manual_seed(0)
        p = with_factors(parameter(2, 3))
        return update(plain([p], lr=lr, kl_clip=1e-3), p)

    torch.testing.assert_close(length(0.1), 0.1 * length(1.0))


def test_learning_rate_schedule_acts_after_the_clip():
    def length(schedule):
        torch.manual_seed(0)
        p = with_factors(parameter(2, 3))
        optimizer = plain([p], lr=0.3, kl_clip=1e-3)
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: schedule)
        return update(optimizer, p)

    torch.testing.assert_close(length(0.25), 0.25 * length(1.0))


def test_momentum_accumulates_updates():
    p = with_factors(parameter(2, 3))
    optimizer = plain([p], momentum=0.9)
    first = update(optimizer, p)
    with_factors(p)
    optimizer.state[p]["factors"], optimizer.state[p]["weight"] = [f.clone() for f in p.kfac], 0.0
    (direction,) = directions([p])
    torch.testing.assert_close(update(optimizer, p), 0.9 * first - direction)


def test_weight_decay_is_decoupled():
    p = with_factors(parameter(2, 3))
    before, (direction,) = p.detach().clone(), directions([p])
    plain([p], lr=0.5, weight_decay=0.1).step()
    torch.testing.assert_close(p.detach(), 0.95 * before - 0.5 * direction)


def test_parameter_groups_have_their_own_settings():
    a, b = with_factors(parameter(2, 3)), with_factors(parameter(2, 3))
    b.data, b.grad, b.kfac = a.detach().clone(), a.grad.clone(), [f.clone() for f in a.kfac]
    optimizer = plain(
        [{"params": [a], "lr": 0.5}, {"params": [b], "weight_decay": 0.1, "damping": 0.2}]
    )
    start = a.detach().clone()
    optimizer.step()
    (direction,) = directions([a])
    torch.testing.assert_close(a.detach(), start - 0.5 * direction)
    assert not torch.allclose(b.detach(), 0.9 * start - direction)
    assert [group["base_lr"] for group in optimizer.param_groups] == [0.5, 1.0]


def test_group_added_later_trains():
    a, b = with_factors(parameter(2, 3)), with_factors(parameter(2, 3))
    optimizer = plain([a])
    optimizer.step()
    optimizer.add_param_group({"params": [b], "lr": 0.5})
    with_factors(a)
    torch.testing.assert_close(update(optimizer, b), -0.5 * directions([b])[0])


# Parameters that take another way


def test_parameter_without_factors_takes_adam_steps():
    p, other = with_factors(parameter(2, 3)), parameter(5)
    reference = nn.Parameter(other.detach().clone())
    optimizer = plain([p, other], lr=0.3, fallback_lr=1e-2, momentum=0.9)
    adam = torch.optim.Adam([reference], lr=1e-2)
    for _ in range(3):
        with_factors(p)
        other.grad = torch.randn_like(other)
        reference.grad = other.grad.clone()
        optimizer.step()
        adam.step()
    torch.testing.assert_close(other, reference)
    assert optimizer.summary() == {
        "parameter 0 of group 0": "curvature",
        "parameter 1 of group 0": "fallback",
    }


def test_fallback_follows_the_schedule():
    p, other = with_factors(parameter(2, 3)), parameter(5)
    optimizer = plain([p, other], fallback_lr=1e-2)
    optimizer.param_groups[0]["lr"] = 0.1
    torch.testing.assert_close(update(optimizer, other), -1e-3 * other.grad.sign())


def test_frozen_parameters_stay():
    p, frozen, unused = (
        with_factors(parameter(2, 3)),
        with_factors(parameter(2, 3)),
        parameter(2, grad=False),
    )
    frozen.requires_grad_(False)
    before = [frozen.detach().clone(), unused.detach().clone()]
    optimizer = plain([p, frozen, unused], weight_decay=0.1)
    optimizer.step()
    assert torch.equal(frozen, before[0])
    assert torch.equal(unused, before[1])
    assert list(optimizer.summary().values()) == ["curvature", "frozen", "not seen"]


def test_unfrozen_parameter_starts_to_train():
    p, frozen = with_factors(parameter(2, 3)), parameter(2, 3, grad=False).requires_grad_(False)
    optimizer = plain([p, frozen])
    optimizer.step()
    frozen.requires_grad_(True)
    with_factors(p), with_factors(frozen)
    torch.testing.assert_close(update(optimizer, frozen), -directions([frozen])[0])


def test_summary_uses_parameter_names():
    layer = nn.Linear(3, 2)
    assert plain(layer.named_parameters()).summary() == {
        "`weight`": "not seen",
        "`bias`": "not seen",
    }


# Numerical trouble


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_gradient_skips_the_step(bad):
    p = with_factors(parameter(2, 3))
    p.grad[0, 0] = bad
    before, optimizer = p.detach().clone(), plain([p])
    with pytest.warns(
        RuntimeWarning, match="inf or NaN in the gradients of .*; this step is skipped"
    ):
        optimizer.step()
    assert torch.equal(p, before)
    assert not optimizer.state


def test_non_finite_factors_are_not_averaged():
    p = with_factors(parameter(2, 3))
    optimizer = plain([p])
    optimizer.step()
    factors = [f.clone() for f in optimizer.state[p]["factors"]]
    with_factors(p).kfac[0][0, 0] = math.nan
    with pytest.warns(
        RuntimeWarning, match="inf or NaN in the curvature of parameter 0 of group 0"
    ):
        optimizer.step()
    assert_same_state(optimizer.state[p]["factors"], factors)
    assert p.isfinite().all()


def test_non_finite_direction_skips_the_step():
    p = parameter(2, 2, dtype=torch.float32)
    p.kfac, p.grad = [torch.zeros(2, 2), torch.zeros(2, 2)], torch.full((2, 2), 1e38)
    before, optimizer = p.detach().clone(), plain([p], damping=1e-3)
    with pytest.warns(
        RuntimeWarning,
        match="inf or NaN in the preconditioned gradients of .*; this step is skipped",
    ):
        optimizer.step()
    assert torch.equal(p, before)


def test_failed_inversion_keeps_the_last_inverse():
    p = with_factors(parameter(2, 3))
    optimizer = plain([p], factor_decay=0.0)
    optimizer.step()
    inverses = list(optimizer.state[p]["inverses"])
    with_factors(p).kfac[0] = -10 * psd(d=2)
    with pytest.warns(
        RuntimeWarning, match="could not invert.*its former inverse stays in use. Raise `damping`"
    ):
        optimizer.step()
    assert optimizer.state[p]["inverses"][0] is inverses[0]


def test_failed_first_inversion_falls_back():
    p = with_factors(parameter(2, 3))
    p.kfac[0] = -10 * psd(d=2)
    with pytest.warns(RuntimeWarning, match="could not invert.*the fallback update stays in use"):
        moved = update(plain([p]), p)
    torch.testing.assert_close(moved, -1e-3 * p.grad.sign())


def test_float32_failure_is_retried_in_float64():
    p = parameter(2, dtype=torch.float32)
    p.kfac = [torch.tensor([[1.0, 1.0], [1.0, 1.0]])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moved = update(plain([p], damping=1e-10), p)
    assert moved.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_parameters_keep_float32_state(dtype):
    p = parameter(2, 3, dtype=dtype, grad=False)
    p.grad, p.kfac = torch.randn(2, 3).to(dtype), [psd(d=2).float(), psd(d=3).float()]
    optimizer = plain([p], momentum=0.9)
    optimizer.step()
    state = optimizer.state[p]
    assert {t.dtype for t in [*state["factors"], *state["inverses"], state["velocity"]]} == {
        torch.float32
    }
    assert p.dtype == dtype


def test_autocast_does_not_reach_the_update():
    moves = []
    for enabled in (False, True):
        torch.manual_seed(0)
        p = with_factors(parameter(8, 8, dtype=torch.float32))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            moves.append(update(plain([p]), p))
    assert torch.equal(*moves)


# State


def settled(params):
    return plain(
        params, 0.3, 0.03, momentum=0.9, kl_clip=1e-3, factor_interval=2, weight_decay=0.01
    )


def trained(dtype=torch.float64, steps=4, optimizer=None, params=None):
    generator = torch.Generator().manual_seed(steps)
    params = params or [
        nn.Parameter(torch.ones(2, 3, dtype=dtype)),
        nn.Parameter(torch.ones(5, dtype=dtype)),
    ]
    optimizer = optimizer or settled(params)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        roots = [torch.randn(d, d, generator=generator) for d in (2, 3)]
        params[0].kfac = [
            (root @ root.T).to(torch.promote_types(dtype, torch.float32)) for root in roots
        ]
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transfer", [saved_and_loaded, copy.deepcopy], ids=["file", "memory"])
def test_resuming_is_bit_exact(dtype, transfer):
    params, optimizer = trained(dtype, steps=5)
    state = transfer(optimizer.state_dict())
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = settled(copies)
    resumed.load_state_dict(state)
    assert_same_state(resumed.state_dict(), optimizer.state_dict())
    assert [bool(o.required_extensions()) for o in (resumed, optimizer)] == [False, False]
    trained(dtype, 3, optimizer, params)
    trained(dtype, 3, resumed, copies)
    for a, b in zip(params, copies):
        assert torch.equal(a, b)
    assert_same_state(resumed.state_dict(), optimizer.state_dict())


def test_loaded_state_is_a_copy():
    _, optimizer = trained()
    params, other = trained()
    state = optimizer.state_dict()
    expected = copy.deepcopy(state)
    other.load_state_dict(state)
    trained(optimizer=other, params=params)
    assert_same_state(optimizer.state_dict(), expected)


def test_schedule_resumes_relative_to_the_first_learning_rate():
    params, optimizer = trained()
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.5)
    resumed = settled([nn.Parameter(p.detach().clone()) for p in params])
    resumed.load_state_dict(optimizer.state_dict())
    (group,) = resumed.param_groups
    assert (group["lr"], group["base_lr"]) == (0.15, 0.3)


def test_state_of_another_optimizer_is_left_out_with_a_warning():
    p = parameter(2, 3)
    optimizer = plain([p])
    before = optimizer.state_dict()
    with pytest.warns(RuntimeWarning, match="without the state of KFACOptimizer.*start anew"):
        optimizer.load_state_dict(torch.optim.SGD([p], lr=7.0).state_dict())
    assert optimizer.state_dict() == before


def test_sharded_inverses_are_not_saved_and_need_no_eigenbasis():
    with pytest.raises(ValueError, match=r"`shard_inverses=True` needs `eigen=False`"):
        KFACOptimizer([parameter(2, 3)], shard_inverses=True, eigen=True)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(12, 4), torch.randint(3, (12,))
    optimizer = KFACOptimizer(net.parameters(), shard_inverses=True)

    def step(optimizer):
        with curvature(*optimizer.extensions):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()

    step(optimizer)
    assert "inverses" in optimizer.state[net[0].weight]
    saved = optimizer.state_dict()
    assert not any("inverses" in state for state in saved["state"].values())
    resumed = KFACOptimizer(net.parameters(), shard_inverses=True)
    resumed.load_state_dict(saved)
    step(resumed)
    assert resumed.steps == 2
    assert all(kind == "curvature" for kind in resumed.summary().values())


def test_state_of_an_older_version_keeps_what_it_lacks():
    params, optimizer = trained(steps=3)
    state = optimizer.state_dict()
    del state["loss_floor"], state["tried"]
    fresh = plain(params)
    fresh.load_state_dict(state)
    assert (fresh.steps, fresh.loss_floor, fresh.tried) == (3, 0.0, False)


@pytest.mark.parametrize(
    "transfer", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"]
)
def test_copied_optimizer_goes_on(transfer):
    params, optimizer = trained()
    twin = transfer(optimizer)
    copies = twin.param_groups[0]["params"]
    trained(steps=3, optimizer=optimizer, params=params)
    trained(steps=3, optimizer=twin, params=copies)
    for a, b in zip(params, copies):
        assert torch.equal(a, b)


# Settings

BAD = {
    "lr": (0.0, "`lr` must be positive, found 0.0"),
    "damping": (-0.1, "`damping` must be positive, found -0.1"),
    "momentum": (1.0, r"`momentum` must lie in \[0, 1\), found 1.0"),
    "weight_decay": (-1.0, "`weight_decay` must not be negative, found -1.0"),
    "factor_decay": (1.5, r"`factor_decay` must lie in \[0, 1\), found 1.5"),
    "factor_interval": (0, "`factor_interval` must be an integer of at least 1, found 0"),
    "inverse_interval": (2.5, "`inverse_interval` must be an integer of at least 1, found 2.5"),
    "kl_clip": (0.0, "`kl_clip` must be positive, found 0.0"),
    "curvature": (
        "hessian",
        "`curvature` must be one of 'mc', 'exact', 'empirical', found 'hessian'",
    ),
    "mc_samples": (0, "`mc_samples` must be an integer of at least 1, found 0"),
    "weight_sharing": ("sum", "`weight_sharing` must be one of 'expand', 'reduce', found 'sum'"),
    "max_factor_size": (0, "`max_factor_size` must be an integer of at least 1, found 0"),
    "split_factors": (0, "`split_factors` must be an integer of at least 1, found 0"),
    "fallback_lr": (math.nan, "`fallback_lr` must be positive, found nan"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_raise(name):
    value, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        KFACOptimizer([parameter(2)], **{name: value})


def test_bad_group_settings_raise():
    with pytest.raises(ValueError, match="`damping` must be positive, found 0"):
        KFACOptimizer([{"params": [parameter(2)], "damping": 0}])
    with pytest.raises(
        ValueError, match="`kl_clip` holds for all parameter groups; pass it to KFACOptimizer"
    ):
        KFACOptimizer([{"params": [parameter(2)], "kl_clip": 1.0}])


def test_complex_and_sparse_parameters_raise():
    with pytest.raises(TypeError, match="found a complex one"):
        KFACOptimizer([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    with pytest.raises(TypeError, match="found a sparse one"):
        KFACOptimizer([nn.Parameter(torch.eye(2).to_sparse())])


def test_sparse_gradient_raises():
    layer = nn.Embedding(4, 2, sparse=True)
    layer(torch.tensor([1])).sum().backward()
    with pytest.raises(
        RuntimeError, match=r"found a sparse one on parameter 0 of group 0.*`sparse=False`"
    ):
        plain(layer.parameters()).step()
