r"""The diagonal of the Hessian, exact: the GGN's and the network's own second derivatives."""

from __future__ import annotations

from torch import Tensor

from lightning_curv.extensions.base import Extension
from lightning_curv.extensions.columns import ExactHessian
from lightning_curv.extensions.ggn import BatchDiagGGNExact
from lightning_curv.terms.jacobian import Jacobian


class DiagHessian(Extension):
    r"""Diagonal of the Hessian of the loss, in `diag_h` of the parameter's shape.

    The second derivatives of the network are included. Exact for any architecture: elementwise
    nonlinearities contribute one signed column per unit, other nonlinear ops (softmax, norms,
    products) as many as they have inputs, piecewise linear ones none. Cost: one backward pass per
    column, none for those of a nonlinearity upon the first linear layer; for piecewise linear
    networks that of `DiagGGNExact`. Parameters that meet the samples
    in an op without a rule, in which they are not linear (a solved system, a derivative in the
    loss), take one backward pass per sample and entry, with a warning that says how many. Dangel,
    Kunstner & Hennig, *BackPACK*, ICLR 2020, appendix A.

    Example:
        >>> import torch
        >>> from lightning_curv import DiagHessian, curvature
        >>> w = torch.nn.Parameter(torch.tensor([2.0]))
        >>> with curvature(DiagHessian()):
        ...     output = (torch.tensor([[1.0]]) * w).square()
        ...     torch.nn.functional.mse_loss(output, torch.ones(1, 1)).backward()
        >>> w.diag_h  # (w² - 1)² has the second derivative 12 w² - 4
        tensor([44.])
    """

    savefield = "diag_h"
    source = ExactHessian()

    def evaluate(self, jacobian: Jacobian) -> Tensor:
        """Sum the signed squares of J over columns and samples."""
        return jacobian.sum_squares()


class BatchDiagHessian(BatchDiagGGNExact):
    """The summands of `DiagHessian`, in `diag_h_batch` of shape `[N, *p]`.

    They carry the scale of the loss: their sum over the samples is the diagonal. Cost: as
    `DiagHessian`; memory: N times the parameters.

    Example:
        >>> import torch
        >>> from lightning_curv import BatchDiagHessian, curvature
        >>> w = torch.nn.Parameter(torch.tensor([2.0]))
        >>> with curvature(BatchDiagHessian()):  # (w² x² - 1)² has 12 w² x⁴ - 4 x², here halved
        ...     output = (torch.tensor([[1.0], [2.0]]) * w).square()
        ...     torch.nn.functional.mse_loss(output, torch.ones(2, 1)).backward()
        >>> w.diag_h_batch
        tensor([[ 22.],
                [376.]])
    """

    savefield = "diag_h_batch"
    source = ExactHessian()
