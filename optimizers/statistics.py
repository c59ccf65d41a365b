"""Kronecker factors of a block from the Jacobians of its parameters."""

from collections.abc import Sequence

from torch import Tensor

from lightning_curv.extensions import KFLR
from lightning_curv.jacobian import Jacobian

from .positions import subsampled


def kronecker_factors(jacobians: Sequence[Jacobian], sharing: KFLR, positions: int | None, seed: int) -> list[Tensor]:
    r"""Factors of a parameter's block, or of the joint block of weight and bias.

    Weight $W$ and bias $b$ are the matrix $[W \; b]$ that acts on $(a, 1)$; its block is $B \otimes A'$ with

    $$A' = \begin{pmatrix} A & \bar a \\ \bar a^\top & 1 \end{pmatrix}, \qquad \bar a = \mathrm{mean}(a).$$

    Args:
        jacobians: of the parameter, or of weight and bias.
        sharing: makes the factors of one parameter; expand or reduce.
        positions: of a convolution to use, in expectation exact; None: all. All are used for "reduce", which sums
            over them before squaring.
        seed: of the positions.

    Returns:
        [F_1, …, F_k], see `lightning_curv.extensions.KFLR`.

    Source: J. Martens, R. Grosse, *Optimizing Neural Networks with Kronecker-factored Approximate Curvature*,
    ICML 2015, section 2.1 (homogeneous coordinates).
    """
    weight, *bias = jacobians
    if positions is not None and sharing.weight_sharing == "expand":
        weight = subsampled(weight, positions, seed)
    factors = sharing.evaluate(weight)
    if bias:
        factors = [factors[0], with_ones(factors[1], mean_input(weight))]
    return factors


def mean_input(jacobian: Jacobian) -> Tensor:
    """Mean of a weight's inputs over samples and positions, flat."""
    term = jacobian.terms[0]
    assert term.x is not None
    axes = [0, *(1 + i for i, letter in enumerate(term.inp) if letter in term.shared)]
    return term.x.mean(axes).flatten()


def with_ones(second_moment: Tensor, mean: Tensor) -> Tensor:
    """Second moment of the inputs with a 1 appended, [d + 1, d + 1]."""
    size = len(mean)
    result = second_moment.new_ones(size + 1, size + 1)
    result[:size, :size], result[size, :size], result[:size, size] = second_moment, mean, mean
    return result
