"""The self-check: per-sample gradients must add up to the gradient."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_curv.errors import describe
from lightning_curv.extensions.base import Extension
from lightning_curv.jacobian import Jacobian


class SumCheck(Extension):
    """Compares the sum of the per-sample gradients with what the backward pass adds to ``.grad``."""

    savefield = "gradient_sum"
    independent = False

    def __init__(self) -> None:
        self._arrived: dict[Tensor, Tensor] = {}

    def evaluate(self, jacobian: Jacobian) -> Tensor:
        """The single column of J, summed over the samples."""
        return jacobian.total()[0]

    def listen(self, parameters: Iterable[Tensor]) -> list[Any]:
        """Remember the gradients of the coming backward pass; returns the handles of the hooks."""
        return [torch.autograd.graph.get_gradient_edge(p).node.register_prehook(self._keep(p)) for p in parameters]

    def _keep(self, parameter: Tensor) -> Any:
        def keep(gradients: tuple[Tensor, ...]) -> None:
            self._arrived[parameter] = gradients[0].to_dense()

        return keep

    def compare(self, parameter: Tensor, total: Tensor) -> None:
        """Raise if ``total`` is not the parameter's gradient, up to rounding."""
        whole = self._arrived[parameter]
        tolerance = 1e3 * torch.finfo(whole.dtype).eps
        whole = whole.to(total.dtype)
        if not torch.allclose(total, whole, rtol=tolerance, atol=tolerance * float(whole.abs().max())):
            raise RuntimeError(
                f"The per-sample gradients of parameter {describe(parameter)} add up to a tensor of norm "
                f"{total.norm():.6g}, "
                f"but its gradient has norm {whole.norm():.6g} (difference {(total - whole).norm():.3g}): the "
                "parameter is "
                "used in a way that was not recorded, or the rule of one of its ops is wrong."
            )
