"""Symmetric matrices: products at half the cost, and an eigendecomposition that does not fail."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_curv.matmul import mm
from lightning_curv.memory import empty

STRIP = 128  # rows of the product that are made at once, measured


def gram(x: Tensor) -> Tensor:
    """The product x xᵀ for ``x [D, R]``: what is below the diagonal is copied, not computed."""
    x = x.contiguous()
    if len(x) <= STRIP:
        return mm(x, x.mT)
    result = empty(x, len(x), len(x))
    for start in range(0, len(x), STRIP):
        stop = start + STRIP
        strip = mm(x[start:stop], x[start:].mT)
        result[start:stop, start:] = strip
        result[stop:, start:stop] = strip[:, STRIP:].mT
    return result


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of symmetric matrices, computed in float64 and returned in the matrix' own type.

    LAPACK may fail to converge on low-rank float32 matrices with many equal eigenvalues; should float64 fail too, a
    perturbation of the size of its rounding errors separates them.
    """
    exact = matrix.double()
    try:
        values, vectors = torch.linalg.eigh(exact)
    except RuntimeError:  # torch.linalg.LinAlgError
        scale = torch.finfo(exact.dtype).eps * exact.abs().amax((-1, -2), keepdim=True)
        spread = torch.linspace(0, 1, exact.shape[-1], dtype=exact.dtype, device=exact.device)
        values, vectors = torch.linalg.eigh(exact + scale * spread.diag())
    return values.to(matrix.dtype), vectors.to(matrix.dtype)
