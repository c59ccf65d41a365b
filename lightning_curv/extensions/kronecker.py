r"""Kronecker factors of the GGN block of each parameter.

For a matrix W with outputs ``o`` and inputs ``i`` the block is approximated by :math:`B \otimes A`
(row-major order of W): A is the second moment of the layer's inputs, B that of the backpropagated
columns; B carries the scale of the loss. The approximation is exact for one sample without weight
sharing.

Where weights are shared over positions s (pixels, time steps, several uses of a layer),
Eschenhagen, Immer, Turner, Schneider & Hennig, *Kronecker-factored approximate curvature for modern
neural network architectures*, NeurIPS 2023, distinguish

.. math::
    \text{expand:}\quad & A = \tfrac{1}{NS} \sum_{n,s} a_{ns} a_{ns}^\top, & B &= \sum_{v,n,s}
    g_{vns} g_{vns}^\top \\ \text{reduce:}\quad & A = \tfrac1N \sum_n \bar a_n \bar a_n^\top, & B &=
    \sum_{v,n} \hat g_{vn} \hat g_{vn}^\top,

with :math:`\bar a_n` the mean and :math:`\hat g_{vn}` the sum over the positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lightning_curv.extensions.base import Exact, Extension, Sampled, Source
from lightning_curv.kernels.memo import Latest
from lightning_curv.kernels.symmetric import gram
from lightning_curv.terms import one_hot
from lightning_curv.terms.chunks import CHUNK_BYTES
from lightning_curv.terms.jacobian import Jacobian
from lightning_curv.terms.term import Term

WeightSharing = Literal["expand", "reduce"]
Product = Callable[[Tensor], Tensor]
KRONECKER = (
    "oixyz"  # letters of matrix axes; x y z belong to the patches of the input or of the output
)
_LATEST = {"o": Latest(), "i": Latest()}


class KFLR(Extension):
    r"""Kronecker factors from the exact GGN columns, in ``kflr``.

    A list of factors in row-major order of the parameter. Linear and convolution weight: ``[B, A]``
    of shapes ``[out, out]`` and ``[in/groups·K, in/groups·K]``; with groups ``[G, out/G, out/G]``
    and ``[G, in/G·K, in/G·K]``. A weight used as ``x @ W``: ``[A, B]``. Transposed convolution:
    ``[B, A]`` of the weight with outputs in front, ``W.transpose(0, 1)``, of shapes
    ``[out/groups, out/groups]`` and ``[in/groups·K, in/groups·K]``; its positions are the pixels of
    the output, each of which sees one patch of the input with ``stride - 1`` zeros between its
    pixels (BackPACK's layout). Experts of a grouped product: as groups, A is the mean over the rows
    of all experts. Bias: ``[B]``. Recurrent weights: ``[B, A]``, the steps are positions. A factor
    with one axis is a diagonal matrix: ``[counts/(N·S), B]`` for an embedding (with ``"reduce"``
    the diagonal of A), ``[diagonal of the GGN]`` for every parameter without Kronecker structure
    (norm scales, offsets, parameters used by ops of different kinds, such as an embedding that is
    also the output projection).

    In training mode BatchNorm couples the samples; the factors then take its batch statistics as
    given, as all implementations do.

    Botev, Ritter & Barber, *Practical Gauss-Newton optimisation for deep learning*, ICML 2017
    (KFLR).

    Args:
        weight_sharing: ``"expand"`` or ``"reduce"``, see above.
    """

    savefield = "kflr"
    source: Source = Exact()
    independent = False

    def __init__(self, weight_sharing: WeightSharing = "expand") -> None:
        if weight_sharing not in ("expand", "reduce"):
            raise ValueError(
                f"`weight_sharing` must be 'expand' or 'reduce', found {weight_sharing!r}."
            )
        self.weight_sharing = weight_sharing

    def evaluate(self, jacobian: Jacobian) -> list[Tensor]:
        """The factors of the parameter's block, in the order of its axes."""
        axes = kronecker_axes(jacobian)
        if not axes:
            return [jacobian.sum_squares().flatten()]
        known = (
            "i" if jacobian.continues else ""
        )  # the inputs' factor stays that of the first columns, see `merge`
        term = jacobian.terms[0]
        return [term.g if axis in known else self._factor(term, axis) for axis in axes]

    def _factor(self, term: Term, axis: str) -> Tensor:
        factor, letters = (term.g, term.out) if axis == "o" else (term.x, term.inp)
        assert factor is not None
        key = letters, *(x for x in letters if x not in term.par), self.weight_sharing, term.classes
        result, known = _LATEST[axis].of(
            factor, key, lambda: kronecker_factor(term, axis, self.weight_sharing)
        )
        return result.clone() if known else result

    def merge(self, previous: list[Tensor], new: list[Tensor], jacobian: Jacobian) -> list[Tensor]:
        """The factors of the columns add up, that of the inputs stays."""
        axes = kronecker_axes(jacobian) or "o"
        return [a if axis == "i" else a + b for axis, a, b in zip(axes, previous, new, strict=True)]


class KFAC(KFLR):
    """Kronecker factors from targets drawn from the model, in ``kfac``; factors as in `KFLR`.

    Martens & Grosse, *Optimizing neural networks with Kronecker-factored approximate curvature*,
    ICML 2015; Grosse & Martens, *A Kronecker-factored approximate Fisher matrix for convolution
    layers*, ICML 2016.

    Args:
        mc_samples: Number of target draws; each costs one backward pass.
        weight_sharing: ``"expand"`` or ``"reduce"``.
    """

    savefield = "kfac"

    def __init__(self, mc_samples: int = 1, weight_sharing: WeightSharing = "expand") -> None:
        super().__init__(weight_sharing)
        self.source = Sampled(mc_samples)


def kronecker_axes(jacobian: Jacobian) -> str:
    """The factors of the block, ``o`` and ``i`` in the order of the parameter's axes; empty: no Kronecker structure.

    Outputs are first where they are in between the inputs, see `interleaved`.
    """
    term = jacobian.terms[0]
    if len(jacobian.terms) > 1 or any(letter not in "q" + KRONECKER for letter in term.par):
        return ""
    par = term.par.removeprefix("q")
    out, inp = (
        "".join(letter for letter in letters if letter in par) for letters in (term.out, term.inp)
    )
    orders = (
        {out + inp: "oi", inp[:1] + out + inp[1:]: "oi", inp + out: "io"} if inp else {out: "o"}
    )
    return orders.get(par, "") if par else ""


def interleaved(jacobian: Jacobian) -> tuple[int, int] | None:
    """Groups, and inputs per group, of a weight whose factors are those of it with its first two axes swapped.

    That is the weight of a transposed convolution, ``[in, out/groups, *kernel]``.
    """
    term, axes = jacobian.terms[0], kronecker_axes(jacobian)
    par = "".join("o" if letter in term.out else "i" for letter in term.par.removeprefix("q"))
    if axes != "oi" or par[0] == "o" or par[-1] == "o":
        return None
    sizes = term.sizes()
    return sizes.get("q", 1), sizes[term.par.removeprefix("q")[0]]


def kronecker_factor(
    term: Term, axis: str, weight_sharing: WeightSharing, product: Product = gram
) -> Tensor:
    """One factor of the term's block.

    Args:
        term: The only term of a Jacobian.
        axis: ``o`` for the factor of the outputs, ``i`` for that of the inputs.
        weight_sharing: ``"expand"`` or ``"reduce"``.
        product: Makes x xᵀ, or a part of it, of ``x [D, R]``; not used with one-hot inputs.
    """
    factor = {"o": _output_factor, "i": _input_factor}[axis]
    return factor(term, weight_sharing, product)


def _output_factor(term: Term, weight_sharing: WeightSharing, product: Product) -> Tensor:
    """Sum over columns, samples and positions, ``[(q), o, o]``."""
    return _second_moment(term.g.transpose(0, 1), term.out, term.par, weight_sharing, product)


def _input_factor(term: Term, weight_sharing: WeightSharing, product: Product) -> Tensor:
    """Mean over samples and positions, ``[(q), i, i]``."""
    assert term.x is not None
    if term.classes:
        return one_hot.second_moment(term, weight_sharing == "reduce")
    sizes = term.sizes()
    positions = max(1, math.prod(sizes[letter] for letter in term.inp if letter not in term.par))
    if term.lengths is not None:
        return _ragged_input_factor(term, term.lengths.to(term.x.device), weight_sharing, product)
    total = _second_moment(term.x, term.inp, term.par, weight_sharing, product)
    return total.div_(max(1, len(term.x)) * positions ** (2 if weight_sharing == "reduce" else 1))


def _ragged_input_factor(
    term: Term, lengths: Tensor, weight_sharing: WeightSharing, product: Product
) -> Tensor:
    """The same for samples with different numbers of positions; a sample without any counts as zero."""
    assert term.x is not None
    x, count = term.x, lengths.sum()
    if weight_sharing == "reduce":
        x = x / lengths.clamp(min=1).to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        count = torch.tensor(len(x))
    total = _second_moment(x, term.inp, term.par, weight_sharing, product)
    return total.div_(count.clamp(min=1).to(total.device))


def _second_moment(
    factor: Tensor, letters: str, par: str, weight_sharing: WeightSharing, product: Product
) -> Tensor:
    """Sum of the outer products of the features, in chunks of samples.

    Args:
        factor: ``[N, …, *letters]``.
        letters: Of the trailing axes; features are those that the parameter has.
        par: Letters of the parameter.
        weight_sharing: ``"expand"``: one vector of features per position; ``"reduce"``: their sum
            over the positions.
        product: Of a matrix with itself, ``[D, R]``.
    """
    repeats = len(factor) if len(factor) > 1 and factor.stride(0) == 0 else 1
    factor = factor[: len(factor) // repeats]  # the same for all samples: once
    lead = factor.ndim - len(letters)
    groups = "q" if "q" in letters else ""
    features = [lead + letters.index(x) for x in letters if x in par and x != "q"]
    positions = [lead + letters.index(x) for x in letters if x not in par]
    summed = [*range(lead), *positions]
    if weight_sharing == "expand":  # in the order of memory, where they are one axis
        strides = factor.stride()
        summed.sort(key=lambda axis: -strides[axis])
    order = [*(lead + letters.index(x) for x in groups), *features, *summed]
    size = max(1, CHUNK_BYTES // max(1, math.prod(factor.shape[1:]) * factor.element_size()))
    total = None
    for start in range(0, max(1, len(factor)), size):
        rows = factor[start : start + size].permute(order)
        if weight_sharing == "reduce" and positions:
            rows = rows.sum(list(range(-len(positions), 0)))
        shape = (rows.shape[0] if groups else 1, math.prod(factor.shape[axis] for axis in features))
        rows = rows.reshape(*shape, rows.numel() // max(1, math.prod(shape)))
        moment = torch.stack([product(matrix) for matrix in rows]) if groups else product(rows[0])
        total = moment if total is None else total.add_(moment)
    assert total is not None
    return total if repeats == 1 else total * repeats
