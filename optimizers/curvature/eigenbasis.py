"""EKFAC: the eigenbasis of Kronecker factors with corrected second moments."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_curv.optimizers.curvature.base import Block, Gradient, Part, State
from lightning_curv.optimizers.curvature.kronecker import (
    KroneckerCurvature,
    center,
    from_matrix,
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
from lightning_curv.optimizers.linear_algebra.running_mean import next_weight, update_mean


class EigenCurvature(KroneckerCurvature):
    r"""Block $Q \operatorname{diag}(s) Q^\top$ with $Q = \bigotimes_i Q_i$ from the factors' eigenvectors.

    $s = \mathbb{E} \sum_{v,n} (Q^\top J_{vn})^2$ are the second moments of the columns in this
    basis, the best diagonal in Frobenius norm; damping is exact, $(s + \lambda)^{-1}$. The first
    basis starts with the eigenvalues of the Kronecker product, a later one with the diagonal that
    $Q \operatorname{diag}(s) Q^\top$ has in it.

    Source: T. George, C. Laurent, X. Bouthillier, N. Ballas, P. Vincent, *Fast Approximate Natural
        Gradient Descent in
    a Kronecker-factored Eigenbasis*, NeurIPS 2018, algorithm 1.
    """

    derived = ("basis", "moments", "moments_weight")

    def measure(self, state: State, block: Block, fields: Sequence[Any], step: int) -> list[Tensor]:
        factors = super().measure(state, block, fields, step)
        if not self.ready(state) or [f.shape for f in factors] != [f.shape for f in means(state)]:
            return factors
        return [
            second_moments(fields, state["basis"], state["batched"], state.get("center", ())),
            *factors,
        ]

    def absorb(self, state: State, block: Block, statistics: list[Tensor], scale: float) -> None:
        if self.ready(state) and statistics[0].shape == state["moments"].shape:
            moments, *statistics = statistics
            state["moments_weight"] = next_weight(
                state["moments_weight"], block.group["factor_decay"]
            )
            update_mean(state["moments"], moments * scale, state["moments_weight"])
        super().absorb(state, block, statistics, scale)

    def units(self, state: State) -> int:
        return 1 if "factors" in state else 0

    def inverted(self, due: Sequence[Part]) -> list[list[Tensor] | None]:
        return [_decomposition(state) for state, _, _ in due]

    def shapes(self, state: State, unit: int) -> list[torch.Size]:
        factors, batched = state["factors"], state["batched"]
        groups = factors[0].shape[: int(batched)]
        return [
            *(f.shape for f in factors),
            torch.Size([*groups, *(rows(f, batched) for f in factors)]),
        ]

    def accept(self, state: State, unit: int, tensors: list[Tensor]) -> None:
        if "basis" not in state:
            state["moments_weight"] = 1.0
        *state["basis"], state["moments"] = tensors
        state["center"] = center(state)

    def ready(self, state: State) -> bool:
        return "basis" in state

    def precondition(self, gradients: Sequence[Gradient]) -> list[list[Tensor]]:
        states = [g.state for g in gradients]
        values = [matrix(g).to(g.state["moments"].dtype) for g in gradients]
        inverse = [[_transposed(q, state["batched"]) for q in state["basis"]] for state in states]
        values = _rotated(states, inverse, values)
        values = [
            v / (g.state["moments"].view(v.shape) + g.damping)
            for v, g in zip(values, gradients, strict=True)
        ]
        values = _rotated(states, [state["basis"] for state in states], values)
        return [from_matrix(value, g) for value, g in zip(values, gradients, strict=True)]


def _rotated(
    states: Sequence[State], bases: Sequence[list[Tensor]], values: Sequence[Tensor]
) -> list[Tensor]:
    return kronecker_matmuls(
        [
            (basis, value, state["batched"])
            for state, basis, value in zip(states, bases, values, strict=True)
        ]
    )


def _decomposition(state: State) -> list[Tensor] | None:
    """The eigenvectors of the factors and the second moments in their basis."""
    batched = state["batched"]
    decomposed = [
        _eigenvectors(to_invert(state, unit), batched) for unit in range(len(state["factors"]))
    ]
    if any(result is None for result in decomposed):
        return None
    values, basis = (
        list(parts) for parts in zip(*(result for result in decomposed if result), strict=True)
    )
    if "basis" not in state:
        return [*basis, kronecker_matmul(values, _outer_ones(values, batched), batched)]
    # The diagonal of U diag(s) Uᵀ is (U ∘ U) s, U from the old basis to the new one.
    changes = [
        q if is_diagonal(q, batched) else partwise(_squared_cosines, q, old, batched=batched)
        for q, old in zip(basis, state["basis"], strict=True)
    ]
    return [*basis, kronecker_matmul(changes, state["moments"], batched)]


def _outer_ones(values: Sequence[Tensor], batched: bool) -> Tensor:
    groups = values[0].shape[:-1] if batched else torch.Size()
    return values[0].new_ones(*groups, *(value.shape[-1] for value in values))


def _squared_cosines(q: Tensor, old: Tensor) -> Tensor:
    return (q.mT @ old).square()


def _eigenvectors(factor: Tensor, batched: bool) -> tuple[Tensor, Tensor] | None:
    """Eigenvalues and eigenvectors; of a diagonal: itself and ones, the diagonal of the identity."""
    if is_diagonal(factor, batched):
        return factor, torch.ones_like(factor)
    decomposed = [_decomposed(part) for part in parts_of(factor, batched)]
    if any(result is None for result in decomposed):
        return None
    values, vectors = zip(*(result for result in decomposed if result is not None), strict=True)
    remaining = iter(vectors)
    basis = partwise(lambda _: next(remaining), factor, batched=batched)
    return (values[0] if len(values) == 1 else torch.cat(values)), basis


def _decomposed(matrix: Tensor) -> tuple[Tensor, Tensor] | None:
    for dtype in dict.fromkeys((matrix.dtype, torch.float64)):
        try:
            values, vectors = torch.linalg.eigh(matrix.to(dtype))
        except RuntimeError:  # did not converge
            continue
        if bool(vectors.isfinite().all()):
            return values.clamp_min(0).to(matrix), vectors.to(matrix)
    return None


def _transposed(q: Tensor, batched: bool) -> Tensor:
    return q if is_diagonal(q, batched) else partwise(lambda part: part.mT, q, batched=batched)
