"""The Jacobians of one backward pass, all of them together: what clipping by a joint norm needs."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor
from torch.autograd import Variable

from lightning_curv.extensions.base import GraphExtension
from lightning_curv.jacobian import Jacobian
from lightning_curv.listening import Listener
from lightning_curv.passes import Passes


class Receiver(Protocol):
    """Takes the per-sample Jacobians of whole backward passes."""

    def begin(self, samples: int) -> None:
        """A backward pass over this many samples is about to run; an earlier one that has not ended has failed."""

    def receive(self, jacobian: Jacobian) -> None:
        """The Jacobian of one parameter; its only column is the gradient of the pass."""

    def end(self) -> None:
        """The pass is over: every parameter without a Jacobian has a gradient of zero."""


class PerSampleJacobians(GraphExtension):
    """Hands the Jacobians of the user's own backward pass to a receiver, and tells it where the pass begins and ends.

    The norm of a sample's whole gradient is known only after the last parameter: until then the cotangents of all
    layers are held, about as much memory as the activations. It leaves nothing on the parameters, so that nothing can
    be stale.

    Args:
        receiver: Takes the Jacobians.
    """

    savefield = "per_sample_jacobians"
    needs_likelihood = False

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._listener: Listener | None = None
        self._queued = False

    def compute(self, passes: Passes) -> dict[Tensor, Any]:
        """Listen to the pass that is about to run."""
        if self._listener is not None:
            self._listener.stop()
        self._queued = False
        self._receiver.begin(passes.samples.count)
        self._listener = Listener(passes, self._received)
        return {}

    def _received(self, jacobian: Jacobian) -> None:
        if not self._queued:  # the engine calls back when the pass that is running has ended
            self._queued = True
            Variable._execution_engine.queue_callback(self._ended)
        self._receiver.receive(jacobian)

    def _ended(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.finish()
            self._receiver.end()
