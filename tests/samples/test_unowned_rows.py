"""Rows that no sample depends on, and ops that torch batches wrongly over several columns."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_curv import curvature
from lightning_curv.extensions import GGNMP, BatchDiagGGNExact, BatchGrad

IGNORED = "ignore::lightning_curv.rules.fallback.FallbackWarning"


@pytest.fixture
def poisoned_memory(monkeypatch):
    """What is not written holds something."""
    full = torch.Tensor.new_full
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda tensor, *size, **options: full(tensor, *_size(size), 1.0)
    )


def _size(size):
    return size if size and not isinstance(size[0], int) else (size,)


def test_products_beside_per_sample_gradients_read_no_memory_that_was_not_written(poisoned_memory):
    torch.manual_seed(0)
    first, last, x = (
        nn.Linear(3, 4).double(),
        nn.Linear(4, 2).double(),
        torch.randn(5, 3, dtype=torch.float64),
    )
    order = torch.tensor([3, 0, 2, 4])  # one row is dropped
    with curvature(BatchGrad(), GGNMP(), batch_size=5):
        F.mse_loss(
            last(first(x.flip(0)).tanh()[order]), torch.zeros(4, 2, dtype=torch.float64)
        ).backward()
    for p in (*first.parameters(), *last.parameters()):
        torch.testing.assert_close(p.grad_batch.sum(0), p.grad)
        torch.testing.assert_close(p.grad_batch[3], torch.zeros_like(p))
        assert bool(p.ggnmp(torch.ones_like(p)).isfinite().all())


class Prototypes(nn.Module):
    """Distances from prototypes."""

    def __init__(self):
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return torch.cdist(x, self.prototypes)


@pytest.mark.filterwarnings(IGNORED)
def test_all_columns_of_an_op_without_a_rule_are_right():
    torch.manual_seed(0)
    model, x, y = (
        Prototypes().double(),
        torch.randn(5, 4, dtype=torch.float64),
        torch.tensor([0, 1, 2, 0, 1]),
    )
    with curvature(BatchDiagGGNExact()):
        F.cross_entropy(model(x), y, reduction="sum").backward()
    for n in range(5):
        z = model(x[n : n + 1])[0]
        J = torch.stack(
            [torch.autograd.grad(e, model.prototypes, retain_graph=True)[0].flatten() for e in z]
        )
        p = z.detach().softmax(0)
        expected = torch.einsum("cp,cd,dp->p", J, p.diag() - p.outer(p), J).reshape(3, 4)
        torch.testing.assert_close(model.prototypes.diag_ggn_exact_batch[n], expected)


class Attention(nn.Module):
    """Weights over the neighbours of every node in which a score of the node itself cancels."""

    def __init__(self, features):
        super().__init__()
        self.linear, self.score = nn.Linear(features, 6), nn.Parameter(torch.randn(1, 6))

    def forward(self, x, edges):
        source, target = edges
        z = self.linear(x)
        scores = (z * self.score).sum(1)
        weight = (z.sum(1)[source] + scores[target]).exp()
        total = z.new_zeros(len(x)).index_add(0, target, weight)
        return z.new_zeros(len(x), 6).index_add(
            0, target, z[source] * (weight / total[target])[:, None]
        )


def rings(sizes):
    """Edges of several rings, in both directions."""
    edges, start = [], 0
    for size in sizes:
        node = torch.arange(size)
        edges.append(torch.stack([node, (node + 1) % size]) + start)
        start += size
    return torch.cat([torch.cat([one, one.flip(0)], 1) for one in edges], 1)


@pytest.mark.parametrize("sizes", [(4, 4, 4, 4), (3, 5, 4, 2)])
@pytest.mark.parametrize("features", [3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(3))
def test_gradients_that_are_rounding_errors_only_belong_to_anybody(seed, dtype, features, sizes):
    """And 16 rows of 4 features are 4 graphs of 4 nodes, however many axes have the length 4."""
    torch.manual_seed(seed)
    count = len(sizes)
    model = Attention(features).to(dtype)
    x, y = torch.randn(sum(sizes), features, dtype=dtype), torch.randn(count, 6, dtype=dtype)
    owner = torch.arange(count).repeat_interleave(torch.tensor(sizes))
    with curvature(BatchGrad()):
        nodes = model(x, rings(sizes)).tanh()
        F.mse_loss(
            nodes.new_zeros(count, 6).index_add(0, owner, nodes), y, reduction="sum"
        ).backward()
    scale = max(float(p.grad.abs().max()) for p in model.parameters())
    for n, rows in enumerate(x.split(sizes)):
        nodes = model(rows, rings(sizes[n : n + 1])).tanh()
        alone = torch.autograd.grad(
            F.mse_loss(nodes.sum(0), y[n], reduction="sum"), [*model.parameters()]
        )
        for p, expected in zip(model.parameters(), alone, strict=True):
            tolerance = 100 * torch.finfo(dtype).eps * scale
            torch.testing.assert_close(p.grad_batch[n], expected, rtol=0, atol=tolerance)


def test_rows_of_several_per_sample_with_as_many_features_as_samples():
    """Here 16 rows of 4 features are 4 graphs of 4 nodes, not 16 steps of 4 sequences."""
    torch.manual_seed(0)
    count = 4
    x, y = (
        torch.randn(count * 4, count, dtype=torch.float64),
        torch.randn(count, count, dtype=torch.float64),
    )
    scale = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    with curvature(BatchGrad()):
        nodes = ((1 + scale) * x).tanh()
        pooled = nodes.new_zeros(count, count).index_add(
            0, torch.arange(count).repeat_interleave(4), nodes
        )
        F.mse_loss(pooled, y, reduction="sum").backward()
    for n in range(count):
        pooled = ((1 + scale) * x[4 * n : 4 * n + 4]).tanh().sum(0)
        [alone] = torch.autograd.grad(F.mse_loss(pooled, y[n], reduction="sum"), [scale])
        torch.testing.assert_close(scale.grad_batch[n], alone)


class Bank(nn.Module):
    """A layer whose matrix is mixed from the vectors of a bank that have the largest logits."""

    def __init__(self):
        super().__init__()
        self.bank, self.logits = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(2, 5))

    def forward(self, x):
        largest, index = self.logits.topk(3)
        return x @ (largest.softmax(-1).unsqueeze(-1) * self.bank[index]).sum(1).T


@pytest.mark.parametrize("count", [2, 3, 4])
def test_places_that_parameters_choose_are_constants(count):
    """Whatever N is: 2 rows of 3 numbers are not 2 samples, nor are they 3."""
    torch.manual_seed(0)
    model = Bank().double()
    x, y = torch.randn(count, 4, dtype=torch.float64), torch.arange(count) % 2
    with curvature(BatchGrad()):
        F.cross_entropy(model(x), y, reduction="sum").backward()
    for n in range(count):
        loss = F.cross_entropy(model(x[n : n + 1]), y[n : n + 1])
        for p, alone in zip(
            model.parameters(), torch.autograd.grad(loss, [*model.parameters()]), strict=True
        ):
            torch.testing.assert_close(p.grad_batch[n], alone)
