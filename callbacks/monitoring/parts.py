"""Norms of the gradients of whole backward passes.

They are what is known of the noise where no sample has a gradient.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from lightning_curv.differentiation.internal_pass import internal_pass
from lightning_curv.distributed.shards import in_graph, registered

PARTS = "part_l2"  # the savefield


class PartNorms:
    """Listens to one backward pass where gradients reach parameters, before processes average."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._found: dict[Parameter, Tensor] = {}
        self._own_passes = internal_pass()

    def listen(self, params: Iterable[Parameter]) -> None:
        """Begin."""
        self.stop()
        self._own_passes = internal_pass()  # of the thread that begins the backward pass
        for param in params:
            if param.requires_grad:
                # Where the gradient is accumulated: a prehook there gets the sum over all uses of
                # the parameter, and comes before the reducer of DDP, which averages afterwards.
                node = get_gradient_edge(in_graph(param)).node
                known = cast("Parameter", registered(param))
                self._found[known] = torch.zeros((), dtype=torch.float32, device=param.device)
                self._handles.append(node.register_prehook(partial(self._hear, known)))

    def _hear(self, param: Parameter, gradients: tuple[Any, ...]) -> None:
        gradient = gradients[0]
        if gradient is None or self._own_passes.running:
            return
        with torch.no_grad():
            values = gradient.coalesce().values() if gradient.is_sparse else gradient.detach()
            real = values.abs() if values.is_complex() else values
            # In single precision at least: squares of half-precision numbers overflow early.
            norm = torch.linalg.vector_norm(
                real, dtype=torch.promote_types(real.dtype, torch.float32)
            )
            self._found[param] = norm.square()

    def stop(self) -> dict[Parameter, Tensor]:
        """End; the squared norms by parameter, [] each, zero for what the pass did not reach."""
        while self._handles:
            self._handles.pop().remove()
        norms, self._found = self._found, {}
        return norms
