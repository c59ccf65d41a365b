"""From the fields of one backward pass to running means of the curvature."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_curv.jacobian import Jacobian

from .curvature import Block, Curvature, Member
from .distributed import averaged_over_ranks
from .finite import finite_flags
from .parameters import Parameters
from .warn import warn


def measure(
    curvature: Curvature,
    parameters: Parameters,
    members: Sequence[Member],
    fields: dict[Tensor, Any],
    step: int,
    scale: float,
) -> None:
    """Average the statistics of a batch into the state of every block; those with inf or NaN are left out.

    Args:
        curvature: what makes statistics of fields.
        parameters: of the optimizer.
        members: parameters that move.
        fields: what the curvature's extension left on the parameters.
        step: number of the step.
        scale: what the curvature in the fields is to be multiplied by.
    """
    parameters.pair(members, curvature.pairs(fields))
    blocks = [block for block in parameters.blocks(members) if block.params[0] in fields or len(block.params) == 1]
    measured = [_statistics(curvature, parameters, block, fields, step) for block in blocks]
    measured = averaged_over_ranks(measured, members[0][1].device)
    flags = iter(finite_flags(_witness(tensor) for statistics in measured for tensor in statistics or ()))
    for block, statistics in zip(blocks, measured, strict=True):
        if statistics is None:
            continue
        finite = [next(flags) for _ in statistics]
        if all(finite):
            curvature.absorb(parameters.state[block.params[0]], block, statistics, scale)
        else:
            name = parameters.described(block.params[:1])
            warn(f"found inf or NaN in the curvature of {name}; its former curvature stays in use.")


def _statistics(
    curvature: Curvature, parameters: Parameters, block: Block, fields: dict[Tensor, Any], step: int
) -> list[Tensor] | None:
    found = [fields.get(param) for param in block.params]
    if any(field is None or (isinstance(field, Jacobian) and not field.samples) for field in found):
        return None  # an empty batch has no curvature
    state = parameters.state[block.params[0]]
    return curvature.measure(state, block, found, step)


def _witness(tensor: Tensor) -> Tensor:
    """Entries that are finite only if all are: a positive semi-definite matrix has its largest ones on the diagonal."""
    square = tensor.dim() > 1 and tensor.shape[-1] == tensor.shape[-2]
    return tensor.diagonal(dim1=-2, dim2=-1) if square else tensor
