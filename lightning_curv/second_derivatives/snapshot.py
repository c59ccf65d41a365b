"""Parameter values as they were at a backward pass, for products after the optimizer's step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Snapshot:
    """Copies of parameters. Memory: one more copy of them.

    Autograd saves parameters by reference and refuses to use a graph whose parameters were modified
    in place.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._saved = [(p, p.detach().clone(), p._version) for p in parameters]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """In this context the parameters have the saved values and versions."""
        changed = [
            (p, value, version) for p, value, version in self._saved if p._version != version
        ]
        now = [(p, p.detach().clone(), p._version) for p, _, _ in changed]
        for item in changed:
            _write(*item)
        try:
            yield
        finally:
            for item in now:
                _write(*item)


def _write(parameter: Tensor, value: Tensor, version: int) -> None:
    """Set value and version in the parameter's own memory: autograd may have saved views of it."""
    parameter.data.copy_(value)
    set_version: Any = torch._C._autograd._unsafe_set_version_counter
    try:
        set_version((parameter,), (version,))
    except TypeError:  # torch < 2.7
        set_version(parameter, version)
