"""Random architectures against brute force: depth, ops, strides, groups, weight sharing, dtype drawn by hypothesis."""

import copy
from dataclasses import replace

import hypothesis_networks as networks
import oracle
import torch
from hypothesis import HealthCheck, given, settings
from torch.nn.attention import SDPBackend, sdpa_kernel
from zoo import assert_fields, compute

from lightning_curv.extensions import (
    BatchDiagGGNExact,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagHessian,
    SumGradSquared,
    Variance,
)

QUANTITIES = [
    (BatchGrad, "grad_batch"),
    (BatchL2Grad, "batch_l2"),
    (SumGradSquared, "sum_grad_squared"),
    (Variance, "variance"),
]


def in_float64(problem):
    X, y = (t.double() if t.is_floating_point() else t for t in (problem.X, problem.y))
    return replace(problem, model=copy.deepcopy(problem.model).double(), X=X, y=y)


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(networks.problems())
def test_first_order_and_ggn(problem):
    compute(
        problem,
        *(extension() for extension, _ in QUANTITIES),
        DiagGGNExact(),
        BatchDiagGGNExact(),
        check=True,
    )
    judge = in_float64(problem)
    per_sample = oracle.diag_ggn_batch(judge)
    expected = {field: getattr(oracle, field)(judge) for _, field in QUANTITIES}
    expected["diag_ggn_exact_batch"] = per_sample
    expected["diag_ggn_exact"] = {name: value.sum(0) for name, value in per_sample.items()}
    for field, values in expected.items():
        if next(problem.model.parameters()).dtype == torch.float64:
            assert_fields(problem, field, values)
        else:
            assert_rounded(problem, field, values)


def assert_rounded(problem, field, expected):
    """float32: errors small against the largest entry of any parameter (rounding spreads over the network)."""
    largest = max(value.abs().max() for value in expected.values())
    if field == "variance":  # rounding of the mean enters squared
        largest += 1e-8 * max(p.grad.square().max().double() for p in problem.parameters().values())
    for name, p in problem.parameters().items():
        error = (getattr(p, field).double() - expected[name]).abs().max()
        assert error <= 1e-3 * largest, (
            f"{name}.{field}: {error:.3g} for entries up to {largest:.3g}"
        )


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(networks.problems(dtypes=(torch.float64,)))
def test_hessian(problem):
    from hessian_oracle import diag_hessian

    compute(problem, DiagHessian())
    with sdpa_kernel(SDPBackend.MATH):
        expected = diag_hessian(problem)
    assert_fields(problem, "diag_h", expected)
