"""Curvature of a block as a Kronecker product of running means."""

from __future__ import annotations

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
    diagonal,
    is_batched,
    is_diagonal,
    limit_size,
    mean_eigenvalue,
    parts_of,
)
from lightning_curv.optimizers.linear_algebra.inverse import damped_inverses
from lightning_curv.optimizers.linear_algebra.readings import Readings
from lightning_curv.optimizers.linear_algebra.running_mean import next_weight, updated_mean

# The least variance of an input, in those of all inputs of a layer, by which it is standardized.
LEAST_VARIANCE = 0.3


class KroneckerCurvature(Curvature):
    r"""A block $F_1 \otimes \dots \otimes F_k$, each factor a running mean.

    Its decay is the `factor_decay` of the group. The inverse is that of
    $\bigotimes_i (F_i + \gamma_i I)$, see `damping.split_damping`.

    Args:
        extension: leaves the Jacobians of one batch on the parameters.
        sharing: makes factors of a Jacobian.
        positions: of a convolution to use for its factors; None: all.
        max_factor_size: factors with more rows are replaced by their diagonal.
        split: larger factors are replaced by diagonal blocks of about this many rows; None: by
            none.
        most: Blocks have as many rows as the batch has samples, `split` at least and this at most.
        sharded: see `Curvature`.

    Attributes:
        standardizes: whether damping is isotropic in the coordinates of standardized inputs, where
            the loss has a least damping.
    """

    derived: tuple[str, ...] = ("inverses",)
    standardizes = True

    def __init__(
        self,
        extension: Extension,
        sharing: KFLR,
        positions: int | None,
        max_factor_size: int,
        split: int | None = None,
        sharded: bool = False,
        most: int = 0,
    ) -> None:
        self.extension = extension
        self.sharing = sharing
        self.positions = positions
        self.max_factor_size = max_factor_size
        self.split = split
        self.most = most
        self.sharded = sharded

    def pairs(self, fields: dict[Tensor, Any]) -> dict[Tensor, Tensor]:
        return weight_bias_pairs(fields)

    def measure(
        self,
        state: State,
        block: Block,
        fields: Sequence[Any],
        step: int,
        samples: float = 0.0,
    ) -> list[Tensor]:
        split = self.split
        if split is not None:
            # A batch has as many directions as samples: smaller blocks would lose some of them,
            # larger ones hold little more, and cost more than the batch does.
            split = max(split, min(round(samples) or self.most, self.most))
        statistics = kronecker_factors(
            fields, self.sharing, self.positions, step, split, self.max_factor_size
        )
        count = factors_among(statistics, block)
        factors = statistics[:count]
        others = statistics[count:]
        return [*self.checked(factors, block), *others]

    def checked(self, factors: list[Tensor], block: Block) -> list[Tensor]:
        """The factors, large ones as diagonals.

        Args:
            factors: of one batch, see `kronecker_factors`.
            block: the parameters.

        Raises:
            ValueError: the factors do not fit the block.
        """
        batched = is_batched(factors)
        # An extension of the user's own may leave anything.
        if block_size(factors, batched) != sum(param.numel() for param in block.params):
            shapes = [tuple(param.shape) for param in block.params]
            raise ValueError(
                f"Kronecker factors must cover the elements of parameters of shapes {shapes}, "
                f"found factors of shapes {[tuple(factor.shape) for factor in factors]}."
            )
        return [limit_size(factor, self.max_factor_size, batched) for factor in factors]

    def absorb(
        self,
        state: State,
        block: Block,
        statistics: list[Tensor],
        scale: float,
        floor: float | Tensor = 0.0,
    ) -> None:
        if scale != 1.0:
            # One factor carries the scale of the loss, that of the cotangents.
            statistics = [statistics[0] * scale, *statistics[1:]]
        # At the first step, and if the layer is used in another way than before.
        if [mean.shape for mean in means(state)] != [value.shape for value in statistics]:
            self._start(state, block, statistics)
        state["weight"] = next_weight(state["weight"], block.group["factor_decay"])
        updated = [
            updated_mean(mean, value, state["weight"])
            for mean, value in zip(means(state), statistics, strict=True)
        ]
        count = len(state["factors"])
        state["factors"], state["mean"] = updated[:count], updated[count:]
        # A given damping is that of the weights as they are, not of centered coordinates; those are
        # needed all the same where only diagonal blocks are kept.
        has_bias = len(block.params) == 2
        is_split = bool(state["mean"])
        is_auto = block.group["damping"] == "auto"
        state["centers"] = has_bias and (is_auto or is_split)
        # The host may not know the least damping yet.
        has_floor = torch.as_tensor(floor > 0).to(state["factors"][0])
        state["standardizes"] = [has_floor] if has_bias and is_auto else []

    def _start(self, state: State, block: Block, statistics: list[Tensor]) -> None:
        """Begin running means of other shapes than before; what followed from the old ones goes."""
        for key in self.derived:
            state.pop(key, None)
        param = block.params[0]
        dtype = torch.promote_types(param.dtype, torch.float32)
        zeros = [torch.zeros_like(value, dtype=dtype, device=param.device) for value in statistics]
        count = factors_among(statistics, block)
        state["factors"], state["mean"] = zeros[:count], zeros[count:]
        state["batched"], state["weight"] = is_batched(state["factors"]), 0.0
        state.pop("layout", None)
        # Behind the factors of a single parameter come the sizes of a transposed convolution.
        if len(block.params) == 1 and state["mean"]:
            state["layout"] = [round(size) for size in statistics[count].tolist()]

    def mean_eigenvalue(self, state: State) -> Tensor:
        batched = state["batched"]
        factors = self._damped_factors(state)
        of_factors = [mean_eigenvalue(factor, batched) for factor in factors]
        # The trace of a Kronecker product is the product of the traces; the mean is over groups.
        return torch.stack(of_factors).prod(dim=0).mean()

    def _damped_factors(self, state: State) -> list[Tensor]:
        """The factors, that of standardized inputs as its diagonal; the mean is not subtracted."""
        factors: list[Tensor] = state["factors"]
        if not self._has_scale(state):
            return factors
        return [factors[0], diagonal(factors[1], False) / input_scales(state).square()]

    def _has_scale(self, state: State) -> bool:
        """Whether the inputs of a block may be standardized."""
        # A checkpoint may be older than the scales, until curvature is measured again.
        return self.standardizes and len(state.get("standardizes", ())) > 0

    def units(self, state: State) -> int:
        return len(state.get("factors", ()))

    def inverted(
        self, due: Sequence[Part], readings: Readings | None = None
    ) -> list[list[Tensor] | None]:
        damped = []
        scales: list[Tensor | None] = []
        for state, unit, damping in due:
            batched = state["batched"]
            gammas = split_damping(self._damped_factors(state), damping, batched)
            factor = to_invert(state, unit)
            scale: Tensor | None = None
            if unit == 1 and self._has_scale(state):
                scale = input_scales(state).reciprocal()
                factor = scaled(factor, scale)
            scales.append(scale)
            # All factors of all blocks in one call: those of equal shape are inverted together.
            damped.append((factor, gammas[unit], batched))
        inverses = damped_inverses(damped, readings)
        return [
            None if inverse is None else [inverse if scale is None else scaled(inverse, scale)]
            for inverse, scale in zip(inverses, scales, strict=True)
        ]

    def shapes(self, state: State, unit: int) -> list[torch.Size]:
        return [state["factors"][unit].shape]

    def dtype(self, state: State) -> torch.dtype:
        factor: Tensor = state["factors"][0]
        return factor.dtype

    def accept(self, state: State, unit: int, tensors: list[Tensor]) -> None:
        if "inverses" not in state:
            state["inverses"] = [None] * len(state["factors"])
        (state["inverses"][unit],) = tensors
        # The inverse of the inputs' factor is that in the coordinates of the center of that time,
        # which has to stay with it.
        if unit == 1:
            state["center"] = center(state)
            state["scale"] = [input_scales(state)] if self._has_scale(state) else []

    def ready(self, state: State) -> bool:
        inverses = state.get("inverses", [None])
        return all(inverse is not None for inverse in inverses)

    def fits(self, state: State, block: Block) -> bool:
        covered = block_size(state["factors"], state["batched"])
        return covered == sum(param.numel() for param in block.params)

    def precondition(self, gradients: Sequence[Gradient]) -> list[list[Tensor]]:
        products = []
        for gradient in gradients:
            inverses = gradient.state["inverses"]
            batched = gradient.state["batched"]
            value = matrix(gradient).to(inverses[0].dtype)
            products.append((inverses, value, batched))
        directions = kronecker_matmuls(products)
        return [
            from_matrix(direction, gradient)
            for direction, gradient in zip(directions, gradients, strict=True)
        ]

    def damped(self, state: State, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        if not self._has_scale(state):
            return weight, bias
        rows = weight.view(len(weight), bias.shape[1], -1)
        (has_floor,) = state["standardizes"]
        for mean in state.get("center", ()):
            # Without a least damping the damping of the weights as they are, which is more, is what
            # keeps steps short.
            bias = bias + has_floor.to(rows) * (rows @ mean.to(rows))
        for scale in state.get("scale", ()):
            weight = (rows * scale[:-1].to(rows)).view(weight.shape)
        return weight, bias

    def squared_norm(self, state: State, grad: Tensor, value: Tensor) -> Tensor:
        r"""The squared length $d^\top g = d^\top C d$ in the metric of the damped curvature."""
        return torch.dot(value.flatten(), grad.flatten())


def matrix(gradient: Gradient) -> Tensor:
    """The gradient of a block as its factors act on it."""
    state = gradient.state
    return joined(gradient.values, state.get("center", ()), state.get("layout", ()))


def from_matrix(matrix: Tensor, gradient: Gradient) -> list[Tensor]:
    """The opposite of `matrix`, in the shapes of the gradient."""
    state = gradient.state
    return separated(matrix, gradient.values, state.get("center", ()), state.get("layout", ()))


def factors_among(statistics: Sequence[Tensor], block: Block) -> int:
    """How many of the statistics are factors; what is behind them: see `kronecker_factors`."""
    # Weight and bias have two factors, whatever follows them.
    if len(block.params) == 2:
        return 2
    pair = statistics[:2]
    pair_covers_block = (
        len(pair) == 2 and block_size(pair, is_batched(pair)) == block.params[0].numel()
    )
    return 2 if pair_covers_block else len(statistics)


def means(state: State) -> list[Tensor]:
    """All running means of a block."""
    return [*state.get("factors", ()), *state.get("mean", ())]


def center(state: State) -> list[Tensor]:
    """The center of the inputs as it is now, see `weight_and_bias`; empty if it stays at zero."""
    if not state["centers"] or is_diagonal(state["factors"][1], False):
        return []
    if state["mean"]:
        return [mean.clone() for mean in state["mean"]]
    # The last row of a whole second moment of (a, 1) is the mean of (a, 1).
    second_moment: Tensor = state["factors"][1]
    return [second_moment[-1, :-1].clone()]


def to_invert(state: State, unit: int) -> Tensor:
    """A factor, that of the inputs in the coordinates of their center."""
    factor: Tensor = state["factors"][unit]
    if unit != 1:
        return factor
    current_center = center(state)
    if current_center:
        return centered(factor, *current_center)
    return factor


def input_scales(state: State) -> Tensor:
    """What the inputs of a layer with bias are divided by where its damping is isotropic, [d + 1].

    Where the loss has a least damping these are their standard deviations, and 1 for the 1 that is
    appended; elsewhere they are 1. An input that is hardly ever active has a tiny variance, of
    which the batches so far say little.
    """
    variances = input_variances(state)
    # Of inputs that are all constant nothing is to be scaled.
    mean = variances.mean()
    least = torch.where(mean > 0, LEAST_VARIANCE * mean, 1.0)
    deviations = variances.clamp_min(least).sqrt()
    (has_floor,) = state["standardizes"]
    return torch.cat([deviations.where(has_floor > 0, 1.0), variances.new_ones(1)])


def input_variances(state: State) -> Tensor:
    """The variances of a layer's inputs, [d]; second moments where no center is kept."""
    second_moments = diagonal(state["factors"][1], False)[:-1]
    for mean in center(state):
        second_moments = second_moments - mean.square()
    return second_moments.clamp_min(0.0)


def scaled(factor: Tensor, scale: Tensor) -> Tensor:
    """A factor with rows and columns multiplied by a scale, [d]; diagonal, whole or split."""
    if is_diagonal(factor, False):
        return factor * scale * scale
    result = factor.clone()
    pieces = scale.split(factor.shape[1])
    for block, piece in zip(parts_of(result, False), pieces, strict=True):
        block.mul_(piece.unsqueeze(1)).mul_(piece)
    return result
