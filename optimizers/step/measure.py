"""From the fields of one backward pass to running means of the curvature."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_curv.optimizers.curvature.base import Block, Curvature
from lightning_curv.optimizers.linear_algebra.collectives import averaged_over_ranks
from lightning_curv.optimizers.linear_algebra.finite import finite_flags
from lightning_curv.optimizers.step.parameters import Parameters
from lightning_curv.optimizers.warn import warn
from lightning_curv.terms.jacobian import Jacobian

Statistics = dict[Tensor, list[Tensor]]  # of every block, by its first parameter


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
        """Add the statistics of one more micro-batch; where shapes have changed the former ones are dropped."""
        for param, tensors in statistics.items():
            count, sums = self._sums.get(param, (0, []))
            if [s.shape for s in sums] == [t.shape for t in tensors]:
                self._sums[param] = count + 1, [s + t for s, t in zip(sums, tensors, strict=True)]
            else:
                self._sums[param] = 1, tensors

    def means(self) -> Statistics:
        """Averages of the statistics over the micro-batches."""
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
) -> Statistics:
    """The statistics of one backward pass.

    Args:
        curvature: what makes statistics of fields.
        parameters: of the optimizer.
        blocks: of the parameters that move.
        fields: what the curvature's extension left on the parameters.
        step: number of the step.
    """
    found: Statistics = {}
    for block in blocks:
        own = [fields.get(param) for param in block.params]
        if any(
            field is None or (isinstance(field, Jacobian) and not field.samples) for field in own
        ):
            continue  # an empty batch has no curvature
        found[block.params[0]] = curvature.measure(
            parameters.state[block.params[0]], block, own, step
        )
    return found


def absorb(
    curvature: Curvature,
    parameters: Parameters,
    blocks: Sequence[Block],
    found: Statistics,
    scale: float,
) -> None:
    """Average statistics into the state of every block; those with inf or NaN are left out.

    Args:
        curvature: what they are statistics of.
        parameters: of the optimizer.
        blocks: of the parameters that move.
        found: the statistics of this process.
        scale: what the curvature in them is to be multiplied by.
    """
    measured = averaged_over_ranks(
        [found.get(block.params[0]) for block in blocks], blocks[0].params[0].device
    )
    flags = iter(finite_flags(_witness(tensor) for tensors in measured for tensor in tensors or ()))
    for block, tensors in zip(blocks, measured, strict=True):
        if tensors is None:
            continue
        finite = [next(flags) for _ in tensors]
        if all(finite):
            curvature.absorb(parameters.state[block.params[0]], block, tensors, scale)
        else:
            name = parameters.described(block.params[:1])
            warn(f"found inf or NaN in the curvature of {name}; its former curvature stays in use.")


def _witness(tensor: Tensor) -> Tensor:
    """Entries that are finite only if all are: a positive semi-definite matrix has its largest ones on the diagonal."""
    square = tensor.dim() > 1 and tensor.shape[-1] == tensor.shape[-2]
    return tensor.diagonal(dim1=-2, dim2=-1) if square else tensor
