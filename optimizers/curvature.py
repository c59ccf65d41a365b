"""What an optimizer needs from a model of the curvature."""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from lightning_curv.extensions import Extension

State = dict[str, Any]
ParamGroup = dict[str, Any]


@dataclass(frozen=True)
class Direction:
    r"""A preconditioned gradient of one parameter.

    Args:
        value: $d = C^{-1} g$, shape of the parameter; the update is a negative multiple of it.
        squared_norm: squared length of $d$ in the metric of the curvature, [].
        base_lr: learning rate of its group before any schedule.
    """

    value: Tensor
    squared_norm: Tensor
    base_lr: float


class Curvature(Protocol):
    """A positive semi-definite block per parameter: measured, averaged, damped, inverted.

    The object holds settings only. Everything measured lives in the `state` of a parameter (tensors and plain types).
    """

    extension: Extension

    def absorb(self, state: State, param: Tensor, field: list[Tensor], group: ParamGroup) -> None:
        """Average a new measurement into the state.

        Raises:
            ValueError: the measurement does not fit the parameter.
        """
        ...

    def refresh(self, state: State, group: ParamGroup) -> bool:
        """Recompute what depends on the damping; False if that failed and the former result stays in use."""
        ...

    def ready(self, state: State) -> bool:
        """Whether gradients of this parameter can be preconditioned."""
        ...

    def direction(self, state: State, grad: Tensor, group: ParamGroup) -> Direction:
        """Precondition a gradient."""
        ...
