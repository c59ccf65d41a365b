"""Curvature of one parameter as a running mean of its diagonal."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_curv.extensions import Extension
from lightning_curv.optimizers.curvature.base import Block, Curvature, Gradient, Part, State
from lightning_curv.optimizers.curvature.fields import as_tensors
from lightning_curv.optimizers.linear_algebra.running_mean import next_weight, update_mean


class DiagonalCurvature(Curvature):
    r"""Diagonal $h$ per parameter, a bias-corrected running mean with the second of the group's `betas`.

    Args:
        extension: leaves the diagonal of one batch on the parameters.
    """

    def __init__(self, extension: Extension) -> None:
        self.extension = extension

    def pairs(self, fields: dict[Tensor, Any]) -> dict[Tensor, Tensor]:
        return {}

    def measure(self, state: State, block: Block, fields: Sequence[Any], step: int) -> list[Tensor]:
        field, (param,) = as_tensors(fields[0]), block.params
        if len(field) != 1 or field[0].shape != param.shape:
            raise ValueError(
                f"`{self.extension.savefield}` must be one tensor of its parameter's shape {tuple(param.shape)}, "
                f"found {[tuple(tensor.shape) for tensor in field]}."
            )
        return field

    def absorb(self, state: State, block: Block, statistics: list[Tensor], scale: float) -> None:
        if "diagonal" not in state:
            state["diagonal"], state["weight"] = _zeros(block.params[0]), 0.0
        state["weight"] = next_weight(state["weight"], block.group["betas"][1])
        update_mean(state["diagonal"], statistics[0] * scale, state["weight"])

    def mean_eigenvalue(self, state: State) -> Tensor:
        return state["diagonal"].mean()

    def units(self, state: State) -> int:
        return 0

    def inverted(self, due: Sequence[Part]) -> list[list[Tensor] | None]:
        return []

    def shapes(self, state: State, unit: int) -> list[torch.Size]:
        return []

    def dtype(self, state: State) -> torch.dtype:
        diagonal: Tensor = state["diagonal"]
        return diagonal.dtype

    def accept(self, state: State, unit: int, tensors: list[Tensor]) -> None:
        pass

    def ready(self, state: State) -> bool:
        return "diagonal" in state

    def precondition(self, gradients: Sequence[Gradient]) -> list[list[Tensor]]:
        r"""$d = g / (\hat h + \lambda)$."""
        return [[g.values[0] / (g.state["diagonal"] + g.damping)] for g in gradients]

    def squared_norm(self, state: State, grad: Tensor, value: Tensor) -> Tensor:
        r"""$d^\top \operatorname{diag}(\hat h) \, d$."""
        return (value.square() * state["diagonal"]).sum()


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
