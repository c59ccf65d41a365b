"""Second moments of a Jacobian's columns in a Kronecker-factored basis."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_curv.extensions.kronecker import interleaved, kronecker_axes
from lightning_curv.optimizers.curvature.weight_and_bias import outputs_first
from lightning_curv.optimizers.linear_algebra.factors import is_diagonal, parts_of, rows
from lightning_curv.terms.jacobian import Jacobian
from lightning_curv.terms.term import Term


def second_moments(
    jacobians: Sequence[Jacobian],
    basis: Sequence[Tensor],
    batched: bool,
    center: Sequence[Tensor] = (),
) -> Tensor:
    r"""$\sum_{v,n} (Q^\top J_{vn})^2$ with $Q = \bigotimes_i Q_i$, [d_1, …, d_k] or [G, d_1, …, d_k] if batched.

    A Jacobian is a sum of outer products of cotangents and inputs: they are rotated instead of it.
    Where no positions are shared the result is one product of their squares.

    Args:
        jacobians: of a parameter, or of weight and bias that share a block.
        basis: orthogonal factors, ones [d_i] for the identity; all with a leading [G] if `batched`.
        batched: whether there is a leading group dimension.
        center: of the inputs, see `joint`.
    """
    weight, *bias = jacobians
    sizes = [*basis[0].shape[:-1][:batched], *(rows(q, batched) for q in basis)]
    if len(weight.terms) > 1 or all(is_diagonal(q, batched) for q in basis):
        if not bias:
            return outputs_first(weight.sum_squares(), interleaved(weight) or ()).reshape(sizes)
        return _rotated(weight, basis, batched, True, center).sum_squares().reshape(sizes)
    return _rotated(weight, basis, batched, bool(bias), center).sum_squares().reshape(sizes)


def _rotated(
    jacobian: Jacobian, basis: Sequence[Tensor], batched: bool, ones: bool, center: Sequence[Tensor]
) -> Jacobian:
    term = _flat(jacobian.terms[0], kronecker_axes(jacobian))
    x = term.x
    if x is not None and ones:
        for mean in center:
            x = x - mean.to(x)
        x = torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1)
    rotations = dict(zip(term.par.removeprefix("q"), basis, strict=True))
    g = _applied(rotations["o"], term.g, batched)
    if x is not None and not term.classes:
        x = _applied(rotations["i"], x, batched)
    sizes = [*basis[0].shape[:-1][:batched], *(rows(q, batched) for q in basis)]
    return Jacobian(g.new_zeros(1).expand(sizes), [replace(term, g=g, x=x)], jacobian.signs)


def _flat(term: Term, order: str) -> Term:
    """The canonical term with one letter per factor, in this order, and no axis of a single position."""
    q = "q" if "q" in term.par else ""
    term = term.canonical()
    single = "" if term.g.shape[2] == 1 and not term.classes else "s"
    g = term.g.flatten(3 + len(q))
    g = g if single else g.squeeze(2)
    x = term.x
    if x is not None and not term.classes:
        x = x.flatten(2 + len(q))
        x = x if single else x.squeeze(1)
    inp = "" if x is None else single + q + "i"
    return replace(term, out=single + q + "o", inp=inp, par=q + order, g=g, x=x)


def _applied(q: Tensor, v: Tensor, batched: bool) -> Tensor:
    """Qᵀ v along the last axis."""
    if is_diagonal(q, batched):
        return v
    if batched:
        return torch.einsum("...qi,qij->...qj", v, q)
    parts = parts_of(q, batched)
    columns = v.split([len(part) for part in parts], dim=-1)
    return torch.cat([column @ part for column, part in zip(columns, parts, strict=True)], dim=-1)
