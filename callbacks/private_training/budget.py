"""How many releases a budget still allows.

The accountant, which is slow, is asked only when the answer may have changed.
"""

from __future__ import annotations

import math
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_curv.callbacks.import_names import MisconfigurationException
from lightning_curv.callbacks.private_training.summary import guarantee
from lightning_curv.optimizers.privacy.accounting import (
    PrivacyAccountant,
    Sampling,
    calibrated_noise,
)


class Budget:
    """A budget ε of an account.

    Args:
        epsilon: ε; `None`: no budget.
        delta: δ.
        accountant: The account. Its `sampling` is that of the next release.
    """

    def __init__(self, epsilon: float | None, delta: float, accountant: PrivacyAccountant) -> None:
        self.epsilon, self.delta, self.accountant = epsilon, delta, accountant
        self._left = 0
        self._asked = 0  # releases of this kind that were asked for at once
        self._valid_for: tuple[Any, ...] | None = None

    def noise(self, sampling: Sampling, releases: float) -> float:
        """The noise multiplier σ that spends the budget in a whole run.

        Args:
            sampling: How the batch of every release is drawn.
            releases: How many releases the run will make.

        Raises:
            MisconfigurationException: There is no budget, or the run has no end.
        """
        if self.epsilon is None:
            raise MisconfigurationException(
                "The noise is unknown: pass `noise_multiplier=` to the optimizer, or `epsilon=` to "
                "PrivacyCallback."
            )
        if math.isinf(releases):
            raise MisconfigurationException(
                "The noise for a budget depends on the number of steps, found neither "
                "`max_epochs` nor `max_steps` in the Trainer; set one, or pass "
                "`noise_multiplier=` to the optimizer."
            )
        noise = calibrated_noise(
            self.epsilon, self.delta, sampling, int(releases), self.accountant.method
        )
        promised = guarantee(self.epsilon, self.delta, sampling)
        rank_zero_info(f"PrivacyCallback: noise multiplier {noise:.4g} for {promised}.")
        return noise

    def allows(self, noise_multiplier: float, planned: float) -> bool:
        """Whether one more release, as it would be drawn now, keeps ε at or below the budget.

        Args:
            noise_multiplier: σ of the release.
            planned: Releases until the run ends by itself, as far as is known now: so many are
                asked for at first.

        Cost: where neither rate nor noise change, about twelve compositions per run; where they
            change at every step, one per step, tens of milliseconds.
        """
        if self.epsilon is None:
            return True
        now = self.accountant.sampling, noise_multiplier
        if (
            now != self._valid_for
        ):  # noise that changes at every step would be asked for the whole run every time
            self._asked = 0 if self._valid_for is None else 1
            self._left, self._valid_for = 0, now
        if self._left <= 0:
            # Doubled: few questions where σ or the rate change rarely, small ones where they change
            # often.
            count = min(2 * self._asked, planned) if self._asked else planned
            self._left = self.accountant.releases_left(
                self.epsilon, self.delta, noise_multiplier, max(count, 1)
            )
            self._asked = max(self._left, 1)
        return self._left > 0

    def checked(self, noise_multiplier: float) -> bool:
        """Whether `allows` was asked for a release with this noise."""
        return self.epsilon is None or self._valid_for == (
            self.accountant.sampling,
            noise_multiplier,
        )

    def spend(self) -> None:
        """A release was made."""
        self._left -= 1
