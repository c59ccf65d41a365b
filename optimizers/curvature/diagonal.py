"""Curvature of one parameter as a running mean of its diagonal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_curv.extensions import Extension
from lightning_curv.optimizers.curvature.base import Block, Curvature, Gradient, Part, State
from lightning_curv.optimizers.curvature.fields import as_tensors
from lightning_curv.optimizers.linear_algebra.readings import Readings
from lightning_curv.optimizers.linear_algebra.running_mean import next_weight, updated_mean


class DiagonalCurvature(Curvature):
    r"""A diagonal $h$ per parameter, a bias-corrected running mean.

    Its decay is the second of the group's `betas`. There is nothing to invert: directions are
    quotients.

    Args:
        extension: leaves the diagonal of one batch on the parameters.
    """

    def __init__(self, extension: Extension) -> None:
        self.extension = extension

    def pairs(self, fields: dict[Tensor, Any]) -> dict[Tensor, Tensor]:
        return {}

    def measure(
        self,
        state: State,
        block: Block,
        fields: Sequence[Any],
        step: int,
        samples: float = 0.0,
    ) -> list[Tensor]:
        (param,) = block.params
        diagonals = as_tensors(fields[0])
        if len(diagonals) != 1 or diagonals[0].shape != param.shape:
            raise ValueError(
                f"`{self.extension.savefield}` must be one tensor of its parameter's shape "
                f"{tuple(param.shape)}, found {[tuple(tensor.shape) for tensor in diagonals]}."
            )
        return diagonals

    def absorb(
        self,
        state: State,
        block: Block,
        statistics: list[Tensor],
        scale: float,
        floor: float | Tensor = 0.0,
    ) -> None:
        if "diagonal" not in state:
            state["diagonal"] = _zeros(statistics[0], block.params[0].dtype)
            state["weight"] = 0.0
        _, decay = block.group["betas"]
        state["weight"] = next_weight(state["weight"], decay)
        value = statistics[0] * scale
        state["diagonal"] = updated_mean(state["diagonal"], value, state["weight"])

    def mean_eigenvalue(self, state: State) -> Tensor:
        return state["diagonal"].mean()

    def units(self, state: State) -> int:
        return 0

    def inverted(
        self, due: Sequence[Part], readings: Readings | None = None
    ) -> list[list[Tensor] | None]:
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
        r"""The directions $d = g / (\hat h + \lambda)$."""
        directions = []
        for gradient in gradients:
            (value,) = gradient.values
            damped = gradient.state["diagonal"] + gradient.damping()
            directions.append([value / damped])
        return directions

    def squared_norm(self, state: State, grad: Tensor, value: Tensor) -> Tensor:
        r"""The squared length $d^\top \operatorname{diag}(\hat h) \, d$."""
        return (value.square() * state["diagonal"]).sum()


def _zeros(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros to average into, in float32 or wider: a mean of many in bfloat16 would stand still."""
    return torch.zeros_like(tensor, dtype=torch.promote_types(dtype, torch.float32))
