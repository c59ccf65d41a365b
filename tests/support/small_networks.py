"""Two linear layers below a loss of any shape."""

import torch
from torch import nn
from zoo import Problem

N = 4


def small_problem(loss) -> Problem:
    """`N` samples, a sigmoidal network in float64, and a row of `losses_table`."""
    torch.manual_seed(len(loss.name))
    shape = torch.Size((3, *loss.extra))
    model = nn.Sequential(
        nn.Linear(5, 2), nn.Tanh(), nn.Linear(2, shape.numel()), nn.Unflatten(1, shape)
    ).double()
    X = torch.randn(N, 5, dtype=torch.float64)
    return Problem(model, X, loss.target((N, *shape)), loss)
