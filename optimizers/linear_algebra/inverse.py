"""Inverses of damped positive semi-definite factors, many at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_curv.devices import on_one_device
from lightning_curv.optimizers.linear_algebra.factors import is_diagonal, parts_of, partwise
from lightning_curv.optimizers.linear_algebra.readings import Readings
from lightning_curv.precision import in_float64

Damped = tuple[Tensor, Tensor, bool]  # factor, damping, batched


def damped_inverses(
    factors: Sequence[Damped], readings: Readings | None = None
) -> list[Tensor | None]:
    r"""Invert $F + \gamma I$ by Cholesky, once more in float64 where that fails.

    Matrices of equal shape are inverted together.

    Args:
        factors: triples of a positive semi-definite factor; its $\gamma > 0$, [] or [G]; and
            whether it is batched.
        readings: Of the step, where the flags of success may be read later; they are then taken to
            hold.

    Returns:
        The inverses, shaped like the factors; None where one could not be computed.

    Cost: $d^3$ time and two more [d, d] each (a diagonal: $d$).
    """
    # A split factor is inverted block by block: its damping is the same in all of them.
    parts = []
    for factor, gamma, batched in factors:
        for part in parts_of(factor, batched):
            parts.append((part, gamma, batched))
    inverses = iter(_of_matrices(parts, readings or Readings()))
    return [_assembled(factor, batched, inverses) for factor, _, batched in factors]


def _assembled(
    factor: Tensor,
    batched: bool,
    inverses: Iterator[Tensor | None],
) -> Tensor | None:
    """The inverse of a factor from those of its diagonal blocks, the next of the iterator."""
    of_parts = [next(inverses) for _ in parts_of(factor, batched)]
    inverted = [inverse for inverse in of_parts if inverse is not None]
    if len(inverted) < len(of_parts):
        return None
    remaining = iter(inverted)
    return partwise(lambda _: next(remaining), factor, batched=batched)


def _of_matrices(factors: Sequence[Damped], readings: Readings) -> list[Tensor | None]:
    """The inverses of diagonals and whole matrices."""
    inverses: list[Tensor | None] = [None] * len(factors)
    # One call per shape: small matrices take longer to launch than to invert.
    stacks: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for i, (factor, damping, batched) in enumerate(factors):
        if is_diagonal(factor, batched):
            damped = factor + damping.unsqueeze(-1)
            inverses[i] = damped.reciprocal()
        else:
            stacks[factor.shape, factor.dtype, factor.device].append(i)
    attempts = []
    for members in stacks.values():
        matrices = [factors[i][0] for i in members]
        # A view where there is one only: large matrices, which are few, are not copied.
        if len(matrices) > 1:
            stack = torch.stack(matrices)
        else:
            stack = matrices[0][None]
        dampings = torch.stack([factors[i][1] for i in members])
        found, succeeded = _cholesky_inverse(stack, dampings)
        attempts.append((members, stack, dampings, found, succeeded))
    # Read behind the loop: the host waits once at most for the inverses of all shapes.
    flags = iter(_read([succeeded for *_, succeeded in attempts], readings))
    for members, stack, dampings, found, _ in attempts:
        of_stack = [next(flags) for _ in members]
        for i, inverse in zip(members, _repaired(stack, dampings, found, of_stack), strict=True):
            inverses[i] = inverse
    return inverses


def _read(flags: Sequence[Tensor], readings: Readings) -> list[bool]:
    """All entries of some tensors, in one transfer from the device."""
    if not flags:
        return []
    return readings.hold(torch.cat(on_one_device(flags)))


def _repaired(
    stack: Tensor, damping: Tensor, inverses: Tensor, succeeded: list[bool]
) -> list[Tensor | None]:
    """The inverses of matrices [M, d, d] or [M, G, d, d], in float64 where they failed, or None."""
    if not all(succeeded) and stack.dtype != torch.float64:
        failed = [i for i, success in enumerate(succeeded) if not success]
        wide_stack = in_float64(stack[failed])
        wide_damping = in_float64(damping[failed])
        repaired, flags = _cholesky_inverse(wide_stack, wide_damping)
        inverses[failed] = repaired.to(inverses)
        for i, flag in zip(failed, flags.tolist(), strict=True):
            succeeded[i] = flag
    # Copies: saved states would otherwise hold the whole stack.
    if len(stack) > 1:
        separate = [inverse.clone() for inverse in inverses]
    else:
        separate = [inverses[0]]
    flagged = zip(separate, succeeded, strict=True)
    return [inverse if success else None for inverse, success in flagged]


def _cholesky_inverse(stack: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """The inverses of all matrices, and of each of the M whether it is one, [M]."""
    damped = stack.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(damping.unsqueeze(-1))
    # It reports failures instead of raising: one matrix must not stop the others of its stack.
    root, info = torch.linalg.cholesky_ex(damped)
    failed = info != 0
    # The inverse of a failed root would raise; that of the identity is not used. Nobody asks here
    # whether there is one: the host would wait for the device.
    root.masked_fill_(failed[..., None, None], 0)
    root.diagonal(dim1=-2, dim2=-1).masked_fill_(failed[..., None], 1)
    inverse = torch.cholesky_inverse(root)
    # A positive definite matrix has its largest entries on the diagonal.
    finite = inverse.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
    succeeded = finite & ~failed
    # One flag per factor: all groups of a batched one share the answer.
    return inverse, succeeded.reshape(len(stack), -1).all(1)
