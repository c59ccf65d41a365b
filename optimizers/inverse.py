"""Inverse of a damped positive semi-definite factor."""

import torch
from torch import Tensor

from .factors import is_diagonal


def damped_inverse(factor: Tensor, damping: Tensor, batched: bool) -> Tensor | None:
    r"""$(F + \gamma I)^{-1}$ by Cholesky, once more in float64 if that fails.

    Args:
        factor: positive semi-definite matrix [d, d] or diagonal [d]; with a leading [G] if `batched`.
        damping: $\gamma > 0$, [] or [G] if `batched`.
        batched: whether the factor carries a leading group dimension.

    Returns:
        The inverse, shaped like `factor`; None if it could not be computed.

    Cost: $d^3$ time and two more [d, d] (a diagonal: $d$).
    """
    if is_diagonal(factor, batched):
        return (factor + damping.unsqueeze(-1)).reciprocal()
    inverse = _cholesky_inverse(factor, damping)
    if inverse is None and factor.dtype != torch.float64:
        device = "cpu" if factor.device.type == "mps" else factor.device  # MPS has no float64
        inverse = _cholesky_inverse(factor.to(device, torch.float64), damping.to(device, torch.float64))
    return None if inverse is None else inverse.to(factor)


def _cholesky_inverse(factor: Tensor, damping: Tensor) -> Tensor | None:
    damped = factor.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(damping.unsqueeze(-1))
    root, info = torch.linalg.cholesky_ex(damped)
    if bool(info.any()):
        return None
    inverse = torch.cholesky_inverse(root)
    return inverse if bool(inverse.isfinite().all()) else None
