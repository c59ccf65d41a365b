r"""Kronecker factors of the GGN block of each parameter.

For a matrix W with outputs `o` and inputs `i` the block is approximated by $B \otimes A$
(row-major order of W): A is the second moment of the layer's inputs, B that of the backpropagated
columns; B carries the scale of the loss. The approximation is exact for one sample without weight
sharing.

Where weights are shared over positions s (pixels, time steps, several uses of a layer),
Eschenhagen, Immer, Turner, Schneider & Hennig, *Kronecker-factored approximate curvature for modern
neural network architectures*, NeurIPS 2023, distinguish

$$\begin{aligned}
  \text{expand:}\quad & A = \tfrac{1}{NS} \sum_{n,s} a_{ns} a_{ns}^\top, &
  B &= \sum_{v,n,s} g_{vns} g_{vns}^\top \\
  \text{reduce:}\quad & A = \tfrac1N \sum_n \bar a_n \bar a_n^\top, &
  B &= \sum_{v,n} \hat g_{vn} \hat g_{vn}^\top,
\end{aligned}$$

with $\bar a_n$ the mean and $\hat g_{vn}$ the sum over the positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from lightning_curv.extensions.base import ExactGGN, Extension, MonteCarloGGN, Source
from lightning_curv.kernels.memo import LastResult
from lightning_curv.kernels.symmetric import gram
from lightning_curv.terms import one_hot
from lightning_curv.terms.chunks import CHUNK_BYTES
from lightning_curv.terms.jacobian import Jacobian
from lightning_curv.terms.sides import Side, SideName, kronecker_sides, side_of
from lightning_curv.terms.term import Term

WeightSharing = Literal["expand", "reduce"]
Product = Callable[[Tensor], Tensor]
_LATEST: dict[SideName, LastResult] = {"outputs": LastResult(), "inputs": LastResult()}


class KFLR(Extension):
    r"""Kronecker factors from the exact GGN columns, in `kflr`.

    They are a list, in row-major order of the parameter; B carries the scale of the loss. Linear
    and convolution weight: `[B, A]` of shapes `[out, out]` and `[in/groups·K, in/groups·K]`;
    with groups `[G, out/G, out/G]` and `[G, in/G·K, in/G·K]`. A weight used as `x @ W`:
    `[A, B]`. Transposed convolution: `[B, A]` of the weight with outputs in front,
    `W.transpose(0, 1)`, of shapes `[out/groups, out/groups]` and
    `[in/groups·K, in/groups·K]`; its positions are the pixels of the output, each of which sees
    one patch of the input with `stride - 1` zeros between its pixels (BackPACK's layout). Experts
    of a grouped product: as groups, A is the mean over the rows of all experts. Bias: `[B]`.
    Recurrent weights: `[B, A]`, the steps are positions. A factor with one axis is a diagonal
    matrix: `[counts/(N·S), B]` for an embedding (with `"reduce"` the diagonal of A),
    `[diagonal of the GGN]` for every parameter without Kronecker structure (norm scales, offsets,
    parameters used by ops of different kinds, such as an embedding that is also the output
    projection).

    In training mode BatchNorm couples the samples; the factors then take its batch statistics as
    given, as all implementations do.

    Botev, Ritter & Barber, *Practical Gauss-Newton optimisation for deep learning*, ICML 2017
    (KFLR). Cost: one backward pass per output entry of a sample, and one product per layer and
    pass.

    Args:
        weight_sharing: `"expand"` or `"reduce"`: whether positions that share the weight count
            as samples, or are averaged before the products.

    Raises:
        ValueError: `weight_sharing` is neither.

    Example:
        >>> import torch
        >>> from lightning_curv import KFLR, curvature
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> with curvature(KFLR()):
        ...     output = layer(torch.tensor([[1.0, 2.0]]))
        ...     torch.nn.functional.mse_loss(output, torch.zeros(1, 1)).backward()
        >>> B, A = layer.weight.kflr
        >>> torch.kron(B, A).round(decimals=4)  # exact for one sample: 2 x xᵀ
        tensor([[2., 4.],
                [4., 8.]])
    """

    savefield = "kflr"
    source: Source = ExactGGN()
    independent = False

    def __init__(self, weight_sharing: WeightSharing = "expand") -> None:
        if weight_sharing not in ("expand", "reduce"):
            raise ValueError(
                f"`weight_sharing` must be 'expand' or 'reduce', found {weight_sharing!r}."
            )
        self.weight_sharing = weight_sharing

    def evaluate(self, jacobian: Jacobian) -> list[Tensor]:
        """Make the factors of the parameter's block, in the order of its axes."""
        sides = kronecker_sides(jacobian.terms)
        if not sides:
            return [jacobian.sum_squares().flatten()]
        term = jacobian.terms[0]
        factors = []
        for side in sides:
            # The inputs' factor stays that of the first columns: `merge` does not look at this one.
            known = side == "inputs" and jacobian.continues
            factors.append(term.g if known else self._factor(term, side))
        return factors

    def _factor(self, term: Term, name: SideName) -> Tensor:
        """Make one factor, or copy it from the parameter that has the same, such as the bias."""
        side = side_of(term, name)
        result, known = _LATEST[name].get_or_compute(
            side.tensor,
            (*side.layout, self.weight_sharing),
            lambda: kronecker_factor(term, name, self.weight_sharing),
        )
        # Each parameter owns its factors, since they are added to in place.
        return result.clone() if known else result

    def merge(
        self,
        previous: list[Tensor],
        new: list[Tensor],
        jacobian: Jacobian,
    ) -> list[Tensor]:
        """Add the factors of the columns; that of the inputs depends on no column and stays."""
        sides = kronecker_sides(jacobian.terms) or ("outputs",)
        factors = []
        for side, before, added in zip(sides, previous, new, strict=True):
            factors.append(before if side == "inputs" else before + added)
        return factors


class KFAC(KFLR):
    """Kronecker factors from targets drawn from the model, in `kfac`; factors as in `KFLR`.

    Martens & Grosse, *Optimizing neural networks with Kronecker-factored approximate curvature*,
    ICML 2015; Grosse & Martens, *A Kronecker-factored approximate Fisher matrix for convolution
    layers*, ICML 2016.

    Args:
        mc_samples: Number of target draws; each costs one backward pass.
        weight_sharing: `"expand"` or `"reduce"`, as in `KFLR`.

    Raises:
        ValueError: `weight_sharing` is neither, or `mc_samples` is not positive.

    Example:
        >>> import torch
        >>> from lightning_curv import KFAC, curvature
        >>> layer = torch.nn.Linear(2, 3)
        >>> with curvature(KFAC()):
        ...     output = layer(torch.ones(5, 2))
        ...     torch.nn.functional.cross_entropy(output, torch.tensor([0, 1, 2, 0, 1])).backward()
        >>> [factor.shape for factor in layer.weight.kfac]
        [torch.Size([3, 3]), torch.Size([2, 2])]
    """

    savefield = "kfac"

    def __init__(self, mc_samples: int = 1, weight_sharing: WeightSharing = "expand") -> None:
        super().__init__(weight_sharing)
        self.source = MonteCarloGGN(mc_samples)


def kronecker_factor(
    term: Term,
    side: SideName,
    weight_sharing: WeightSharing,
    product: Product = gram,
) -> Tensor:
    """One factor of the term's block.

    Args:
        term: The only term of a Jacobian.
        side: Whose factor it is.
        weight_sharing: `"expand"` or `"reduce"`.
        product: Makes x xᵀ, or a part of it, of `x [D, R]`; not used with one-hot inputs.
    """
    make = _output_factor if side == "outputs" else _input_factor
    return make(term, weight_sharing, product)


def _output_factor(
    term: Term,
    weight_sharing: WeightSharing,
    product: Product,
) -> Tensor:
    """B: the sum over columns, samples and positions, `[(q), o, o]`."""
    outputs = side_of(term, "outputs")
    samples_first = replace(outputs, tensor=term.g.transpose(0, 1))
    return _second_moment(samples_first, weight_sharing, product)


def _input_factor(
    term: Term,
    weight_sharing: WeightSharing,
    product: Product,
) -> Tensor:
    """A: the mean over samples and positions, `[(q), i, i]`."""
    assert term.x is not None
    if term.classes:
        return one_hot.second_moment(term, weight_sharing == "reduce")
    if term.lengths is not None:
        return _ragged_input_factor(term, term.lengths.to(term.x.device), weight_sharing, product)
    inputs = side_of(term, "inputs")
    samples = max(1, len(term.x))
    positions = max(1, math.prod(term.x.shape[axis] for axis in inputs.positions))
    total = _second_moment(inputs, weight_sharing, product)
    # "reduce" has summed the positions, where it needs the product of two means over them.
    power = 2 if weight_sharing == "reduce" else 1
    return total.div_(samples * positions**power)


def _ragged_input_factor(
    term: Term,
    lengths: Tensor,
    weight_sharing: WeightSharing,
    product: Product,
) -> Tensor:
    """A for samples with different numbers of positions; a sample without any counts as zero."""
    assert term.x is not None
    x = term.x
    count = lengths.sum()
    if weight_sharing == "reduce":
        # The mean over a sample's own positions; what is filled up behind them is zero.
        own_lengths = lengths.clamp(min=1).to(x.dtype)
        x = x / own_lengths.reshape(-1, *[1] * (x.ndim - 1))
        count = torch.tensor(len(x))
    inputs = replace(side_of(term, "inputs"), tensor=x)
    total = _second_moment(inputs, weight_sharing, product)
    return total.div_(count.clamp(min=1).to(total.device))


def _second_moment(
    side: Side,
    weight_sharing: WeightSharing,
    product: Product,
) -> Tensor:
    """Sum of the outer products of the features, in chunks of samples.

    Args:
        side: Its tensor has the samples in front.
        weight_sharing: `"expand"`: one vector of features per position; `"reduce"`: their sum
            over the positions.
        product: Of a matrix with itself, `[D, R]`.
    """
    factor = side.tensor
    # A factor that is expanded over the samples is the same for all of them: it is worked on once.
    if len(factor) > 1 and factor.stride(0) == 0:
        repeats = len(factor)
    else:
        repeats = 1
    factor = factor[: len(factor) // repeats]
    groups = side.groups
    features = side.features
    positions = side.positions
    summed = [*range(side.lead), *positions]
    if weight_sharing == "expand":
        # In the order of memory they are one axis, so that the reshape below need not copy.
        strides = factor.stride()
        summed.sort(key=lambda axis: -strides[axis])
    order = [*groups, *features, *summed]
    width = math.prod(factor.shape[axis] for axis in features)
    sample_bytes = math.prod(factor.shape[1:]) * factor.element_size()
    chunk = max(1, CHUNK_BYTES // max(1, sample_bytes))
    total = None
    for start in range(0, max(1, len(factor)), chunk):
        rows = factor[start : start + chunk].permute(order)
        if weight_sharing == "reduce" and positions:
            rows = rows.sum(list(range(-len(positions), 0)))
        number = rows.shape[0] if groups else 1
        vectors = rows.numel() // max(1, number * width)
        matrices = rows.reshape(number, width, vectors)
        if groups:
            moment = torch.stack([product(matrix) for matrix in matrices])
        else:
            moment = product(matrices[0])
        total = moment if total is None else total.add_(moment)
    assert total is not None
    return total if repeats == 1 else total * repeats
