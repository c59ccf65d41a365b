r"""What the next batch confirms of a step.

The model that a step minimizes is that of its own batch, whose noise is in the gradient, in the
direction and in the curvature: it promises more than the loss will hold. The next batch knows
nothing of that noise. It meets the last update $u$ at its end, where it finds the slope
$s = g^\top u$ and the curvature $c = u^\top G u$; at the start, the model says, it would have found
$s - c$, and a step of $(c - s) / c$ times the length would have been best. Means of numerator and
denominator over the last half of the run say what share of the steps of the model to take.

Both cost nothing: $u$ is one of the directions that the model of the next step is made of.
"""

from __future__ import annotations

import math
from typing import Any

from lightning_curv.optimizers.step_size.step_length import GROWTH, OVERSHOT, OWN, WindowMean

# Before so many steps were judged the means are noise.
FIRST = 20
# What is confirmed is multiplied by: the decrease is flat near the best length, and shorter steps
# than that cost more than longer ones where the noise is small.
BEYOND = 1.8


def judge_last(memory: dict[str, Any], length: float, slope: float, curvature: float) -> None:
    """Take in what this batch says of the last step; each is judged once.

    Args:
        memory: Of the step rule, updated.
        length: Of the last update, as it was made: shortened, and multiplied by a schedule.
        slope: Of this batch along it, at its end.
        curvature: Along it.
    """
    of_model = memory.pop("length_of_model", 0.0)
    if not (of_model > 0 and length > 0 and 0 < curvature < math.inf and math.isfinite(slope)):
        return
    # Of the step of the model, which may have been longer, so that the means are of one thing. One
    # batch alone must not decide for many.
    share = length / of_model
    best = max(share * (curvature - slope), -OVERSHOT * curvature)
    square = length * length
    # Per squared length, or the longest steps alone would count.
    for name, value in (("confirmed", best / square), ("resisted", curvature / square)):
        mean = WindowMean(memory.get(name, 0.0), memory.get("judged", 0))
        memory[name] = mean.add(value)
    memory["judged"] = memory.get("judged", 0) + 1


def confirmed_share(memory: dict[str, Any]) -> float:
    """The share of the step of the model to take, which the memory of the step rule keeps.

    >>> round(confirmed_share({"judged": 40, "confirmed": 0.5, "resisted": 1.0}), 2)
    0.99
    """
    if memory.get("judged", 0) < FIRST:
        return 1.0
    confirmed = max(memory["confirmed"] / memory["resisted"], 0.0)
    wanted = BEYOND * (OWN + (1 - OWN) * confirmed)
    share: float = min(1.0, wanted, GROWTH * memory.get("share", 1.0))
    memory["share"] = share
    return share
