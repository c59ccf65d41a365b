"""Curvature of a block as a Kronecker product of running means."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_curv.extensions import KFLR, Extension

from .blocks import weight_bias_pairs
from .curvature import Block, State
from .damping import split_damping
from .factors import block_size, is_batched, kronecker_matmul, limit_size, mean_eigenvalue
from .inverse import damped_inverses
from .joint import joined, separated
from .running_mean import next_weight, update_mean
from .statistics import kronecker_factors


class KroneckerCurvature:
    r"""Block $F_1 \otimes \dots \otimes F_k$, each factor a running mean (`factor_decay` of the group).

    The inverse is that of $\bigotimes_i (F_i + \gamma_i I)$, see `damping.split_damping`.

    Args:
        extension: leaves the Jacobians of one batch on the parameters.
        sharing: makes factors of a Jacobian.
        positions: of a convolution to use for its factors; None: all.
        max_factor_size: factors with more rows are replaced by their diagonal.
    """

    derived: tuple[str, ...] = ("inverses",)  # keys of the state that become invalid when factors change their shape

    def __init__(self, extension: Extension, sharing: KFLR, positions: int | None, max_factor_size: int) -> None:
        self.extension = extension
        self.sharing = sharing
        self.positions = positions
        self.max_factor_size = max_factor_size

    def pairs(self, fields: dict[Tensor, Any]) -> dict[Tensor, Tensor]:
        return weight_bias_pairs(fields)

    def measure(self, state: State, block: Block, fields: Sequence[Any], step: int) -> list[Tensor]:
        return self.checked(kronecker_factors(fields, self.sharing, self.positions, step), block)

    def checked(self, factors: list[Tensor], block: Block) -> list[Tensor]:
        """The factors, large ones as diagonals; refuse those that do not fit the block."""
        batched = is_batched(factors)
        if block_size(factors, batched) != sum(param.numel() for param in block.params):
            shapes, found = [tuple(p.shape) for p in block.params], [tuple(f.shape) for f in factors]
            raise ValueError(
                f"Kronecker factors must cover the elements of parameters of shapes {shapes}, found factors of shapes "
                f"{found}."
            )
        return [limit_size(factor, self.max_factor_size, batched) for factor in factors]

    def absorb(self, state: State, block: Block, statistics: list[Tensor], scale: float) -> None:
        statistics = [statistics[0] * scale, *statistics[1:]] if scale != 1.0 else statistics
        if [f.shape for f in state.get("factors", [])] != [f.shape for f in statistics]:
            dtype, device = torch.promote_types(block.params[0].dtype, torch.float32), block.params[0].device
            for key in self.derived:
                state.pop(key, None)
            state["factors"] = [torch.zeros_like(f, dtype=dtype, device=device) for f in statistics]
            state["batched"], state["weight"] = is_batched(statistics), 0.0
        state["weight"] = next_weight(state["weight"], block.group["factor_decay"])
        for mean, factor in zip(state["factors"], statistics, strict=True):
            update_mean(mean, factor, state["weight"])

    def mean_eigenvalue(self, state: State) -> Tensor:
        means = torch.stack([mean_eigenvalue(factor, state["batched"]) for factor in state["factors"]])
        return means.prod(dim=0).mean()

    def units(self, state: State) -> int:
        return len(state.get("factors", ()))

    def refresh(self, due: Sequence[tuple[State, int, Tensor]]) -> list[bool]:
        damped = []
        for state, unit, damping in due:
            gammas = split_damping(state["factors"], damping, state["batched"])
            damped.append((state["factors"][unit], gammas[unit], state["batched"]))
        inverses = damped_inverses(damped)
        for (state, unit, _), inverse in zip(due, inverses, strict=True):
            if inverse is not None:
                state.setdefault("inverses", [None] * len(state["factors"]))[unit] = inverse
        return [inverse is not None for inverse in inverses]

    def ready(self, state: State) -> bool:
        return all(inverse is not None for inverse in state.get("inverses", [None]))

    def precondition(self, state: State, block: Block, grads: Sequence[Tensor], damping: Tensor) -> list[Tensor]:
        grad = joined(grads).to(state["inverses"][0].dtype)
        return separated(kronecker_matmul(state["inverses"], grad, state["batched"]), grads)

    def squared_norm(self, state: State, grad: Tensor, value: Tensor) -> Tensor:
        r"""$d^\top g$, the length in the metric of the damped curvature."""
        return (value * grad).sum()
