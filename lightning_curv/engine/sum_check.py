"""The self-check: per-sample gradients must add up to the gradient."""

from __future__ import annotations

import torch

from lightning_curv.errors import describe
from lightning_curv.terms.jacobian import Jacobian


class SumCheck:
    """Compares the sum of the per-sample gradients with what the backward pass adds to `.grad`.

    Rounding errors of a gradient that cancels are as large as what arrived from above: they are
    measured by the largest gradient so far. One object serves one backward pass.
    """

    def __init__(self) -> None:
        self._largest = 0.0  # norm of a gradient

    def compare(self, jacobian: Jacobian) -> None:
        """Raise if the sum is not the parameter's gradient, up to the rounding of such a sum."""
        if jacobian.gradient is None:
            return
        total = jacobian.total()[0]
        whole = jacobian.gradient.to_dense()
        sizes = [
            term.g.norm() * (1 if term.x is None or term.classes else term.x.norm())
            for term in jacobian.terms
        ]
        eps = torch.finfo(whole.dtype).eps
        whole = whole.to(total.dtype)
        self._largest = max(self._largest, float(whole.norm()))
        rounding = 1e2 * eps * (float(sum(sizes)) + self._largest)
        if not torch.allclose(total, whole, rtol=1e3 * eps, atol=rounding):
            raise RuntimeError(
                f"The per-sample gradients of parameter {describe(jacobian.parameter)} add up to a "
                f"tensor of norm {total.norm():.6g}, but its gradient has norm {whole.norm():.6g} "
                f"(difference {(total - whole).norm():.3g}): the parameter is used in a way that "
                "was not recorded, or the rule of one of its ops is wrong."
            )
