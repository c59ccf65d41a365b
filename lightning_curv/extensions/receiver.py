"""Extensions that take the per-sample gradients of a backward pass in place of the gradient."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor

from lightning_curv.extensions.base import GraphExtension
from lightning_curv.passes.passes import Passes
from lightning_curv.terms.jacobian import Jacobian


class GradientReceiver(GraphExtension):
    """Receives the per-sample Jacobians of the user's backward pass in place of the gradient.

    The pass then ends at the recorded ops: the gradient of a parameter that is received is not
    computed, and nothing is left on the parameter, so that nothing can be stale. The norm of a
    sample's whole gradient is known only after the last parameter: until then the cotangents of all
    layers are held, about as much memory as the activations.

    Attributes:
        mean: Whether the loss is the mean over the samples of a pass, instead of their sum.
        loss_scale: Factor on the loss besides. What is received are gradients of the samples' own
            losses, without both.
    """

    savefield = "per_sample_jacobians"
    needs_likelihood = False
    mean = False
    loss_scale = 1.0

    @abstractmethod
    def receives(self, parameter: Tensor) -> bool:
        """Say whether the parameter's gradient is replaced."""

    @abstractmethod
    def begin(self, samples: int) -> None:
        """Prepare for a backward pass over this many samples.

        An earlier pass that has not ended has failed.
        """

    @abstractmethod
    def receive(self, jacobian: Jacobian) -> None:
        """Take one parameter's Jacobian: its only column is the gradient of the samples' losses."""

    @abstractmethod
    def end(self) -> None:
        """Conclude the pass: every parameter without a Jacobian has a gradient of zero."""

    def compute(self, passes: Passes) -> dict[Tensor, Any]:
        """Compute nothing: all is received during the pass."""
        return {}
