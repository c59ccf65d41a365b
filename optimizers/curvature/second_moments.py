"""Second moments of a Jacobian's columns in a Kronecker-factored basis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_curv.optimizers.curvature.weight_and_bias import outputs_first
from lightning_curv.optimizers.linear_algebra.factors import is_diagonal, parts_of, rows
from lightning_curv.terms.jacobian import Jacobian
from lightning_curv.terms.sides import as_matrix, interleaved, kronecker_sides


def second_moments(
    jacobians: Sequence[Jacobian],
    basis: Sequence[Tensor],
    batched: bool,
    center: Sequence[Tensor] = (),
) -> Tensor:
    r"""The second moments $\sum_{v,n} (Q^\top J_{vn})^2$ with $Q = \bigotimes_i Q_i$.

    A Jacobian is a sum of outer products of cotangents and inputs: they are rotated instead of it.
    Where no positions are shared the result is one product of their squares.

    Args:
        jacobians: of a parameter, or of weight and bias that share a block.
        basis: orthogonal factors, ones [d_i] for the identity; all with a leading [G] if `batched`.
        batched: whether there is a leading group dimension.
        center: of the inputs, see `weight_and_bias`.

    Returns:
        [d_1, …, d_k], or [G, d_1, …, d_k] if batched.
    """
    weight, *bias = jacobians
    # Without rotation, or of several uses, the moments are those of the weight as it is.
    is_plain = len(weight.terms) > 1 or all(is_diagonal(q, batched) for q in basis)
    if is_plain and not bias:
        squares = outputs_first(weight.sum_squares(), interleaved(weight.terms) or ())
    else:
        squares = _rotated(weight, basis, batched, bool(bias), center).sum_squares()
    return squares.reshape(_sizes(basis, batched))


def _sizes(basis: Sequence[Tensor], batched: bool) -> list[int]:
    """The sizes d_1, …, d_k of a basis, behind the number of groups if batched."""
    groups = [len(basis[0])] if batched else []
    return [*groups, *(rows(q, batched) for q in basis)]


def _rotated(
    jacobian: Jacobian,
    basis: Sequence[Tensor],
    batched: bool,
    ones: bool,
    center: Sequence[Tensor],
) -> Jacobian:
    """The Jacobian of a single use in the coordinates of a basis.

    Args:
        jacobian: of a weight.
        basis: orthogonal factors, see `second_moments`.
        batched: whether there is a leading group dimension.
        ones: whether a 1 is appended to the inputs, for the bias.
        center: what is subtracted from the inputs before.
    """
    sides = kronecker_sides(jacobian.terms)
    term = as_matrix(jacobian.terms[0], sides)
    x = term.x
    if x is not None and ones:
        for mean in center:
            x = x - mean.to(x)
        x = torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1)
    rotations = dict(zip(sides, basis, strict=True))
    g = _applied(rotations["outputs"], term.g, batched)
    # The factor of inputs that are classes is diagonal: they stay numbers of classes.
    if x is not None and not term.classes:
        x = _applied(rotations["inputs"], x, batched)
    # Only the shape of the parameter matters from here on: no memory for its values.
    shape_of_parameter = g.new_zeros(1).expand(_sizes(basis, batched))
    return Jacobian(shape_of_parameter, [replace(term, g=g, x=x)], jacobian.signs)


def _applied(q: Tensor, v: Tensor, batched: bool) -> Tensor:
    """The product Qᵀ v along the last axis."""
    if is_diagonal(q, batched):
        return v
    parts = parts_of(q, batched)
    columns = v.split([part.shape[-1] for part in parts], dim=-1)
    rotated = [
        torch.einsum("...qi,qij->...qj", column, part) if batched else column @ part
        for column, part in zip(columns, parts, strict=True)
    ]
    return torch.cat(rotated, dim=-1)
