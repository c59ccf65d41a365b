"""Symmetric matrices: products at half the cost, a robust eigendecomposition, roots without one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_curv.kernels.huge_pages import empty
from lightning_curv.kernels.onednn import mm
from lightning_curv.precision import in_float64

STRIP = 128  # rows of the product that are made at once, measured
# Columns up to which a copy of what is below the diagonal takes longer than computing it, measured.
FEW = 96


def gram(x: Tensor) -> Tensor:
    """The product x xᵀ for `x [D, R]`; below the diagonal it is copied where that is faster."""
    x = x.contiguous()
    if len(x) <= STRIP or x.shape[1] <= FEW:
        return mm(x, x.mT)
    result = empty(x, len(x), len(x))
    for start in range(0, len(x), STRIP):
        stop = start + STRIP
        # These rows from the diagonal on; what is left of it was a strip above.
        strip = mm(x[start:stop], x[start:].mT)
        result[start:stop, start:] = strip
        below_diagonal = strip[:, STRIP:].mT
        result[stop:, start:stop] = below_diagonal
    return result


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of symmetric matrices, computed in float64.

    They are returned in the matrix' own type. LAPACK may fail to converge on low-rank float32
    matrices with many equal eigenvalues; should float64 fail too, a perturbation of the size of its
    rounding errors separates them.
    """
    # Eigenvalues that differ by less than the rounding of float32 are common in low-rank factors.
    exact = in_float64(matrix)
    try:
        values, vectors = torch.linalg.eigh(exact)
    except RuntimeError:  # torch.linalg.LinAlgError
        largest = exact.abs().amax((-1, -2), keepdim=True)
        scale = torch.finfo(exact.dtype).eps * largest
        spread = torch.linspace(0, 1, exact.shape[-1], dtype=exact.dtype, device=exact.device)
        perturbed = exact + scale * spread.diag()
        values, vectors = torch.linalg.eigh(perturbed)
    return values.to(matrix), vectors.to(matrix)


def root_product(
    times: Callable[[Tensor], Tensor],
    vector: Tensor,
    steps: int,
) -> Tensor:
    r"""The root of the positive part of symmetric matrices H times vectors, by products with H.

    This is Lanczos' method: the root of its tridiagonal matrix. It is exact in B steps. Fewer keep
    the squared length $v^\top H v$ of the root times v exactly, for positive semi-definite H,
    and its direction up to an error that falls with the number of steps (Higham, *Functions of
    Matrices*, SIAM 2008, section 13.2).

    Args:
        times: H times vectors.
        vector: The vectors v, `[..., B]`.
        steps: The number of products.
    """
    smallest = torch.finfo(vector.dtype).tiny
    eps = torch.finfo(vector.dtype).eps
    length = vector.norm(dim=-1, keepdim=True)
    basis = [vector / length.clamp(min=smallest)]
    # The two bands of the tridiagonal matrix.
    diagonal = []
    beside = []
    steps = min(steps, vector.shape[-1])
    for step in range(steps):
        image = times(basis[-1])
        along_last = image * basis[-1]
        diagonal.append(along_last.sum(-1))
        if step + 1 < steps:
            # All vectors are kept: three-term recurrences lose orthogonality in a few steps.
            known = torch.stack(basis, -1)
            largest = image.norm(dim=-1)
            for _ in range(2):  # once leaves rounding errors that grow
                along_known = known @ (known.mT @ image.unsqueeze(-1))
                image = image - along_known.squeeze(-1)
            left = image.norm(dim=-1)
            # Where nothing is left H maps the known vectors to each other.
            done = left <= 100 * eps * largest
            beside.append(left.masked_fill(done, 0))
            following = image / left.unsqueeze(-1)
            basis.append(following.masked_fill(done.unsqueeze(-1), 0))
    tridiagonal = torch.diag_embed(torch.stack(diagonal, -1))
    if beside:
        above = torch.diag_embed(torch.stack(beside, -1), 1)
        tridiagonal = tridiagonal + above + above.mT
    broken = ~tridiagonal.isfinite().all(-1).all(-1)  # of a diverging network
    values, vectors = eigh(tridiagonal.masked_fill(broken[..., None, None], 0))
    # In the basis v is its length times the first unit vector.
    roots = values.clamp(min=0).sqrt()
    first_row = vectors[..., 0, :]
    in_basis = vectors @ (roots * first_row).unsqueeze(-1)
    of_unit_vector = torch.stack(basis, -1) @ in_basis
    product = length * of_unit_vector.squeeze(-1)
    return product.masked_fill(broken.unsqueeze(-1), torch.nan)
