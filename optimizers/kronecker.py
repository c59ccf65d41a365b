"""Curvature of one parameter as a Kronecker product of running means."""

import torch
from torch import Tensor

from lightning_curv.extensions import Extension

from .curvature import Direction, ParamGroup, State
from .damping import split_damping
from .factors import block_size, is_batched, kronecker_matmul, limit_size
from .inverse import damped_inverse
from .running_mean import next_weight, update_mean


class KroneckerCurvature:
    r"""Block $F_1 \otimes \dots \otimes F_k$ per parameter, each factor a running mean (`factor_decay` of the group).

    Args:
        extension: leaves the factors of one batch on the parameters.
        max_factor_size: factors with more rows are replaced by their diagonal.
    """

    def __init__(self, extension: Extension, max_factor_size: int) -> None:
        self.extension = extension
        self.max_factor_size = max_factor_size

    def absorb(self, state: State, param: Tensor, field: list[Tensor], group: ParamGroup) -> None:
        batched = is_batched(field)
        if block_size(field, batched) != param.numel():
            shapes = [tuple(factor.shape) for factor in field]
            raise ValueError(
                f"Kronecker factors must cover the {param.numel()} elements of a parameter of shape "
                f"{tuple(param.shape)}, found factors of shapes {shapes} in `{self.extension.savefield}`."
            )
        factors = [limit_size(factor, self.max_factor_size, batched) for factor in field]
        if "factors" not in state:
            dtype = torch.promote_types(param.dtype, torch.float32)
            state["factors"] = [torch.zeros_like(f, dtype=dtype, device=param.device) for f in factors]
            state["batched"] = batched
            state["weight"] = 0.0
        state["weight"] = next_weight(state["weight"], group["factor_decay"])
        for mean, factor in zip(state["factors"], factors, strict=True):
            update_mean(mean, factor, state["weight"])
        state["outdated"] = True

    def refresh(self, state: State, group: ParamGroup) -> bool:
        """Invert the damped factors if they changed since the last time."""
        if not state.get("outdated", False):
            return True
        factors, batched = state["factors"], state["batched"]
        dampings = split_damping(factors, group["damping"], batched)
        inverses = [damped_inverse(f, gamma, batched) for f, gamma in zip(factors, dampings, strict=True)]
        if any(inverse is None for inverse in inverses):
            return False
        state["inverses"] = inverses
        state["outdated"] = False
        return True

    def ready(self, state: State) -> bool:
        return "inverses" in state

    def direction(self, state: State, grad: Tensor, group: ParamGroup) -> Direction:
        r"""$d = \bigotimes_i (F_i + \gamma_i I)^{-1} g$ with $\|d\|^2 = d^\top g$."""
        grad = grad.to(state["inverses"][0].dtype)
        value = kronecker_matmul(state["inverses"], grad, state["batched"])
        return Direction(value, (value * grad).sum(), group["base_lr"])
