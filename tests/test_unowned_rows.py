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
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda tensor, *size, **options: full(tensor, *_size(size), 1.0))


def _size(size):
    return size if size and not isinstance(size[0], int) else (size,)


def test_products_beside_per_sample_gradients_read_no_memory_that_was_not_written(poisoned_memory):
    torch.manual_seed(0)
    first, last, x = nn.Linear(3, 4).double(), nn.Linear(4, 2).double(), torch.randn(5, 3, dtype=torch.float64)
    order = torch.tensor([3, 0, 2, 4])  # one row is dropped
    with curvature(BatchGrad(), GGNMP(), batch_size=5):
        F.mse_loss(last(first(x.flip(0)).tanh()[order]), torch.zeros(4, 2, dtype=torch.float64)).backward()
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
    model, x, y = Prototypes().double(), torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    with curvature(BatchDiagGGNExact()):
        F.cross_entropy(model(x), y, reduction="sum").backward()
    for n in range(5):
        z = model(x[n : n + 1])[0]
        J = torch.stack([torch.autograd.grad(e, model.prototypes, retain_graph=True)[0].flatten() for e in z])
        p = z.detach().softmax(0)
        expected = torch.einsum("cp,cd,dp->p", J, p.diag() - p.outer(p), J).reshape(3, 4)
        torch.testing.assert_close(model.prototypes.diag_ggn_exact_batch[n], expected)
