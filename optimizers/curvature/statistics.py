"""Kronecker factors of a block from the Jacobians of its parameters."""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_curv.extensions import KFLR
from lightning_curv.extensions.kronecker import interleaved, kronecker_axes, kronecker_factor
from lightning_curv.optimizers.curvature.positions import subsampled
from lightning_curv.optimizers.linear_algebra.factors import part_size, parts_of, split_gram
from lightning_curv.terms.jacobian import Jacobian
from lightning_curv.terms.term import Term


def kronecker_factors(
    jacobians: Sequence[Jacobian],
    sharing: KFLR,
    positions: int | None,
    seed: int,
    split: int | None = None,
) -> list[Tensor]:
    r"""Factors of a parameter's block, or of the joint block of weight and bias.

    Weight $W$ and bias $b$ are the matrix $[W \; b]$ that acts on $(a, 1)$; its block is
    $B \otimes A'$ with

    $$A' = \begin{pmatrix} A & \bar a \\ \bar a^\top & 1 \end{pmatrix}, \qquad \bar a = \mathrm{mean}(a).$$

    Args:
        jacobians: of the parameter, or of weight and bias.
        sharing: makes the factors of one parameter; expand or reduce.
        positions: of a convolution to use, in expectation exact; None: all. All are used for
            "reduce", which sums over them before squaring.
        seed: of the positions.
        split: rows of the diagonal blocks, about, that larger factors are split into.

    Returns:
        [F_1, …, F_k], see `lightning_curv.extensions.KFLR` and `factors`. Behind them, if $A'$ is
        split, $\bar a$; if the factors are those of a weight with outputs in front, its groups and
        inputs per group, [2], see `joint`.

    Source: J. Martens, R. Grosse, *Optimizing Neural Networks with Kronecker-factored Approximate
        Curvature*,
    ICML 2015, section 2.1 (homogeneous coordinates).
    """
    weight, *bias = jacobians
    if positions is not None and sharing.weight_sharing == "expand":
        weight = subsampled(weight, positions, seed)
    axes = kronecker_axes(weight) if split else ""
    if not split or not axes:
        factors = sharing.evaluate(weight)
    else:
        term = weight.terms[0]
        sizes = [_size(term, axis) + (axis == "i" and bool(bias)) for axis in axes]
        products = [partial(split_gram, size=part_size(size, split)) for size in sizes]
        factors = [
            kronecker_factor(term, axis, sharing.weight_sharing, product)
            for axis, product in zip(axes, products, strict=True)
        ]
    if not bias:
        layout = interleaved(weight)
        return (
            [*factors, torch.tensor(layout, dtype=factors[0].dtype, device=factors[0].device)]
            if layout
            else factors
        )
    outputs, inputs, mean = *factors, mean_input(weight)
    split_mean = [] if inputs.shape[0] == inputs.shape[1] else [mean]
    return [outputs, with_ones(inputs, mean), *split_mean]


def _size(term: Term, axis: str) -> int:
    letters = (term.out if axis == "o" else term.inp).replace("q", "")
    sizes = term.sizes()
    return math.prod(sizes[letter] for letter in letters if letter in term.par)


def mean_input(jacobian: Jacobian) -> Tensor:
    """Mean of a weight's inputs over samples and positions, flat."""
    term = jacobian.terms[0]
    assert term.x is not None
    axes = [0, *(1 + i for i, letter in enumerate(term.inp) if letter in term.shared)]
    if term.lengths is None:
        return term.x.mean(axes).flatten()
    return (term.x.sum(axes) / term.lengths.sum().clamp(min=1).to(term.x.device)).flatten()


def with_ones(second_moment: Tensor, mean: Tensor) -> Tensor:
    """Second moment of the inputs with a 1 appended, [d + 1, d + 1], or [d + 1, s] if it is split."""
    size, columns = second_moment.shape
    full = columns == size
    result = second_moment.new_zeros(size + 1, columns + full)
    result[:size, :columns] = second_moment
    last = parts_of(result, False)[-1]
    last[-1, :-1] = last[:-1, -1] = mean[size + 1 - len(last) :]
    last[-1, -1] = 1.0
    return result
