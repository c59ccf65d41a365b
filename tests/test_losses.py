"""Every loss, as function and as module, against brute force on one small network."""

import oracle
import pytest
import torch
from losses_table import LOSSES
from test_ggn import RUNS, assert_unbiased
from torch import nn
from zoo import Problem, assert_close, assert_fields, compute

from lightning_curv import curvature, extend
from lightning_curv.extensions import (
    KFLR,
    BatchDiagGGNExact,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagGGNMC,
    SqrtGGNExact,
    SumGradSquared,
    Variance,
)

N = 4


def small_problem(loss) -> Problem:
    torch.manual_seed(len(loss.name))
    shape = torch.Size((3, *loss.extra))
    model = nn.Sequential(nn.Linear(5, 2), nn.Tanh(), nn.Linear(2, shape.numel()), nn.Unflatten(1, shape)).double()
    X = torch.randn(N, 5, dtype=torch.float64)
    return Problem(model, X, loss.target((N, *shape)), loss)


def by_function(problem):
    return problem.compute_loss


def by_module(problem):
    criterion = problem.loss.module()
    return lambda: criterion(problem.model(problem.X), problem.y)


QUANTITIES = [
    (BatchGrad, "grad_batch", oracle.grad_batch),
    (BatchL2Grad, "batch_l2", oracle.batch_l2),
    (SumGradSquared, "sum_grad_squared", oracle.sum_grad_squared),
    (Variance, "variance", oracle.variance),
    (DiagGGNExact, "diag_ggn_exact", oracle.diag_ggn),
    (BatchDiagGGNExact, "diag_ggn_exact_batch", oracle.diag_ggn_batch),
]


@pytest.mark.parametrize("form", [by_function, by_module])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_quantities_equal_brute_force(loss, form):
    problem = small_problem(loss)
    with curvature(*[extension() for extension, _, _ in QUANTITIES], check=True):
        form(problem)().backward()
    for _, field, naive in QUANTITIES:
        assert_fields(problem, field, naive(problem))


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_square_root_equals_brute_force(loss):
    problem = small_problem(loss)
    compute(problem, SqrtGGNExact())
    blocks = oracle.ggn(problem)
    for key, p in problem.parameters().items():
        V = p.sqrt_ggn_exact
        assert V.shape == (3 * torch.Size(loss.extra).numel(), N, *p.shape)
        V = V.reshape(*V.shape[:2], -1)
        assert_close(torch.einsum("vnp,vnq->npq", V, V), blocks[key], label=key)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_kronecker_factors_equal_brute_force(loss):
    problem = small_problem(loss)
    compute(problem, KFLR())
    params = problem.parameters()
    for key, factors in oracle.kronecker(problem, "expand").items():
        for actual, expected in zip(params[key].kflr, factors):
            assert_close(actual, expected, label=key)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_sampled_labels_are_unbiased(loss):
    problem = small_problem(loss)
    generator = torch.Generator().manual_seed(0)
    estimates = {key: [] for key in problem.parameters()}
    for _ in range(RUNS // 2):
        compute(problem, DiagGGNMC(mc_samples=16), generator=generator)
        for key, p in problem.parameters().items():
            estimates[key].append(p.diag_ggn_mc)
    for key, exact in oracle.diag_ggn(problem).items():
        assert_unbiased(torch.stack(estimates[key]), exact, key)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_factor_on_the_loss_scales_gradients_and_curvature(loss):
    plain, tripled = small_problem(loss), small_problem(loss)
    compute(plain, BatchGrad(), DiagGGNExact())
    with curvature(BatchGrad(), DiagGGNExact()):
        (3 * tripled.compute_loss()).backward()
    for p, q in zip(plain.model.parameters(), tripled.model.parameters()):
        assert_close(q.grad_batch, 3 * p.grad_batch)
        assert_close(q.diag_ggn_exact, 3 * p.diag_ggn_exact)


def test_log_softmax_in_the_model_and_extended_nll():
    """`LogSoftmax` as last layer and `NLLLoss` are one cross entropy."""
    loss = next(loss for loss in LOSSES if loss.name == "ce")
    problem = small_problem(loss)
    model = extend(nn.Sequential(problem.model, nn.LogSoftmax(1)))
    criterion = extend(nn.NLLLoss())
    value = criterion(model(problem.X), problem.y)
    with curvature(DiagGGNExact(), BatchGrad()):
        value.backward()
    assert_fields(problem, "diag_ggn_exact", oracle.diag_ggn(problem))
    assert_fields(problem, "grad_batch", oracle.grad_batch(problem))


def test_loss_without_closed_form_serves_gradients():
    """Gradient quantities need no Hessian: any loss will do."""
    problem = small_problem(LOSSES[0])
    with curvature(BatchGrad()):
        (problem.model(problem.X) ** 4).sum().backward()
    for p in problem.model.parameters():
        assert_close(p.grad_batch.sum(0), p.grad)


def test_loss_without_closed_form_is_refused_for_curvature():
    problem = small_problem(LOSSES[0])
    with pytest.raises((NotImplementedError, RuntimeError, ValueError), match="loss"), curvature(DiagGGNExact()):
        (problem.model(problem.X) ** 4).sum().backward()
