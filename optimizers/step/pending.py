"""A step whose numbers are still on the device, and what was known before it, to go back to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_curv.distributed.failures import processes
from lightning_curv.optimizers.curvature.base import State
from lightning_curv.optimizers.linear_algebra.readings import Readings
from lightning_curv.optimizers.step.memory import remembered
from lightning_curv.optimizers.step_size.rules import Step

WATCHED = 20  # steps after one with a surprise, in which everything is read at once


@dataclass(frozen=True)
class Known:
    """What a step changes besides the parameters and the schedule.

    Args:
        state: Of the parameters.
        numbers: Attributes of the optimizer by their names.
    """

    state: dict[Tensor, State]
    numbers: dict[str, Any]

    @classmethod
    def to(cls, optimizer: Optimizer, names: Iterable[str]) -> Known:
        """What an optimizer knows now.

        Args:
            optimizer: Whose state is remembered.
            names: Of its attributes that a step changes.
        """
        state = {param: remembered(state) for param, state in optimizer.state.items()}
        return cls(state, {name: remembered(getattr(optimizer, name)) for name in names})

    def restore(self, optimizer: Optimizer) -> None:
        """Undo what an optimizer has done to its state and attributes since."""
        optimizer.state.clear()
        optimizer.state.update(self.state)
        for name, value in self.numbers.items():
            setattr(optimizer, name, value)


@dataclass(frozen=True)
class Pending:
    """A step that the device makes, of which the host does not know yet how it went.

    Args:
        readings: Were sent.
        before: What was known before the step.
        finish: Remembers the step.
    """

    readings: Readings
    before: Known
    finish: Callable[[], Step]


class Watch:
    """Tells whether the host reads everything in a step where it is needed.

    It waits for no device then that is its own, and for processes it waits anyway. So it is for
    some steps after one in which something was wrong.
    """

    def __init__(self) -> None:
        self.steps = 0

    def begin(self) -> None:
        """Read everything at once in the next steps."""
        self.steps = WATCHED

    def next(self, params: Sequence[Tensor]) -> bool:
        """Whether everything is read at once in the next step, which moves some parameters."""
        is_watched = self.steps > 0
        self.steps = max(self.steps - 1, 0)
        return is_watched or processes() > 1 or any(p.device.type == "cpu" for p in params)
