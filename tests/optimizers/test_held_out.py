"""How much of a step the next batch confirms."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_curv import KFACOptimizer, curvature
from lightning_curv.optimizers.step_size.held_out import (
    BEYOND,
    FIRST,
    OWN,
    confirmed_share,
    judge_last,
)


def remembered(confirmed, steps=40, share=1.0, length=2.0):
    """The memory after steps of which the next batches confirm a share, each taken at another share."""
    memory = {}
    curvature_of_unit = 3.0
    for _ in range(steps):
        memory["length_of_model"] = length
        taken = share * length
        along = curvature_of_unit * taken**2
        # The slope falls linearly to zero at the length that the next batch confirms.
        at_start = -curvature_of_unit * taken * confirmed * length
        judge_last(memory, taken, at_start + along, along)
    return memory


@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("confirmed", [0.0, 0.2, 0.5])
def test_the_share_is_that_of_the_held_out_minimum_however_much_was_taken(confirmed, share):
    found = confirmed_share(remembered(confirmed, share=share))
    assert found == pytest.approx(min(1.0, BEYOND * (OWN + (1 - OWN) * confirmed)))


def test_no_step_is_longer_than_its_model_says():
    assert confirmed_share(remembered(4.0)) == 1.0


def test_the_first_steps_are_whole():
    assert confirmed_share({}) == 1.0
    assert confirmed_share(remembered(0.0, steps=FIRST - 1)) == 1.0
    assert confirmed_share(remembered(0.0, steps=FIRST)) < 1.0


def test_a_step_is_judged_once_and_not_by_what_is_undefined():
    memory = remembered(0.5, steps=1)
    kept = dict(memory)
    judge_last(memory, 2.0, 1.0, 1.0)  # no step was made since
    assert memory == kept
    for slope, along in ((math.nan, 1.0), (1.0, math.nan), (1.0, 0.0), (1.0, math.inf)):
        tried = memory | {"length_of_model": 2.0}
        judge_last(tried, 2.0, slope, along)
        assert tried == kept


def shares(noise, safeguards=True, steps=160):
    """What was taken of each step of a linear model whose targets are noisy."""
    torch.manual_seed(0)
    x = torch.randn(4000, 20)
    y = x[:, :1] + noise * torch.randn(4000, 1)
    layer = nn.Linear(20, 1)
    optimizer = KFACOptimizer(layer.parameters(), safeguards=safeguards)
    found = []
    for step in range(steps):
        batch = slice(25 * step, 25 * step + 25)
        optimizer.zero_grad()
        with curvature(*optimizer.required_extensions()):
            F.mse_loss(layer(x[batch]), y[batch]).backward()
        optimizer.step()
        found.append(optimizer.step_rule.memory.get("share", 1.0))
    return found


def test_noise_shortens_steps_and_its_absence_does_not():
    assert shares(noise=3.0)[-1] < 0.5
    assert shares(noise=0.0)[-1] == 1.0
    assert shares(noise=3.0, safeguards=False)[-1] == 1.0
