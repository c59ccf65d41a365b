"""What was computed last of a tensor, for the next parameter that needs the same of it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor


class LastResult(threading.local):
    """One result, kept while the tensor that it was computed from is in memory.

    The parameters of an op come one after the other and share their cotangents (a weight and its
    bias, both weights of a recurrence), or their inputs (queries, keys and values).
    """

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._source: weakref.ref[Tensor] | None = None
        self._result: Tensor | None = None
        self._version = 0

    def get_or_compute(
        self,
        tensor: Tensor,
        key: tuple[Any, ...],
        make: Callable[[], Tensor],
    ) -> tuple[Tensor, bool]:
        """The result of `make`, or the latest one, and whether it is that.

        Args:
            tensor: What the result is computed from. Views of the same entries count as the same
                tensor.
            key: How it is computed.
            make: Computes it.
        """
        base = tensor if tensor._base is None else tensor._base
        key = (
            *key,
            base._version,
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
        )
        if self._source is not None and self._source() is base and self._key == key:
            result = self._result
            # Nobody must have changed the result in place since.
            if result is not None and result._version == self._version:
                return result, True
        self._result = result = make()
        self._source = weakref.ref(base, self._forget)
        self._key = key
        self._version = result._version
        return result, False

    def _forget(self, source: weakref.ref[Tensor]) -> None:
        """Callback of the reference: a result must not live longer than what it was made of."""
        if source is self._source:
            self._source = self._result = None
