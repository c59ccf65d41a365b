"""Curvature of one parameter as a running mean of its diagonal."""

import torch
from torch import Tensor

from lightning_curv.extensions import Extension

from .curvature import Direction, ParamGroup, State
from .running_mean import next_weight, update_mean


class DiagonalCurvature:
    r"""Diagonal $h$ per parameter; gradient and $h$ are bias-corrected running means with the group's `betas`.

    Args:
        extension: leaves the diagonal of one batch on the parameters.
    """

    def __init__(self, extension: Extension) -> None:
        self.extension = extension

    def absorb(self, state: State, param: Tensor, field: list[Tensor], group: ParamGroup) -> None:
        if len(field) != 1 or field[0].shape != param.shape:
            raise ValueError(
                f"`{self.extension.savefield}` must be one tensor of its parameter's shape {tuple(param.shape)}, "
                f"found {[tuple(tensor.shape) for tensor in field]}."
            )
        if "diagonal" not in state:
            state["diagonal"], state["weight"] = _zeros(param), 0.0
        state["weight"] = next_weight(state["weight"], group["betas"][1])
        update_mean(state["diagonal"], field[0], state["weight"])

    def refresh(self, state: State, group: ParamGroup) -> bool:
        return True

    def ready(self, state: State) -> bool:
        return "diagonal" in state

    def direction(self, state: State, grad: Tensor, group: ParamGroup) -> Direction:
        r"""$d = \hat g / (\hat h + \lambda)$ with $\|d\|^2 = d^\top \operatorname{diag}(\hat h) \, d$."""
        if "gradient" not in state:
            state["gradient"], state["gradient_weight"] = _zeros(grad), 0.0
        state["gradient_weight"] = next_weight(state["gradient_weight"], group["betas"][0])
        update_mean(state["gradient"], grad, state["gradient_weight"])
        value = state["gradient"] / (state["diagonal"] + group["damping"])
        return Direction(value, (value.square() * state["diagonal"]).sum(), group["base_lr"])


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
