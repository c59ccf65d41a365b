"""Curvature of a block as a Kronecker product of running means."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_curv.extensions import KFLR, Extension
from lightning_curv.optimizers.curvature.base import Block, Curvature, Gradient, Part, State
from lightning_curv.optimizers.curvature.blocks import weight_bias_pairs
from lightning_curv.optimizers.curvature.statistics import kronecker_factors
from lightning_curv.optimizers.curvature.weight_and_bias import centered, joined, separated
from lightning_curv.optimizers.linear_algebra.batching import kronecker_matmuls
from lightning_curv.optimizers.linear_algebra.damping import split_damping
from lightning_curv.optimizers.linear_algebra.factors import (
    block_size,
    is_batched,
    is_diagonal,
    limit_size,
    mean_eigenvalue,
)
from lightning_curv.optimizers.linear_algebra.inverse import damped_inverses
from lightning_curv.optimizers.linear_algebra.running_mean import next_weight, update_mean


class KroneckerCurvature(Curvature):
    r"""Block $F_1 \otimes \dots \otimes F_k$, each factor a running mean (`factor_decay` of the group).

    The inverse is that of $\bigotimes_i (F_i + \gamma_i I)$, see `damping.split_damping`.

    Args:
        extension: leaves the Jacobians of one batch on the parameters.
        sharing: makes factors of a Jacobian.
        positions: of a convolution to use for its factors; None: all.
        max_factor_size: factors with more rows are replaced by their diagonal.
        split: larger factors are replaced by diagonal blocks of about this many rows; None: by
            none.
        sharded: see `Curvature`.
    """

    derived: tuple[str, ...] = ("inverses",)

    def __init__(
        self,
        extension: Extension,
        sharing: KFLR,
        positions: int | None,
        max_factor_size: int,
        split: int | None = None,
        sharded: bool = False,
    ) -> None:
        self.extension = extension
        self.sharing = sharing
        self.positions = positions
        self.max_factor_size = max_factor_size
        self.split = split
        self.sharded = sharded

    def pairs(self, fields: dict[Tensor, Any]) -> dict[Tensor, Tensor]:
        return weight_bias_pairs(fields)

    def measure(self, state: State, block: Block, fields: Sequence[Any], step: int) -> list[Tensor]:
        statistics = kronecker_factors(fields, self.sharing, self.positions, step, self.split)
        count = factors_among(statistics, block)
        return [*self.checked(statistics[:count], block), *statistics[count:]]

    def checked(self, factors: list[Tensor], block: Block) -> list[Tensor]:
        """The factors, large ones as diagonals; refuse those that do not fit the block."""
        batched = is_batched(factors)
        if block_size(factors, batched) != sum(param.numel() for param in block.params):
            shapes, found = (
                [tuple(p.shape) for p in block.params],
                [tuple(f.shape) for f in factors],
            )
            raise ValueError(
                f"Kronecker factors must cover the elements of parameters of shapes {shapes}, found factors of shapes "
                f"{found}."
            )
        return [limit_size(factor, self.max_factor_size, batched) for factor in factors]

    def absorb(self, state: State, block: Block, statistics: list[Tensor], scale: float) -> None:
        statistics = [statistics[0] * scale, *statistics[1:]] if scale != 1.0 else statistics
        if [mean.shape for mean in means(state)] != [value.shape for value in statistics]:
            dtype, device = (
                torch.promote_types(block.params[0].dtype, torch.float32),
                block.params[0].device,
            )
            for key in self.derived:
                state.pop(key, None)
            zeros = [torch.zeros_like(value, dtype=dtype, device=device) for value in statistics]
            count = factors_among(statistics, block)
            state["factors"], state["mean"] = zeros[:count], zeros[count:]
            state.pop("layout", None)
            if len(block.params) == 1 and state["mean"]:
                state["layout"] = [round(size) for size in statistics[count].tolist()]
            state["batched"], state["weight"] = is_batched(state["factors"]), 0.0
        state["weight"] = next_weight(state["weight"], block.group["factor_decay"])
        for mean, value in zip(means(state), statistics, strict=True):
            update_mean(mean, value, state["weight"])
        # A given damping is that of the weights as they are.
        state["centers"] = len(block.params) == 2 and (
            block.group["damping"] == "auto" or bool(state["mean"])
        )

    def mean_eigenvalue(self, state: State) -> Tensor:
        means = torch.stack(
            [mean_eigenvalue(factor, state["batched"]) for factor in state["factors"]]
        )
        return means.prod(dim=0).mean()

    def units(self, state: State) -> int:
        return len(state.get("factors", ()))

    def inverted(self, due: Sequence[Part]) -> list[list[Tensor] | None]:
        damped = []
        for state, unit, damping in due:
            gammas = split_damping(state["factors"], damping, state["batched"])
            damped.append((to_invert(state, unit), gammas[unit], state["batched"]))
        return [None if inverse is None else [inverse] for inverse in damped_inverses(damped)]

    def shapes(self, state: State, unit: int) -> list[torch.Size]:
        return [state["factors"][unit].shape]

    def dtype(self, state: State) -> torch.dtype:
        factor: Tensor = state["factors"][0]
        return factor.dtype

    def accept(self, state: State, unit: int, tensors: list[Tensor]) -> None:
        state.setdefault("inverses", [None] * len(state["factors"]))[unit] = tensors[0]
        if unit == 1:
            state["center"] = center(state)

    def ready(self, state: State) -> bool:
        return all(inverse is not None for inverse in state.get("inverses", [None]))

    def precondition(self, gradients: Sequence[Gradient]) -> list[list[Tensor]]:
        matrices = [matrix(g).to(g.state["inverses"][0].dtype) for g in gradients]
        products = kronecker_matmuls(
            [
                (g.state["inverses"], v, g.state["batched"])
                for g, v in zip(gradients, matrices, strict=True)
            ]
        )
        return [from_matrix(product, g) for product, g in zip(products, gradients, strict=True)]

    def squared_norm(self, state: State, grad: Tensor, value: Tensor) -> Tensor:
        r"""$d^\top g$, the length in the metric of the damped curvature."""
        return torch.dot(value.flatten(), grad.flatten())


def matrix(gradient: Gradient) -> Tensor:
    """The gradient of a block as its factors act on it."""
    return joined(
        gradient.values, gradient.state.get("center", ()), gradient.state.get("layout", ())
    )


def from_matrix(matrix: Tensor, gradient: Gradient) -> list[Tensor]:
    """The opposite, in the shapes of the gradient."""
    return separated(
        matrix, gradient.values, gradient.state.get("center", ()), gradient.state.get("layout", ())
    )


def factors_among(statistics: Sequence[Tensor], block: Block) -> int:
    """How many of the statistics are factors; what is behind them: see `kronecker_factors`."""
    pair = statistics[:2]
    covered = len(pair) == 2 and block_size(pair, is_batched(pair)) == block.params[0].numel()
    return 2 if len(block.params) == 2 or covered else len(statistics)


def means(state: State) -> list[Tensor]:
    """All running means of a block."""
    return [*state.get("factors", ()), *state.get("mean", ())]


def center(state: State) -> list[Tensor]:
    """The center of the inputs as it is now, see `joint`."""
    if not state["centers"] or is_diagonal(state["factors"][1], False):
        return []
    return [mean.clone() for mean in state["mean"]] or [state["factors"][1][-1, :-1].clone()]


def to_invert(state: State, unit: int) -> Tensor:
    """A factor, that of the inputs in the coordinates of their center."""
    factor: Tensor = state["factors"][unit]
    return centered(factor, *center(state)) if unit == 1 and center(state) else factor
