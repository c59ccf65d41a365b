"""The defaults diverge on none of the problems on which steps of curvature usually do."""

import math

import pytest
from hostile_problems import PROBLEMS, train

from lightning_curv import DiagGGNOptimizer, KFACOptimizer

# Statistics of a batch need the columns of `KFACOptimizer`; learning rates are those of it.
NOT_DIAGONAL = {"batch_norm", "tabular_fixed"}


def highest(first, peak):
    """The highest loss that is no divergence; first ones may be negative."""
    return first + (peak - 1) * abs(first)


@pytest.mark.filterwarnings("ignore:The optimizer takes the empirical")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", PROBLEMS)
def test_kfac_neither_diverges_nor_stands_still(name, seed):
    problem = PROBLEMS[name]
    losses = list(train(problem, KFACOptimizer, seed))
    assert all(map(math.isfinite, losses))
    assert max(losses) <= highest(losses[0], problem.peak)
    assert losses[-1] < problem.end


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", [name for name in PROBLEMS if name not in NOT_DIAGONAL])
def test_diagonal_curvature_does_not_diverge(name, seed):
    problem = PROBLEMS[name]
    losses = list(train(problem, DiagGGNOptimizer, seed, steps=20))
    assert all(map(math.isfinite, losses))
    assert max(losses) <= highest(losses[0], problem.diagonal_peak)
