r"""The diagonal of the Hessian, exact: the GGN's and the network's own second derivatives."""

from __future__ import annotations

from torch import Tensor

from lightning_curv.extensions.base import Extension
from lightning_curv.extensions.columns import Signed
from lightning_curv.extensions.ggn import BatchDiagGGNExact
from lightning_curv.terms.jacobian import Jacobian


class DiagHessian(Extension):
    r"""Diagonal of the Hessian of the loss, in ``diag_h`` of the parameter's shape; residual terms included.

    Exact for any architecture: elementwise nonlinearities contribute one signed column per unit,
    other nonlinear ops (softmax, norms, products) as many as they have inputs, piecewise linear
    ones none. Cost: one backward pass per column; for piecewise linear networks that of
    `DiagGGNExact`. Dangel, Kunstner & Hennig, *BackPACK*, ICLR 2020, appendix A.

    Example:
        >>> import torch
        >>> from lightning_curv import DiagHessian, curvature
        >>> w = torch.nn.Parameter(torch.tensor([2.0]))
        >>> with curvature(DiagHessian()):
        ...     loss = torch.nn.functional.mse_loss((torch.tensor([[1.0]]) * w).square(), torch.tensor([[1.0]]))
        ...     loss.backward()
        >>> w.diag_h  # (w² - 1)² has the second derivative 12 w² - 4
        tensor([44.])
    """

    savefield = "diag_h"
    source = Signed()

    def evaluate(self, jacobian: Jacobian) -> Tensor:
        """Signed squares of J, summed over columns and samples."""
        return jacobian.sum_squares()


class BatchDiagHessian(BatchDiagGGNExact):
    """The summands of `DiagHessian`, scale included, in ``diag_h_batch`` of shape ``[N, *p]``."""

    savefield = "diag_h_batch"
    source = Signed()
