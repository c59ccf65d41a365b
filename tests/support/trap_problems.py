"""What the trap tests share: a small problem, the two fields they look at, and who judges them."""

import oracle
import torch
from torch import nn
from zoo import ROW, Problem, assert_fields

from lightning_curv.extensions import (
    BatchGrad,
    DiagGGNExact,
)

FIELDS = ["grad_batch", "diag_ggn_exact"]
ORACLES = {"grad_batch": oracle.grad_batch, "diag_ggn_exact": oracle.diag_ggn}


def both():
    return BatchGrad(), DiagGGNExact()


def problem(seed=0, name="mlp_sigmoid") -> Problem:
    """A row of the zoo with a batch of its own for every seed."""
    row = ROW[name].make()
    torch.manual_seed(seed)
    row.X, row.y = torch.randn_like(row.X), row.y.roll(seed)
    return row


def assert_right(case: Problem) -> None:
    for field, naive in ORACLES.items():
        assert_fields(case, field, naive(case))


def assert_untouched(model: nn.Module) -> None:
    for p in model.parameters():
        assert not any(hasattr(p, field) for field in FIELDS)
