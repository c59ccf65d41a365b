"""A private step from the moment at which its batch is drawn: what may not change from there on."""

from __future__ import annotations

from lightning_curv.callbacks.import_names import MisconfigurationException
from lightning_curv.callbacks.private_training.refusals import settings_of
from lightning_curv.optimizers.privacy.optimizer import DPOptimizer


class DrawnStep:
    """One step, whose batch may be read from here on: what changes later may follow the data.

    Args:
        optimizer: is to make the step.
        number: of the step over all fits.
        costs: whether the step has a price; of an epoch as one release the first step has.

    Attributes:
        parts: how many parts of its batch have been handed out.
        passes: how many of them have been through a backward pass.
    """

    def __init__(self, optimizer: DPOptimizer, number: int, costs: bool) -> None:
        self.number, self.costs = number, costs
        self.forget_parts()
        self._steps_before = optimizer.steps
        self._settings = settings_of(optimizer)

    def forget_parts(self) -> None:
        """Begin anew: no part was handed out."""
        self.parts = self.passes = 0

    def refuse_lost_parts(self) -> None:
        """Raise if a part of the batch had no backward pass."""
        if self.passes != self.parts:
            raise MisconfigurationException(
                f"Expected a loss from each of {self.parts} calls of `training_step`, found "
                f"{self.passes}: leaving out a batch depends on the data and is not private. "
                "Return a loss, for example of zero weight."
            )

    def refuse_changes(self, optimizer: DPOptimizer) -> None:
        """Raise if the step is not what it was when its batch was drawn.

        Args:
            optimizer: makes the step.

        Raises:
            MisconfigurationException: Its settings or the sum have been changed since.
        """
        now = settings_of(optimizer)
        changed = [name for name, value in self._settings.items() if now[name] != value]
        if changed:
            name = changed[0]
            raise MisconfigurationException(
                "PrivacyCallback expects the settings of a private step before its batch is read, "
                f"found `{name}` changed from {self._settings[name]} to {now[name]} since: what "
                "depends on the batch is not private. Change it between steps, or pass a schedule, "
                "a function of the step's number."
            )
        summed = optimizer.statistics.passes
        if summed != self.parts:
            raise MisconfigurationException(
                f"PrivacyCallback expects the sum of {self.parts} backward passes, found one of "
                f"{summed}: leaving out a part of a batch may depend on the data and is not "
                "private. Leave `zero_grad` to the Trainer."
            )

    def refuse_other_than_one(self, optimizer: DPOptimizer) -> None:
        """Raise if the optimizer has not made exactly one step since the batch was drawn."""
        steps = optimizer.steps - self._steps_before
        if steps != 1:
            raise MisconfigurationException(
                f"PrivacyCallback expects one optimizer step for every drawn batch, found {steps}: "
                "leaving out a step may depend on the data and is not private, and a second one "
                "has no batch. Let `optimizer_step` step always, for example with a learning rate "
                "of zero."
            )
