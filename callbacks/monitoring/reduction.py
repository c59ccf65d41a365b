"""Numbers of all processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import Tensor
from torch import distributed as dist

from lightning_curv.distributed.failures import processes, together
from lightning_curv.optimizers.linear_algebra.collectives import averaged

if TYPE_CHECKING:
    from pytorch_lightning.strategies import Strategy


def reduced(tensor: Tensor, strategy: Strategy, how: Literal["mean", "max"]) -> Tensor:
    """The mean or the largest over the processes of a strategy, entry by entry.

    Args:
        tensor: of this process, where the processes can communicate; it may be overwritten.
        strategy: of the trainer.
        how: "mean" or "max".
    """
    if processes() == 1:  # where no process group of torch is, as on TPUs, the strategy knows how
        return strategy.reduce(tensor, reduce_op=how)
    if how == "max":
        together(dist.all_reduce, tensor, op=dist.ReduceOp.MAX)
        return tensor
    return averaged(tensor)
