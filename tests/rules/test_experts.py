"""Mixtures of experts, every row a sample: grouped products and matrices picked by index, against brute force."""

import hessian_oracle
import oracle
import pytest
import torch
from losses_table import LOSS
from packages import needs
from torch import nn
from torch.nn import functional as F
from zoo import QUANTITIES, Problem, assert_close, assert_fields, compute

from lightning_curv import curvature
from lightning_curv.extensions import (
    KFLR,
    BatchDiagGGNExact,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagHessian,
    SqrtGGNExact,
    SumGradSquared,
    Variance,
)

GROUPED = pytest.mark.skipif(
    not hasattr(torch, "_grouped_mm"), reason="a torch without grouped products"
)
OF_ROWS = [
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
        self.form, self.grouped, self.offs = (
            form,
            grouped,
            torch.tensor([3, 3, 7], dtype=torch.int32),
        )
        self.weight = nn.Parameter(
            torch.randn(3, 4, 8) if form == "out_in" else torch.randn(3, 8, 4)
        )
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
        return self.head(
            torch.where(known, y, torch.zeros((), dtype=y.dtype))
        )  # what is behind is not initialised


def grouped_mm(a, b, offs):
    return (
        F.grouped_mm(a, b, offs=offs) if hasattr(F, "grouped_mm") else torch._grouped_mm(a, b, offs)
    )


def experts(form, grouped):
    torch.manual_seed(0)
    model = Experts(form, grouped)
    X, y = torch.randn(8, 8), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    return (
        Problem(model, X, y, LOSS["ce_sum"])
        if grouped
        else Problem(model.double(), X.double(), y, LOSS["ce_sum"])
    )


@GROUPED
@pytest.mark.parametrize("form", ["in_out", "out_in", "columns"])
def test_quantities_are_those_of_the_matrices_one_by_one(form):
    case, reference = experts(form, True), experts(form, False)
    with curvature(*(extension() for extension, _ in OF_ROWS), SqrtGGNExact(), check=True):
        case.compute_loss().backward()
    weight = case.model.weight
    for extension, naive in OF_ROWS:
        expected = naive(reference)["weight"]
        found = getattr(weight, extension.savefield).double()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, msg=extension.savefield)
    V = weight.sqrt_ggn_exact.double().flatten(2)
    torch.testing.assert_close(
        torch.einsum("vnp,vnq->npq", V, V), oracle.ggn(reference)["weight"], rtol=1e-4, atol=1e-6
    )


@GROUPED
@pytest.mark.parametrize("form", ["in_out", "out_in", "columns"])
def test_every_expert_has_factors(form):
    """A, the mean over all rows, and B are made of the expert's own rows."""
    case, reference = experts(form, True), experts(form, False)
    with curvature(KFLR()):
        case.compute_loss().backward()
    factors = [f.double() for f in case.model.weight.kflr]
    B, A = factors if form == "out_in" else reversed(factors)
    assert (A.shape, B.shape) == ((3, 8, 8), (3, 4, 4))
    x, H, M = (
        torch.tanh(reference.X),
        oracle.loss_hessian(reference),
        reference.model.head.weight.detach(),
    )
    for expert, rows in enumerate([[0, 1, 2], [], [3, 4, 5, 6]]):
        assert_close(A[expert], x[rows].T @ x[rows] / len(x), rtol=1e-4)
        assert_close(B[expert], torch.einsum("nab,ai,bj->ij", H[rows], M, M), rtol=1e-4)


@GROUPED
def test_batched_products_of_experts():
    """As many rows for every expert: a product of matrices one by one."""
    torch.manual_seed(0)
    W, x = nn.Parameter(torch.randn(3, 8, 4)), torch.randn(3, 5, 8)
    with curvature(BatchGrad(), KFLR(), check=True):
        F.cross_entropy(
            grouped_mm(x, W, None).tanh().sum(0), torch.tensor([0, 1, 2, 3, 0])
        ).backward()
    with torch.no_grad():
        z = (x @ W).tanh()
        g = (z.sum(0).softmax(1) - torch.eye(4)[[0, 1, 2, 3, 0]]) / 5 * (1 - z**2)
    torch.testing.assert_close(
        W.grad_batch, torch.einsum("qni,qno->nqio", x, g), rtol=1e-4, atol=1e-5
    )
    assert [f.shape for f in W.kflr] == [(3, 8, 8), (3, 4, 4)]


