"""The backward passes that add up to the gradient of a step.

How many, and what those that are logged have left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.nn import Parameter

from lightning_curv.callbacks.monitoring.norm_layers import NORM_LAYERS
from lightning_curv.callbacks.monitoring.observation import Fields, Observation
from lightning_curv.callbacks.monitoring.scaled_loss import ScaledLoss
from lightning_curv.callbacks.monitoring.window import BackwardPass, Window

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


class Accumulation:
    """The backward passes since the gradients were last set to zero.

    Attributes:
        passes: their number, logged or not.
        window: what the logged ones have left.
    """

    def __init__(self) -> None:
        self.passes = 0
        self.window = Window()
        self._partial: set[Parameter] = set()

    def set_to_zero(self) -> None:
        """The gradients were."""
        self.forget()
        self.passes = 0

    def forget(self) -> None:
        """Drop what logged passes have left."""
        self.window = Window()

    def end_batch(self) -> None:
        """Forget what concerns one batch."""
        self._partial = set()

    def add(self, backward: BackwardPass) -> None:
        """Take what a logged pass has left.

        Not of parameters with gradients of passes that were not logged.
        """
        self.window.add(backward.without(self._partial))

    def divisor(self, trainer: Trainer, automatic: bool) -> tuple[int, float]:
        """How many passes share the mean of a step, and the divisor of the accumulated gradient.

        Lightning divides by the full number of passes, but the last window of an epoch may hold
        fewer.

        Args:
            trainer: of the run.
            automatic: whether Lightning steps.
        """
        # In manual optimization Lightning divides nothing: a mean over passes is the user's own.
        passes = max(self.passes, 1) if automatic else 1
        return passes, passes / trainer.accumulate_grad_batches

    def follow_zero_grad(self, pl_module: LightningModule) -> None:
        """In manual optimization nothing announces `zero_grad`: the gradients themselves tell."""
        params = [p for p in pl_module.parameters() if p.requires_grad]
        # One wait for the device per parameter, on logged steps only.
        zero = {p for p in params if p.grad is None or not p.grad.any()}
        self.window.forget(zero)
        # Their gradient holds passes whose samples nobody has seen.
        self._partial = {p for p in params if p not in zero and p not in self.window}
        if self._partial:
            rank_zero_warn(
                "CurvatureCallback leaves out parameters whose gradient was accumulated over "
                "batches that it did not log. Log every step, `every_n_steps=1`, when you "
                "accumulate gradients in manual optimization."
            )


def backward_pass(results: Fields, observation: Observation, loss: ScaledLoss) -> BackwardPass:
    """What a logged pass has left.

    Args:
        results: by savefield and parameter.
        observation: which has computed them.
        loss: where the pass began.
    """
    counts = dict(observation.counts)
    # Norms of normalization layers alone; where all layers have theirs, these are among them.
    if NORM_LAYERS in results:
        results["batch_l2"] = results.pop(NORM_LAYERS)
        if NORM_LAYERS in counts:
            counts["batch_l2"] = counts.pop(NORM_LAYERS)
    return BackwardPass(
        results, loss.factor, loss.value, observation.count, counts, observation.size
    )
