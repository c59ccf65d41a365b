r"""What a number of right guesses says about ε: the bound of an audit with one training run.

An auditor throws m fair coins, one per canary, trains with the canaries that the coins chose, and
then guesses r of the coins; the other canaries he abstains from. If training is (ε,
δ)-differentially private with respect to every canary, the number W of right guesses is hardly
larger than that of randomized response:

$$P[W \ge v] \le P[B \ge v] + 2 m \delta \max_{1 \le i \le v} \frac1i P[v > B \ge v - i],
   \qquad B \sim \text{Binomial}\Big(r, \frac{e^\varepsilon}{1 + e^\varepsilon}\Big).$$

Steinke, Nasr & Jagielski, *Privacy Auditing with One (1) Training Run*, NeurIPS 2023, theorem 5.2
and appendix D. The guesses may be made in any way from everything that was released; r must not
depend on the coins.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

_STEP = 0.05  # of the search for ε, before it is refined
_LARGEST = 40.0


def tail_bound(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """The largest probability of that many right guesses, or more, in an (ε, δ)-private run.

    Args:
        canaries: m, all canaries.
        guesses: r ≤ m, without abstentions.
        correct: v ≤ r.
        epsilon: ε ≥ 0.
        delta: δ in [0, 1].

    Returns:
        A probability.

    Cost: O(v).

    Example:
        >>> chance = tail_bound(canaries=100, guesses=10, correct=10, epsilon=0.0, delta=0.0)
        >>> round(chance * 2**10, 6)
        1.0
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(
            f"Expected 0 <= correct <= guesses <= canaries, found correct={correct}, "
            f"guesses={guesses}, canaries={canaries}."
        )
    if not (epsilon >= 0 and 0 <= delta <= 1):
        raise ValueError(
            f"Expected epsilon >= 0 and delta in [0, 1], found epsilon={epsilon}, delta={delta}."
        )
    if correct == 0:
        return 1.0
    binomial = _binomial()
    accuracy = 1 / (1 + math.exp(-epsilon))
    tail = float(binomial.sf(correct - 1, guesses, accuracy))
    # P[v > B >= v - i] for i = 1 ... v
    below = binomial.pmf(np.arange(correct - 1, -1, -1), guesses, accuracy).cumsum()
    gained = float((below / np.arange(1, correct + 1)).max())
    return min(1.0, tail + 2 * canaries * delta * gained)


@lru_cache(maxsize=1000)
def epsilon_lower_bound(
    canaries: int, guesses: int, correct: int, delta: float, confidence: float = 0.95
) -> float:
    """The ε that a run exceeds, with this confidence, if that many guesses were right.

    Args:
        canaries: m, all canaries.
        guesses: r ≤ m, fixed before the coins are looked at.
        correct: v ≤ r.
        delta: δ.
        confidence: The run of an (ε, δ)-private algorithm gives a number above ε with a probability
            of at most 1 - confidence.

    Returns:
        The supremum of the ε below which all are rejected; 0 if none is.

    Example:
        >>> round(epsilon_lower_bound(canaries=1000, guesses=1000, correct=1000, delta=1e-5), 2)
        5.78
    """
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must lie in (0, 1), found {confidence}.")

    def rejected(epsilon: float) -> bool:
        return tail_bound(canaries, guesses, correct, epsilon, delta) <= 1 - confidence

    if not rejected(0.0):
        return 0.0
    # Upwards in small steps: the bound need not be monotone in ε, and all smaller ε must be
    # rejected too.
    low = 0.0
    while low < _LARGEST and rejected(low + _STEP):
        low += _STEP
    high = low + _STEP
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if rejected(middle) else (low, middle)
    return low


def _binomial() -> Any:
    try:
        from scipy.stats import binom
    except ImportError as error:
        raise ImportError(
            "The bound of an audit needs `scipy`, which is not installed: "
            "`pip install lightning-curv[privacy]`."
        ) from error
    return binom
