"""Inverses of damped positive semi-definite factors, many at a time."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_curv.optimizers.linear_algebra.factors import is_diagonal, parts_of, partwise

Damped = tuple[Tensor, Tensor, bool]  # factor, damping, batched


def damped_inverses(factors: Sequence[Damped]) -> list[Tensor | None]:
    r"""$(F + \gamma I)^{-1}$ by Cholesky, once more in float64 where that fails; matrices of equal shape together.

    Args:
        factors: triples of a positive semi-definite factor; its $\gamma > 0$, [] or [G]; and
            whether it is batched.

    Returns:
        The inverses, shaped like the factors; None where one could not be computed.

    Cost: $d^3$ time and two more [d, d] each (a diagonal: $d$).
    """
    parts = [
        (part, gamma, batched)
        for factor, gamma, batched in factors
        for part in parts_of(factor, batched)
    ]
    found = iter(_of_matrices(parts))
    return [_assembled(factor, batched, found) for factor, _, batched in factors]


def _assembled(factor: Tensor, batched: bool, inverses: Iterator[Tensor | None]) -> Tensor | None:
    found = [next(inverses) for _ in parts_of(factor, batched)]
    inverted = [inverse for inverse in found if inverse is not None]
    if len(inverted) < len(found):
        return None
    remaining = iter(inverted)
    return partwise(lambda _: next(remaining), factor, batched=batched)


def _of_matrices(factors: Sequence[Damped]) -> list[Tensor | None]:
    inverses: list[Tensor | None] = [None] * len(factors)
    stacks: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for i, (factor, damping, batched) in enumerate(factors):
        if is_diagonal(factor, batched):
            inverses[i] = (factor + damping.unsqueeze(-1)).reciprocal()
        else:
            stacks[factor.shape, factor.dtype, factor.device].append(i)
    for members in stacks.values():
        stack = (
            torch.stack([factors[i][0] for i in members])
            if len(members) > 1
            else factors[members[0]][0][None]
        )
        dampings = torch.stack([factors[i][1] for i in members])
        for i, inverse in zip(members, _inverses(stack, dampings), strict=True):
            inverses[i] = inverse
    return inverses


def _inverses(stack: Tensor, damping: Tensor) -> list[Tensor | None]:
    inverses, succeeded = _cholesky_inverse(stack, damping)
    if not all(succeeded) and stack.dtype != torch.float64:
        device = "cpu" if stack.device.type == "mps" else stack.device  # MPS has no float64
        again = [i for i, success in enumerate(succeeded) if not success]
        wide = [tensor[again].to(device, torch.float64) for tensor in (stack, damping)]
        repaired, flags = _cholesky_inverse(*wide)
        inverses[again] = repaired.to(inverses)
        for i, flag in zip(again, flags, strict=True):
            succeeded[i] = flag
    # Copies: saved states would otherwise hold the whole stack.
    found = [inverse.clone() for inverse in inverses] if len(stack) > 1 else [inverses[0]]
    return [inverse if success else None for inverse, success in zip(found, succeeded, strict=True)]


def _cholesky_inverse(stack: Tensor, damping: Tensor) -> tuple[Tensor, list[bool]]:
    damped = stack.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(damping.unsqueeze(-1))
    root, info = torch.linalg.cholesky_ex(damped)
    failed = info != 0
    if bool(
        failed.any()
    ):  # the inverse of a failed root would raise; that of the identity is not used
        root = torch.where(failed[..., None, None], torch.eye(root.shape[-1]).to(root), root)
    inverse = torch.cholesky_inverse(root)
    # A positive definite matrix has its largest entries on the diagonal.
    finite = inverse.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
    return inverse, (finite & ~failed).reshape(len(stack), -1).all(1).tolist()
