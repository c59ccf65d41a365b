"""Which curvature fields of the parameters are new since they were last read."""

import weakref
from collections.abc import Sequence

from torch import Tensor


class Inbox:
    """Tells a curvature field written by the last backward from one that was already used.

    A backward replaces the tensors of a field, so identity decides. Only weak references are kept: a strong one would
    hold last step's factors in memory beside this step's, and a bare `id` may be given to a new tensor.

    Args:
        savefield: attribute of the parameters, a tensor or a sequence of tensors.
    """

    def __init__(self, savefield: str) -> None:
        self.savefield = savefield
        self._read: dict[Tensor, weakref.ref[Tensor]] = {}

    def unread(self, param: Tensor) -> list[Tensor] | None:
        """The field's tensors, or None if it is absent, empty or read before."""
        tensors = as_tensors(getattr(param, self.savefield, None))
        read = self._read.get(param)
        if not tensors or (read is not None and read() is tensors[0]):
            return None
        return tensors

    def mark_read(self, param: Tensor) -> None:
        self._read[param] = weakref.ref(as_tensors(getattr(param, self.savefield))[0])


def as_tensors(field: Tensor | Sequence[Tensor] | None) -> list[Tensor]:
    """The tensors of a field; none if it is absent."""
    if field is None:
        return []
    return [field] if isinstance(field, Tensor) else list(field)
