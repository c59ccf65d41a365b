"""The result of an audit: ε that was shown beside ε that was claimed, as text and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_curv.optimizers.privacy.audit_bound import epsilon_lower_bound, tail_bound

# Of the canaries, these shares are guessed: fixed beforehand, whatever the run gives.
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)


@dataclass(frozen=True)
class Trial:
    """One number of guesses.

    Attributes:
        guesses: r, the canaries whose scores are farthest from the median.
        correct: How many of them were guessed right.
        epsilon_lower: What that shows, at a confidence that leaves the whole audit the one it
            promises.
    """

    guesses: int
    correct: int
    epsilon_lower: float


@dataclass(frozen=True)
class PrivacyAudit:
    """What an audit of one training run found.

    Attributes:
        epsilon_lower: The run is not (ε, δ)-private for any ε below it, with the confidence below.
        epsilon: ε that the accountant claims.
        delta: δ of both.
        confidence: Of an (ε, δ)-private algorithm, at most a share of 1 - confidence of the audits
            end with `epsilon_lower` above ε. All trials together share it (Bonferroni).
        canaries: m.
        included: How many of them the coins put into the training data.
        trials: One for each number of guesses that was fixed beforehand.
        largest: The most that an audit of this size can show: `epsilon_lower` if every guess is
            right. A claim above it cannot be refuted; take more canaries.
        scores: One per canary; larger means more likely to have been included, `[m]`.
        members: Whether it was, `[m]`.

    Example:
        >>> scores, members = [3.0, -2.0] * 100, [True, False] * 100
        >>> audit = PrivacyAudit.of(scores, members, epsilon=6.0, delta=1e-5)
        >>> print(str(audit).splitlines()[0])
        ε_lower = 3.75 <= ε = 6.00 at δ = 1e-05: nothing speaks against the claim (95% confidence)
    """

    epsilon_lower: float
    epsilon: float
    delta: float
    confidence: float
    canaries: int
    included: int
    trials: tuple[Trial, ...]
    largest: float
    scores: np.ndarray
    members: np.ndarray

    @classmethod
    def of(
        cls,
        scores: Sequence[float] | np.ndarray,
        members: Sequence[bool] | np.ndarray,
        epsilon: float,
        delta: float,
        confidence: float = 0.95,
        guesses: Sequence[int] | None = None,
    ) -> PrivacyAudit:
        """Guess the coins from scores, and compare.

        A canary is guessed to be included if its score is above the median, and not to be if it is
        below. Of r guesses those are made whose scores are farthest from the median; all other
        canaries are abstained from.

        Args:
            scores: One per canary; larger means more likely to be included. They must be made of
                what was released, and not of the coins.
            members: The coins, fair and independent.
            epsilon: What the accountant claims.
            delta: δ.
            confidence: Of all trials together.
            guesses: Numbers of guesses, each a trial, fixed before the run. Default: `SHARES` of
                the canaries.

        Returns:
            The result.

        Raises:
            ValueError: Lengths differ, or a number of guesses is out of range.

        Example:
            >>> scores, members = [3.0, -2.0] * 100, [True, False] * 100
            >>> audit = PrivacyAudit.of(scores, members, epsilon=1.0, delta=1e-5)
            >>> audit.refuted, round(audit.epsilon_lower, 2)
            (True, 3.75)
        """
        scores, members = np.asarray(scores, float), np.asarray(members, bool)
        m = len(scores)
        if scores.shape != members.shape or scores.ndim != 1 or not m:
            raise ValueError(
                f"Expected one score and one coin per canary, found shapes {scores.shape} and "
                f"{members.shape}."
            )
        if guesses is None:
            counts = sorted({max(1, round(share * m)) for share in SHARES})
        else:
            counts = list(guesses)
        if not counts or not all(1 <= count <= m for count in counts):
            raise ValueError(
                f"`guesses` must be numbers between 1 and {m}, the canaries, found {counts}."
            )
        # Bonferroni: the trials share the probability of a false alarm.
        confidence_of_trial = 1 - (1 - confidence) / len(counts)
        is_right = _right(scores, members)
        trials = []
        for count in counts:
            correct = int(is_right[:count].sum())
            shown = epsilon_lower_bound(m, count, correct, delta, confidence_of_trial)
            trials.append(Trial(count, correct, shown))
        return cls(
            epsilon_lower=max(trial.epsilon_lower for trial in trials),
            epsilon=epsilon,
            delta=delta,
            confidence=confidence,
            canaries=m,
            included=int(members.sum()),
            trials=tuple(trials),
            largest=max(
                epsilon_lower_bound(m, count, count, delta, confidence_of_trial) for count in counts
            ),
            scores=scores,
            members=members,
        )

    @property
    def refuted(self) -> bool:
        """Whether the run is shown not to be (ε, δ)-private."""
        return self.epsilon_lower > self.epsilon

    @property
    def best(self) -> Trial:
        """The trial that shows most."""
        return max(self.trials, key=lambda trial: trial.epsilon_lower)

    def __str__(self) -> str:
        sign, verdict = "<=", "nothing speaks against the claim"
        if self.refuted:
            sign, verdict = ">", "the claim is REFUTED"
        best = self.best
        lines = [
            f"ε_lower = {self.epsilon_lower:.2f} {sign} ε = {self.epsilon:.2f} "
            f"at δ = {self.delta:g}: {verdict} ({100 * self.confidence:g}% confidence)",
            f"{self.canaries} canaries, {self.included} of them in the training data; "
            f"{best.correct} of {best.guesses} guesses right; "
            f"an audit of this size can show at most {self.largest:.2f}",
        ]
        if self.epsilon >= self.largest:
            lines.append("the claim is above that: this audit cannot refute it, take more canaries")
        return "\n".join(lines)

    def plot(self, axes: Sequence[Any] | None = None) -> Any:
        """Draw the scores of both kinds of canaries, and guesses beside what a private run allows.

        Args:
            axes: Two matplotlib axes. Default: those of a new figure.

        Returns:
            The figure.

        Raises:
            ImportError: Matplotlib is not installed.
        """
        figure, (left, right) = _figure(axes)
        self._draw_scores(left)
        self._draw_guesses(right)
        return figure

    def _draw_scores(self, axis: Any) -> None:
        low, high = np.quantile(self.scores, [0.002, 0.998])
        bins = np.linspace(low, high if high > low else low + 1, 41)
        for member, label in ((True, "in the training data"), (False, "left out")):
            scores = self.scores[self.members == member].clip(low, high)
            axis.hist(scores, bins, alpha=0.6, label=label)
        axis.set(
            xlabel="score of a canary", ylabel="canaries", title="What the released steps tell"
        )
        axis.legend(frameon=False)

    def _draw_guesses(self, axis: Any) -> None:
        counts = np.unique(np.geomspace(self.trials[0].guesses, self.canaries, 60).astype(int))
        share_right = _right(self.scores, self.members).cumsum()[counts - 1] / counts
        axis.plot(counts, 100 * share_right, color="C0", label="right guesses")
        error = (1 - self.confidence) / len(self.trials)
        for epsilon, style in ((self.epsilon, "C3-"), (self.epsilon_lower, "k:")):
            if np.isfinite(epsilon):
                limits = np.array(
                    [
                        _most(self.canaries, int(count), epsilon, self.delta, error) / count
                        for count in counts
                    ]
                )
                axis.plot(counts, 100 * limits, style, label=f"limit for ε = {epsilon:.2f}")
        for trial in self.trials:
            axis.plot(trial.guesses, 100 * trial.correct / trial.guesses, "C0o")
        axis.set_xscale("log")
        guesses = [trial.guesses for trial in self.trials]
        axis.set_xticks(guesses, [str(count) for count in guesses])
        axis.minorticks_off()
        axis.set(xlabel="guesses, the surest first", ylabel="right [%]", ylim=(45, 102))
        axis.set_title(f"ε shown {self.epsilon_lower:.2f}, ε claimed {self.epsilon:.2f}")
        axis.legend(frameon=False, loc="lower left")


def _right(scores: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Which guesses are right, the surest first."""
    numbers = np.nan_to_num(scores)
    distance = numbers - np.median(numbers)
    surest_first = np.argsort(-np.abs(distance), kind="stable")
    is_right = (distance > 0) == members
    return is_right[surest_first]


def _most(canaries: int, guesses: int, epsilon: float, delta: float, error: float) -> int:
    """The most right guesses that do not refute ε."""
    # `low` does not refute ε; `high` does, or is out of reach.
    low, high = 0, guesses + 1
    while high - low > 1:
        middle = (low + high) // 2
        refutes = tail_bound(canaries, guesses, middle, epsilon, delta) <= error
        low, high = (low, middle) if refutes else (middle, high)
    return low


def _figure(axes: Sequence[Any] | None) -> tuple[Any, Sequence[Any]]:
    if axes is not None:
        return axes[0].figure, axes
    try:
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise ImportError(
            "The picture of an audit needs `matplotlib`, which is not installed: "
            "`pip install matplotlib`. `print(audit)` says the same in words."
        ) from error
    return plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
