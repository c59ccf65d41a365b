"""EKFAC: the eigenbasis of Kronecker factors with corrected second moments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_curv.optimizers.curvature.base import Block, Gradient, Part, State
from lightning_curv.optimizers.curvature.kronecker import (
    KroneckerCurvature,
    center,
    from_matrix,
    input_variances,
    matrix,
    means,
    to_invert,
)
from lightning_curv.optimizers.curvature.second_moments import second_moments
from lightning_curv.optimizers.linear_algebra.batching import kronecker_matmuls
from lightning_curv.optimizers.linear_algebra.factors import (
    is_diagonal,
    kronecker_matmul,
    parts_of,
    partwise,
    rows,
)
from lightning_curv.optimizers.linear_algebra.readings import Readings
from lightning_curv.optimizers.linear_algebra.running_mean import next_weight, updated_mean
from lightning_curv.precision import in_float64


class EigenCurvature(KroneckerCurvature):
    r"""A block $Q \operatorname{diag}(s) Q^\top$ in the eigenbasis of Kronecker factors.

    $Q = \bigotimes_i Q_i$ are the eigenvectors of the factors, and
    $s = \mathbb{E} \sum_{v,n} (Q^\top J_{vn})^2$ are the second moments of the columns in this
    basis, the best diagonal in Frobenius norm; damping is exact, $(s + \lambda)^{-1}$. The first
    basis starts with the eigenvalues of the Kronecker product, a later one with the diagonal that
    $Q \operatorname{diag}(s) Q^\top$ has in it.

    Source: T. George, C. Laurent, X. Bouthillier, N. Ballas, P. Vincent, *Fast Approximate Natural
        Gradient Descent in a Kronecker-factored Eigenbasis*, NeurIPS 2018, algorithm 1.
    """

    derived = ("basis", "moments", "moments_weight")
    # Its damping is exact in the basis of the factors as they are.
    standardizes = False

    def measure(
        self,
        state: State,
        block: Block,
        fields: Sequence[Any],
        step: int,
        samples: float = 0.0,
    ) -> list[Tensor]:
        factors = super().measure(state, block, fields, step, samples)
        shapes = [f.shape for f in factors]
        known_shapes = [f.shape for f in means(state)]
        # Without a basis there are no moments in it: the first factors make one.
        if not self.ready(state) or shapes != known_shapes:
            return factors
        center_of_basis = state.get("center", ())
        moments = second_moments(fields, state["basis"], state["batched"], center_of_basis)
        return [moments, *factors]

    def absorb(
        self,
        state: State,
        block: Block,
        statistics: list[Tensor],
        scale: float,
        floor: float | Tensor = 0.0,
    ) -> None:
        # The moments are in front, if `measure` could make any.
        if self.ready(state) and statistics[0].shape == state["moments"].shape:
            moments, *statistics = statistics
            decay = block.group["factor_decay"]
            state["moments_weight"] = next_weight(state["moments_weight"], decay)
            weight = state["moments_weight"]
            state["moments"] = updated_mean(state["moments"], moments * scale, weight)
        super().absorb(state, block, statistics, scale, floor)

    def floor_scale(self, state: State) -> Tensor | float:
        """The mean variance of a layer's inputs, if it is below 1.

        The least damping is that of weights whose inputs have a unit variance: those of smaller
        inputs have to be larger to do as much.
        """
        if not state["centers"]:
            return 1.0
        return input_variances(state).mean().clamp(0.0, 1.0)

    def units(self, state: State) -> int:
        return 1 if "factors" in state else 0

    def inverted(
        self, due: Sequence[Part], readings: Readings | None = None
    ) -> list[list[Tensor] | None]:
        # torch itself waits for every eigendecomposition: nothing is left to be read later.
        return [_decomposition(state) for state, _, _ in due]

    def shapes(self, state: State, unit: int) -> list[torch.Size]:
        factors = state["factors"]
        batched = state["batched"]
        # One eigenbasis per group, and moments of the whole block behind them.
        groups = factors[0].shape[: int(batched)]
        moments = torch.Size([*groups, *(rows(factor, batched) for factor in factors)])
        return [*(factor.shape for factor in factors), moments]

    def accept(self, state: State, unit: int, tensors: list[Tensor]) -> None:
        # The eigenvalues that a first basis starts with count as one measurement.
        if "basis" not in state:
            state["moments_weight"] = 1.0
        *state["basis"], state["moments"] = tensors
        state["center"] = center(state)

    def ready(self, state: State) -> bool:
        return "basis" in state

    def precondition(self, gradients: Sequence[Gradient]) -> list[list[Tensor]]:
        r"""The directions $Q \operatorname{diag}(s + \lambda)^{-1} Q^\top g$ of all blocks."""
        states = [gradient.state for gradient in gradients]
        bases = [state["basis"] for state in states]
        inverse_bases = [
            [_transposed(q, state["batched"]) for q in state["basis"]] for state in states
        ]
        # Into the basis, divided there, and back; every rotation of all blocks in one call.
        values = [matrix(g).to(g.state["moments"].dtype) for g in gradients]
        values = _rotated(states, inverse_bases, values)
        values = [
            value / (gradient.state["moments"].view(value.shape) + gradient.damping())
            for value, gradient in zip(values, gradients, strict=True)
        ]
        values = _rotated(states, bases, values)
        return [from_matrix(value, g) for value, g in zip(values, gradients, strict=True)]


def _rotated(
    states: Sequence[State],
    bases: Sequence[list[Tensor]],
    values: Sequence[Tensor],
) -> list[Tensor]:
    """Every value times the matrices of a basis, those of equal shapes in one product."""
    products = [
        (basis, value, state["batched"])
        for state, basis, value in zip(states, bases, values, strict=True)
    ]
    return kronecker_matmuls(products)


def _decomposition(state: State) -> list[Tensor] | None:
    """The eigenvectors of the factors and the second moments in their basis; None if it failed."""
    batched = state["batched"]
    values: list[Tensor] = []
    basis: list[Tensor] = []
    for unit in range(len(state["factors"])):
        decomposed = _eigenvectors(to_invert(state, unit), batched)
        # One block that fails is enough: the old basis stays.
        if decomposed is None:
            return None
        values.append(decomposed[0])
        basis.append(decomposed[1])
    if "basis" not in state:
        return [*basis, kronecker_matmul(values, _outer_ones(values, batched), batched)]
    # The diagonal of U diag(s) Uᵀ is (U ∘ U) s, U from the old basis to the new one.
    changes = []
    for q, old in zip(basis, state["basis"], strict=True):
        if is_diagonal(q, batched):
            changes.append(q)
        else:
            changes.append(partwise(_squared_cosines, q, old, batched=batched))
    moments = kronecker_matmul(changes, state["moments"], batched)
    return [*basis, moments]


def _outer_ones(values: Sequence[Tensor], batched: bool) -> Tensor:
    """Ones, [d_1, …, d_k] or [G, d_1, …, d_k], for eigenvalues [d_i] or [G, d_i]."""
    groups = values[0].shape[:-1] if batched else torch.Size()
    sizes = [value.shape[-1] for value in values]
    return values[0].new_ones(*groups, *sizes)


def _squared_cosines(q: Tensor, old: Tensor) -> Tensor:
    """The squares U ∘ U of the rotation U = Qᵀ Q_old."""
    return (q.mT @ old).square()


def _eigenvectors(factor: Tensor, batched: bool) -> tuple[Tensor, Tensor] | None:
    """Eigenvalues and eigenvectors; None where some diagonal block has none that are finite.

    Of a diagonal they are itself and ones, the diagonal of the identity.
    """
    if is_diagonal(factor, batched):
        return factor, torch.ones_like(factor)
    values: list[Tensor] = []
    vectors: list[Tensor] = []
    for part in parts_of(factor, batched):
        decomposed = _decomposed(part)
        if decomposed is None:
            return None
        values.append(decomposed[0])
        vectors.append(decomposed[1])
    remaining = iter(vectors)
    basis = partwise(lambda _: next(remaining), factor, batched=batched)
    if len(values) == 1:
        return values[0], basis
    # Groups come first: the blocks of a group are beside each other.
    return torch.cat(values, dim=-1), basis


def _decomposed(matrix: Tensor) -> tuple[Tensor, Tensor] | None:
    """Eigenvalues, none below zero, and eigenvectors, in float64 where the own dtype fails."""
    for try_again in (False, True):
        # In float64 at once where that is the own dtype: a second try would fail in the same way.
        if try_again and matrix.dtype == torch.float64:
            break
        try:
            values, vectors = torch.linalg.eigh(in_float64(matrix) if try_again else matrix)
        except RuntimeError:  # did not converge
            continue
        if bool(vectors.isfinite().all()):
            return values.clamp_min(0).to(matrix), vectors.to(matrix)
    return None


def _transposed(q: Tensor, batched: bool) -> Tensor:
    """The transpose of an orthogonal factor, its inverse."""
    if is_diagonal(q, batched):
        return q
    return partwise(lambda part: part.mT, q, batched=batched)
