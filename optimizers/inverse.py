"""Inverses of damped positive semi-definite factors, many at a time."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from .factors import is_diagonal

Damped = tuple[Tensor, Tensor, bool]  # factor, damping, batched


def damped_inverses(factors: Sequence[Damped]) -> list[Tensor | None]:
    r"""$(F + \gamma I)^{-1}$ by Cholesky, once more in float64 where that fails; factors of equal shape together.

    Args:
        factors: triples of a positive semi-definite matrix [d, d] or diagonal [d], with a leading [G] if batched; its
            $\gamma > 0$, [] or [G]; and whether it is batched.

    Returns:
        The inverses, shaped like the factors; None where one could not be computed.

    Cost: $d^3$ time and two more [d, d] each (a diagonal: $d$).
    """
    inverses: list[Tensor | None] = [None] * len(factors)
    stacks: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for i, (factor, damping, batched) in enumerate(factors):
        if is_diagonal(factor, batched):
            inverses[i] = (factor + damping.unsqueeze(-1)).reciprocal()
        else:
            stacks[factor.shape, factor.dtype, factor.device].append(i)
    for members in stacks.values():
        stack = torch.stack([factors[i][0] for i in members])
        for i, inverse in zip(members, _inverses(stack, torch.stack([factors[i][1] for i in members])), strict=True):
            inverses[i] = inverse
    return inverses


def _inverses(stack: Tensor, damping: Tensor) -> list[Tensor | None]:
    inverses, succeeded = _cholesky_inverse(stack, damping)
    if not all(succeeded) and stack.dtype != torch.float64:
        device = "cpu" if stack.device.type == "mps" else stack.device  # MPS has no float64
        again = [i for i, success in enumerate(succeeded) if not success]
        found, flags = _cholesky_inverse(stack[again].to(device, torch.float64), damping[again].to(device, torch.float64))
        inverses[again] = found.to(inverses)
        for i, flag in zip(again, flags, strict=True):
            succeeded[i] = flag
    return [inverse.clone() if success else None for inverse, success in zip(inverses, succeeded, strict=True)]


def _cholesky_inverse(stack: Tensor, damping: Tensor) -> tuple[Tensor, list[bool]]:
    damped = stack.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(damping.unsqueeze(-1))
    root, info = torch.linalg.cholesky_ex(damped)
    # The inverse of a failed root would raise; that of the identity is not used.
    root = torch.where((info == 0)[..., None, None], root, torch.eye(root.shape[-1]).to(root))
    inverse = torch.cholesky_inverse(root)
    success = (info.flatten(1) if info.dim() > 1 else info[:, None]).eq(0).all(1) & inverse.flatten(1).isfinite().all(1)
    return inverse, success.tolist()
