"""From the fields of one backward pass to running means of the curvature."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from lightning_curv.optimizers.curvature.base import Block, Curvature
from lightning_curv.optimizers.linear_algebra.collectives import averaged_over_ranks
from lightning_curv.optimizers.linear_algebra.readings import Readings
from lightning_curv.optimizers.step.parameters import Parameters
from lightning_curv.optimizers.warn import warn
from lightning_curv.terms.jacobian import Jacobian

# The statistics of every block, by its first parameter.
Statistics = dict[Tensor, list[Tensor]]


class MicroBatches:
    """What the micro-batches whose gradients add up in one step left on the parameters.

    Attributes:
        jacobians: of every micro-batch, for the quadratic model. The directions that it needs them
            for are known when all gradients are: until then they keep the inputs and cotangents of
            the layers.
        limits: `LossLimits` of every micro-batch.
    """

    def __init__(self) -> None:
        self.jacobians: list[dict[Tensor, Any]] = []
        self.limits: list[Tensor] = []
        self._sums: dict[Tensor, tuple[int, list[Tensor]]] = {}

    def add(self, statistics: Statistics) -> None:
        """Add the statistics of one more micro-batch.

        Where shapes have changed, the former ones are dropped.
        """
        for param, tensors in statistics.items():
            count, sums = self._sums.get(param, (0, []))
            if [total.shape for total in sums] == [tensor.shape for tensor in tensors]:
                # Not in place: the first statistics may be fields that somebody else holds.
                sums = [total + tensor for total, tensor in zip(sums, tensors, strict=True)]
                self._sums[param] = count + 1, sums
            else:
                self._sums[param] = 1, tensors

    def means(self) -> Statistics:
        """The averages of the statistics over the micro-batches."""
        return {
            param: tensors if count == 1 else [tensor / count for tensor in tensors]
            for param, (count, tensors) in self._sums.items()
        }


def statistics(
    curvature: Curvature,
    parameters: Parameters,
    blocks: Sequence[Block],
    fields: dict[Tensor, Any],
    step: int,
    samples: float,
) -> Statistics:
    """The statistics of one backward pass.

    Args:
        curvature: what makes statistics of fields.
        parameters: of the optimizer.
        blocks: of the parameters that move.
        fields: what the curvature's extension left on the parameters.
        step: number of the step.
        samples: of the first batch, see `Curvature.measure`.

    Returns:
        What `Curvature.measure` makes of them; blocks whose fields are missing are left out.
    """
    measured: Statistics = {}
    for block in blocks:
        fields_of_block = [fields.get(param) for param in block.params]
        if not any(_is_missing(field) for field in fields_of_block):
            first = block.params[0]
            state = parameters.state[first]
            measured[first] = curvature.measure(state, block, fields_of_block, step, samples)
    return measured


def _is_missing(field: Any) -> bool:
    """Whether there is nothing to measure; an empty batch has no curvature."""
    return field is None or (isinstance(field, Jacobian) and not field.samples)


def absorb(
    curvature: Curvature,
    parameters: Parameters,
    blocks: Sequence[Block],
    measured: Statistics,
    scale: float,
    floor: float | Tensor,
    readings: Readings,
) -> None:
    """Average statistics into the state of every block; those with inf or NaN are left out.

    Args:
        curvature: what they are statistics of.
        parameters: of the optimizer.
        blocks: of the parameters that move.
        measured: the statistics of this process.
        scale: what the curvature in them is to be multiplied by.
        floor: the least damping of the loss.
        readings: of the step.
    """
    device = blocks[0].params[0].device
    averages = averaged_over_ranks([measured.get(block.params[0]) for block in blocks], device)
    # All tensors of all blocks in one check, which waits for the device once at most.
    witnesses: list[Tensor] = []
    owners: list[Tensor] = []
    for block, tensors in zip(blocks, averages, strict=True):
        for tensor in tensors or ():
            witnesses.append(_witness(tensor))
            owners.append(block.params[0])
    warn_of = partial(parameters.warn_of_skipped, "curvature", owners)
    flags = iter(readings.finite(witnesses, warn_of))
    for block, tensors in zip(blocks, averages, strict=True):
        if tensors is None:
            continue
        flags_of_block = [next(flags) for _ in tensors]
        if all(flags_of_block):
            curvature.absorb(parameters.state[block.params[0]], block, tensors, scale, floor)
        else:
            name = parameters.described(block.params[:1])
            warn(f"found inf or NaN in the curvature of {name}; its former curvature stays in use.")


def _witness(tensor: Tensor) -> Tensor:
    """Entries that are finite only if all are.

    A positive semi-definite matrix has its largest entries on the diagonal.
    """
    is_square = tensor.dim() > 1 and tensor.shape[-1] == tensor.shape[-2]
    return tensor.diagonal(dim1=-2, dim2=-1) if is_square else tensor
