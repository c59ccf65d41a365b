"""Which curvature fields of the parameters are new since they were last read."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_curv.terms.jacobian import Jacobian


class Inbox:
    """Tells a curvature field written by the last backward from one that was already used.

    A backward replaces the tensors of a field, so identity decides. Only weak references are kept:
    a strong one would hold last step's curvature in memory beside this step's, and a bare `id` may
    be given to a new tensor.

    Args:
        savefield: attribute of the parameters, a tensor, a sequence of tensors or a Jacobian.
    """

    def __init__(self, savefield: str) -> None:
        self.savefield = savefield
        self._read: dict[Tensor, weakref.ref[Any]] = {}

    def unread(self, param: Tensor) -> Any:
        """The field, or None if it is absent, empty or read before."""
        field = getattr(param, self.savefield, None)
        mark = _mark(field)
        reference = self._read.get(param)
        was_read = reference is not None and reference() is mark
        return None if mark is None or was_read else field

    def mark_read(self, param: Tensor) -> None:
        """Take the field as read; a Jacobian, which holds the activations of a pass, is dropped."""
        field = getattr(param, self.savefield)
        if isinstance(field, Jacobian):
            delattr(param, self.savefield)
        else:
            self._read[param] = weakref.ref(_mark(field))

    def take(self, params: Sequence[Tensor]) -> dict[Tensor, Any]:
        """The new fields of parameters, each only once."""
        fields = {param: field for param in params if (field := self.unread(param)) is not None}
        for param in fields:
            self.mark_read(param)
        return fields


def missing(optimizer: Any, savefield: str, step: int) -> str:
    """What is told to whom an optimizer asks for curvature in vain.

    Args:
        optimizer: which asks.
        savefield: of what it asks for.
        step: number of the step.
    """
    return (
        f"{type(optimizer).__name__} needs new curvature for step {step}, found no parameter "
        f"whose `.{savefield}` was written since the last step. In Lightning add "
        "`CurvatureCallback()` to the Trainer's callbacks (its tuners run without callbacks: "
        "tune with another optimizer); elsewhere write `with curvature(*optimizer.extensions): "
        "loss.backward()` before `optimizer.step()`."
    )


def _mark(field: Any) -> Any:
    """What tells a field from another: itself, or the first tensor of a sequence."""
    if not isinstance(field, Sequence):
        return field
    return field[0] if field else None


def as_tensors(field: Tensor | Sequence[Tensor] | None) -> list[Tensor]:
    """The tensors of a field; none if it is absent."""
    if field is None:
        return []
    return [field] if isinstance(field, Tensor) else list(field)
