"""Mixtures of experts: grouped products of matrices, every row a sample, against the matrices one by one."""

import oracle
import pytest
import torch
from losses_table import LOSS
from torch import nn
from torch.nn import functional as F
from zoo import Problem, assert_close

from lightning_curv import curvature
from lightning_curv.extensions import (
    KFLR,
    BatchDiagGGNExact,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    SqrtGGNExact,
    SumGradSquared,
    Variance,
)

pytestmark = pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="a torch without grouped products")
QUANTITIES = [
    (BatchGrad, oracle.grad_batch),
    (BatchL2Grad, oracle.batch_l2),
    (SumGradSquared, oracle.sum_grad_squared),
    (Variance, oracle.variance),
    (DiagGGNExact, oracle.diag_ggn),
    (BatchDiagGGNExact, oracle.diag_ggn_batch),
]


class Experts(nn.Module):
    """Rows sorted by expert; the second expert has none, the last rows have no expert."""

    def __init__(self, form, grouped=True):
        super().__init__()
        self.form, self.grouped, self.offs = form, grouped, torch.tensor([3, 3, 7], dtype=torch.int32)
        self.weight = nn.Parameter(torch.randn(3, 4, 8) if form == "out_in" else torch.randn(3, 8, 4))
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        x = torch.tanh(x)
        W = self.weight.mT if self.form == "out_in" else self.weight
        if not self.grouped:
            ends = [0, *self.offs.tolist()]
            rows = [x[a:b] @ w for a, b, w in zip(ends, ends[1:], W)]
            y = torch.cat([*rows, x.new_zeros(len(x) - ends[-1], 4)])
        elif self.form == "columns":
            y = grouped_mm(self.weight.mT, x.mT, self.offs).mT
        else:
            y = grouped_mm(x, W, self.offs)
        known = torch.arange(len(x))[:, None] < self.offs[-1]
        return self.head(torch.where(known, y, torch.zeros((), dtype=y.dtype)))  # what is behind is not initialised


def grouped_mm(a, b, offs):
    return F.grouped_mm(a, b, offs=offs) if hasattr(F, "grouped_mm") else torch._grouped_mm(a, b, offs)


def experts(form, grouped):
    torch.manual_seed(0)
    model = Experts(form, grouped)
    X, y = torch.randn(8, 8), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    return Problem(model, X, y, LOSS["ce_sum"]) if grouped else Problem(model.double(), X.double(), y, LOSS["ce_sum"])


@pytest.mark.parametrize("form", ["in_out", "out_in", "columns"])
def test_quantities_are_those_of_the_matrices_one_by_one(form):
    case, reference = experts(form, True), experts(form, False)
    with curvature(*(extension() for extension, _ in QUANTITIES), SqrtGGNExact(), check=True):
        case.compute_loss().backward()
    weight = case.model.weight
    for extension, naive in QUANTITIES:
        expected = naive(reference)["weight"]
        found = getattr(weight, extension.savefield).double()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, msg=extension.savefield)
    V = weight.sqrt_ggn_exact.double().flatten(2)
    torch.testing.assert_close(
        torch.einsum("vnp,vnq->npq", V, V), oracle.ggn(reference)["weight"], rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("form", ["in_out", "out_in", "columns"])
def test_every_expert_has_factors(form):
    """A, the mean over all rows, and B are made of the expert's own rows."""
    case, reference = experts(form, True), experts(form, False)
    with curvature(KFLR()):
        case.compute_loss().backward()
    factors = [f.double() for f in case.model.weight.kflr]
    B, A = factors if form == "out_in" else reversed(factors)
    assert (A.shape, B.shape) == ((3, 8, 8), (3, 4, 4))
    x, H, M = torch.tanh(reference.X), oracle.loss_hessian(reference), reference.model.head.weight.detach()
    for expert, rows in enumerate([[0, 1, 2], [], [3, 4, 5, 6]]):
        assert_close(A[expert], x[rows].T @ x[rows] / len(x), rtol=1e-4)
        assert_close(B[expert], torch.einsum("nab,ai,bj->ij", H[rows], M, M), rtol=1e-4)


def test_batched_products_of_experts():
    """As many rows for every expert: a product of matrices one by one."""
    torch.manual_seed(0)
    W, x = nn.Parameter(torch.randn(3, 8, 4)), torch.randn(3, 5, 8)
    with curvature(BatchGrad(), KFLR(), check=True):
        F.cross_entropy(grouped_mm(x, W, None).tanh().sum(0), torch.tensor([0, 1, 2, 3, 0])).backward()
    with torch.no_grad():
        z = (x @ W).tanh()
        g = (z.sum(0).softmax(1) - torch.eye(4)[[0, 1, 2, 3, 0]]) / 5 * (1 - z**2)
    torch.testing.assert_close(W.grad_batch, torch.einsum("qni,qno->nqio", x, g), rtol=1e-4, atol=1e-5)
    assert [f.shape for f in W.kflr] == [(3, 8, 8), (3, 4, 4)]


def test_what_no_rule_has_is_named():
    W, x = nn.Parameter(torch.randn(8, 4)), torch.randn(4, 8)
    with pytest.raises(NotImplementedError, match=r"_?grouped_mm"), curvature(BatchGrad(), batch_size=4):
        grouped_mm(x, W, torch.tensor([4, 8], dtype=torch.int32)).sum().backward()