@GROUPED
def test_what_no_rule_has_is_named_and_right():
    """Groups along the contracted axis."""
    W, x, ends = (
        nn.Parameter(torch.randn(8, 4)),
        torch.randn(4, 8),
        torch.tensor([4, 8], dtype=torch.int32),
    )
    with pytest.warns(UserWarning, match=r"_?grouped_mm"), curvature(BatchGrad(), batch_size=4):
        grouped_mm(x, W, ends).square().sum((0, 2)).sum().backward()
    rows = [
        torch.autograd.grad((x[n, s] @ W[s]).square().sum(), W)[0]
        for n in range(4)
        for s in (slice(4), slice(4, 8))
    ]
    torch.testing.assert_close(
        W.grad_batch, torch.stack(rows).unflatten(0, (4, 2)).sum(1), rtol=1e-4, atol=1e-4
    )


class Picked(nn.Module):
    """One matrix for every row, picked by index, as in a batched product of experts."""

    def __init__(self, transposed):
        super().__init__()
        self.weight, self.bias, self.transposed = (
            nn.Parameter(torch.zeros(3, 2, 4)),
            nn.Parameter(torch.ones(3, 2)),
            transposed,
        )

    def forward(self, x):
        expert = (x[:, 0] > 0).long() - 2 * (x[:, 1] > 0).long()  # counted from the end, too
        if self.transposed:
            out = torch.bmm(x.unsqueeze(1), self.weight.mT.contiguous()[expert]).squeeze(1)
        else:
            out = torch.bmm(self.weight[expert], x.unsqueeze(-1)).squeeze(-1)
        return out.add_(self.bias[expert]).tanh()


@pytest.mark.filterwarnings("error::lightning_curv.rules.fallback.FallbackWarning")
@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_picked_by_index(transposed):
    torch.manual_seed(0)
    model, X = Picked(transposed).double(), torch.randn(7, 4, dtype=torch.float64)
    for p in model.parameters():
        nn.init.normal_(p)
    case = Problem(model, X, LOSS["mse_sum"].target((7, 2)), LOSS["mse_sum"])
    compute(
        case,
        *(extension() for extension, _, _ in QUANTITIES),
        SqrtGGNExact(),
        KFLR(),
        DiagHessian(),
        check=True,
    )
    for _, field, naive in QUANTITIES:
        assert_fields(case, field, naive(case))
    assert model.weight.grad_batch.any()
    ggn, hessian = oracle.ggn(case), hessian_oracle.diag_hessian(case)
    for key, p in case.parameters().items():
        V = p.sqrt_ggn_exact.flatten(2)
        assert_close(torch.einsum("vnp,vnq->npq", V, V), ggn[key], label=key)
        assert_close(p.diag_h, hessian[key], label=key)
    (diagonal,) = model.weight.kflr
    assert_close(diagonal, oracle.diag_ggn(case)["weight"].flatten())


@pytest.mark.parametrize("steps_first", [False, True])
def test_rows_picked_by_index_are_an_embedding(steps_first):
    torch.manual_seed(0)
    table, y = nn.Parameter(torch.randn(5, 3, dtype=torch.float64)), torch.tensor([0, 1, 2, 0])
    tokens, found = torch.randint(5, (4, 6)), []
    for look_up in (lambda index: table[index], lambda index: F.embedding(index, table)):
        with curvature(BatchGrad(), KFLR(), check=True):
            rows = look_up(tokens.T if steps_first else tokens)
            F.cross_entropy(rows.sin().mean(0 if steps_first else 1), y).backward()
        found.append([table.grad_batch, *table.kflr])
        table.grad = None
    torch.testing.assert_close(*found)


@GROUPED
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_experts_of_transformers(implementation):
    """Tokens that are sorted by expert already."""
    needs("transformers")
    mixtral = needs("transformers.models.mixtral.modeling_mixtral")
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
    }
    config = mixtral.MixtralConfig(**sizes)
    config._experts_implementation = implementation
    torch.manual_seed(0)
    experts = mixtral.MixtralExperts(config)
    for p in experts.parameters():
        nn.init.normal_(p, std=0.5)
    x, expert, weight = (
        torch.randn(7, 8),
        torch.tensor([0, 0, 1, 1, 1, 3, 3])[:, None],
        torch.rand(7, 1),
    )
    y = torch.randint(8, (7,))
    with curvature(BatchGrad(), KFLR(), check=True):
        F.cross_entropy(experts(x, expert, weight), y, reduction="sum").backward()
    for n in range(7):
        loss = F.cross_entropy(
            experts(x[n : n + 1], expert[n : n + 1], weight[n : n + 1]), y[n : n + 1]
        )
        for p, expected in zip(
            experts.parameters(), torch.autograd.grad(loss, experts.parameters())
        ):
            torch.testing.assert_close(p.grad_batch[n], expected, rtol=1e-4, atol=1e-5)
    assert [len(p.kflr) for p in experts.parameters()] == (
        [2, 2] if implementation == "grouped_mm" else [1, 1]
    )
