r"""Terms: per-sample Jacobian-vector products as contractions that are not carried out.

Ops are affine in each parameter, so the derivative of a backpropagated column `v` and sample
`n` by a parameter is

$$J[v, n, *par] = \sum_{\text{letters not in } v, n, par} g[v, n, *out]\; x[n, *inp],$$

with the cotangents `g` at the op's output and the recorded input `x`. A `Term` keeps `g`,
`x` and one letter per axis. Letters have a meaning that every quantity relies on:

`v` column, `n` sample, `r s t u` shared positions (never in `par`), `q` group, `o` and
`i x y z` output and input features (a Kronecker factor each), `d` and all later letters of
`DIAGONAL` diagonal features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor

from lightning_curv.kernels import huge_pages
from lightning_curv.kernels.memo import LastResult
from lightning_curv.kernels.onednn import einsum, is_large, mm
from lightning_curv.terms.safe_norms import product_norms, row_norms
from lightning_curv.terms.squares import squared_sizes, squares_of_columns

DIAGONAL = "defghjklm"
SHARED = "rstu"
KERNEL = "xyz"
GROUP = "q"
CHUNK_BYTES = 2**25  # of products that are added up at once
# What was computed of the cotangents that a weight and its bias share.
_SQUARES = LastResult()
_NORMS = LastResult()
_ROW_NORMS = LastResult()
# Rounding of a squared norm and of a weighted sum together, in machine epsilons of the squared sum
# of what is added up.
ROUNDING = 2.0  # measured: at most 1.5 + 0.4 (two positions), less for more of them


def flatten_shared(tensor: Tensor, start: int, stop: int) -> Tensor:
    """The axes `start` to `stop` (excluded) as one axis; no such axes: unchanged."""
    shape = tensor.shape
    stop = stop % tensor.ndim
    if stop <= start:
        return tensor
    return tensor.reshape(*shape[:start], math.prod(shape[start:stop]), *shape[stop:])


@cache
def shared_letters(out: str, inp: str, par: str) -> str:
    """The letters of a term that its contraction sums over."""
    return "".join(dict.fromkeys(letter for letter in out + inp if letter not in par))


@dataclass(frozen=True)
class Adjoint:
    """An op's own way from cotangents to gradients, where it is faster than a contraction.

    Attributes:
        x: The inputs of the term that it is made for; a term with others (squared) must not use it.
            Nor must one with another order or other sizes of the parameter's axes: it has none.
        input: The op's own input, `[N, *]`.
        gradient: From cotangents `[N, *out]` and inputs to the sum over the samples, in the
            parameter's memory order.
        gradients: The same without the sum, `[N, *]`; `None`: not faster.
    """

    x: Tensor
    input: Tensor
    gradient: Callable[[Tensor, Tensor], Tensor]
    gradients: Callable[[Tensor, Tensor], Tensor] | None = None


# Some are made for every use of every parameter: a frozen one takes five times as long.
@dataclass(slots=True, eq=False)
class Term:
    """The contribution of one use of a parameter to its per-sample Jacobian. Nobody changes it.

    Example:
        >>> g, x = torch.ones(1, 2, 1), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> term = Term("o", "i", "oi", g, x)  # of the weight in F.linear(x, weight)
        >>> term.contract("voi")  # the sum over the samples
        tensor([[[4., 6.]]])
        >>> term.squared_norms()  # one per column and sample
        tensor([[ 5., 25.]])

    Attributes:
        out: Letters of `g` behind `v n`.
        inp: Letters of `x` behind `n`.
        par: Letters of the parameter in the order of its memory; several letters may make up one
            axis.
        g: Cotangents, `[V, N, *out]`; carry the scale of the loss.
        x: Inputs, `[N, *inp]`; `None` stands for ones. With `classes`, indices that stand for
            their one-hot rows (negative: a row of zeros), `[N, *inp without i]`.
        classes: Number of classes of one-hot inputs (`i`), else 0.
        adjoint: The op's own gradient, if it has one.
        lengths: The number of shared positions of every sample, `[N]`, where they differ: what
            follows them in `g` and `x` is filled up with zeros.
    """

    out: str
    inp: str
    par: str
    g: Tensor
    x: Tensor | None = None
    classes: int = 0
    adjoint: Adjoint | None = None
    lengths: Tensor | None = None

    @property
    def shared(self) -> str:
        """The letters that the contraction sums over."""
        return shared_letters(self.out, self.inp, self.par)

    def sizes(self) -> dict[str, int]:
        """Look the sizes of the axes up.

        Returns:
            The number of entries along the axis of every letter.
        """
        output_sizes = self.g.shape[2:]
        sizes = dict(zip(self.out, output_sizes, strict=True))
        if self.x is not None:
            # Indices have no axis of classes: it is the one that they stand for.
            if self.classes:
                letters = self.inp.replace("i", "")
            else:
                letters = self.inp
            input_sizes = self.x.shape[1:]
            sizes.update(zip(letters, input_sizes, strict=True))
        if self.classes:
            sizes["i"] = self.classes
        return sizes

    @property
    def positions(self) -> int:
        """The number of shared positions of a sample."""
        sizes = self.sizes()
        return math.prod(sizes[letter] for letter in self.shared)

    @property
    def is_weight(self) -> bool:
        """Whether the parameter is a matrix of one group, outputs first, perhaps with a kernel."""
        return self.x is not None and not self.classes and self.par.startswith("oi")

    @property
    def is_bias(self) -> bool:
        """Whether the derivative by the parameter is the cotangents themselves."""
        return self.x is None and self.par == "o"

    @property
    def has_kernel(self) -> bool:
        """Whether the parameter has the axes of a convolution's kernel."""
        return any(letter in KERNEL for letter in self.par)

    def at_positions(self, chosen: Tensor) -> Term:
        """Take some of the shared positions, which are gathered from a view of the input.

        Args:
            chosen: Their numbers, row-major, `[P]`.

        Returns:
            The term of these positions, with one shared letter `s`.
        """
        assert self.x is not None
        sizes = self.sizes()
        shared = [letter for letter in self.out if letter in self.shared]
        indices = torch.unravel_index(chosen, [sizes[letter] for letter in shared])
        # The shared axes are moved behind those of column and sample, and indexed together.
        g_axes = [2 + self.out.index(letter) for letter in shared]
        x_axes = [1 + self.inp.index(letter) for letter in shared]
        g = self.g.movedim(g_axes, [2 + i for i in range(len(shared))])
        x = self.x.movedim(x_axes, [1 + i for i in range(len(shared))])
        samples = (slice(None),)
        columns_and_samples = (slice(None), slice(None))
        out = "s" + "".join(letter for letter in self.out if letter not in shared)
        inp = "s" + "".join(letter for letter in self.inp if letter not in shared)
        g = g[columns_and_samples + indices]
        x = x[samples + indices]
        return replace(self, out=out, inp=inp, g=g, x=x)

    def __getitem__(self, samples: slice | list[int] | Tensor) -> Term:
        g = self.g[:, samples]
        x = None if self.x is None else self.x[samples]
        lengths = None if self.lengths is None else self.lengths[samples]
        own = self.own
        adjoint = self.adjoint
        # An adjoint is told by its inputs: those of some samples are another tensor.
        if own is not None and x is not None:
            adjoint = replace(own, x=x, input=own.input[samples])
        return Term(
            self.out,
            self.inp,
            self.par,
            g,
            x,
            self.classes,
            adjoint,
            lengths,
        )

    def of(self, g: Tensor, x: Tensor | None, adjoint: Adjoint | None = None) -> Term:
        """Make a term of other tensors, in a third of the time of `dataclasses.replace`.

        Args:
            g: Cotangents, `[V, N, *out]`.
            x: Inputs, `[N, *inp]`.
            adjoint: The op's own gradient for them; `None`: that of this term.

        Returns:
            A term with the same letters.
        """
        return Term(
            self.out,
            self.inp,
            self.par,
            g,
            x,
            self.classes,
            adjoint or self.adjoint,
            self.lengths,
        )

    @property
    def own(self) -> Adjoint | None:
        """The adjoint, if it is made for these inputs."""
        adjoint = self.adjoint
        if adjoint is not None and adjoint.x is self.x:
            return adjoint
        return None

    @property
    def own_gradients(self) -> Callable[[], Tensor] | None:
        """The op's own per-sample gradients, `[N, *]`, where no other way is faster."""
        own = self.own
        if own is None or own.gradients is None:
            return None
        one_column = len(self.g) == 1
        if not one_column or not self.g.shape[1]:
            return None
        return partial(own.gradients, self.g[0], own.input)

    def promoted(self) -> Term:
        """Convert the term to float32 or better, with one dtype for `g` and `x`.

        Returns:
            The term; itself if nothing has to be converted.
        """
        dense_x = None if self.classes else self.x
        if self.g.dtype == torch.float32 and (dense_x is None or dense_x.dtype == torch.float32):
            return self
        dtype = torch.promote_types(self.g.dtype, torch.float32)
        x = self.x
        if x is not None and not self.classes:
            dtype = torch.promote_types(dtype, x.dtype)
            x = x.to(dtype)
        if self.g.dtype == dtype and x is self.x:
            return self
        return self.of(self.g.to(dtype), x)

    def canonical(self) -> Term:
        """Bring all shared positions together on one axis.

        Returns:
            The same term with one shared letter `s`, in front.
        """
        # What is not shared keeps its order behind the positions.
        out = "".join(letter for letter in self.out if letter in self.par)
        g = self._positions_first(self.g, self.out, 2)
        if self.x is None:
            out = "s" + out
            return replace(self, out=out, inp="", g=g)
        if self.classes:
            letters = self.inp.replace("i", "")
        else:
            letters = self.inp
        inp = "".join(letter for letter in letters if letter in self.par)
        classes = "i" if self.classes else ""
        x = self._positions_first(self.x, letters, 1)
        return replace(self, out="s" + out, inp="s" + classes + inp, g=g, x=x)

    def _positions_first(self, tensor: Tensor, letters: str, lead: int) -> Tensor:
        """A factor `[*lead, *letters]` with its shared axes as one, in front of the others."""
        shared = [lead + axis for axis, letter in enumerate(letters) if letter in self.shared]
        kept = [lead + axis for axis, letter in enumerate(letters) if letter in self.par]
        ordered = tensor.permute(*range(lead), *shared, *kept)
        if not shared:
            return ordered.unsqueeze(lead)
        return ordered.flatten(lead, lead + len(shared) - 1)

    def contract(self, result: str) -> Tensor:
        """Carry the contraction out; dense inputs only.

        Args:
            result: The letters of the result's axes, of `v n` and `par`; all others are summed.

        Returns:
            `g·x` with one axis per letter.
        """
        if self.x is None:
            letters = "vn" + self.out
            summed = [axis for axis, letter in enumerate(letters) if letter not in result]
            kept = [letter for letter in letters if letter in result]
            total = self.g.sum(summed) if summed else self.g
            if kept == [*result]:
                return total
            return total.permute([kept.index(letter) for letter in result])
        columns = "v" if "v" in result or len(self.g) > 1 else ""
        # Where nothing is summed J is an outer product, and no product of matrices.
        every_letter = {*columns, "n", *self.out, *self.inp}
        if set(result) == every_letter:
            g = self.g if columns else self.g[0]
            g = _placed(g, columns + "n" + self.out, result)
            x = _placed(self.x, "n" + self.inp, result)
            return huge_pages.multiply(g, x)
        # The scale of a norm: both factors have the same axes, so that nothing is multiplied out.
        if {*self.out} == {*self.inp}:
            product = self.g * _placed(self.x, "n" + self.inp, "vn" + self.out)
            return torch.einsum(f"vn{self.out}->{result}", product)
        return einsum(f"vn{self.out},n{self.inp}->{result}", self.g, self.x)

    def add_to(self, total: Tensor) -> None:
        """Add the outer products of the only column to a tensor, without making them.

        Args:
            total: What they are added to in place, `[N, *p]`.
        """
        sizes = self.sizes()
        result = f"n{self.par}"
        total = total.view(len(total), *(sizes[letter] for letter in self.par))
        g = _placed(self.g[0], f"n{self.out}", result)
        if self.x is None:
            total.add_(g)
        else:
            total.addcmul_(g, _placed(self.x, f"n{self.inp}", result))

    def weighted_total(self, weights: Tensor) -> Tensor:
        """Sum the first column over the samples, each times a weight; dense inputs only.

        The weights are multiplied into the smaller factor.

        Args:
            weights: One number per sample, `[N]`.

        Returns:
            The weighted sum, `[*par]`.
        """
        g = self.g[:1]
        x = self.x
        if x is None:
            if self.out and self.out == self.par:
                return (weights.to(g.dtype) @ g[0].flatten(1)).view(g.shape[2:])
            kept = "".join(letter for letter in self.out if letter in self.par)
            total = torch.einsum(f"n,n{self.out}->{kept}", weights.to(g.dtype), g[0])
            order = [kept.index(letter) for letter in self.par]
            return total.permute(order)
        weights = weights.to(g.dtype)
        # Behind the samples as many axes of size one as `g` has.
        weights_of_g = weights.reshape(-1, *[1] * (g.ndim - 2))
        own = self.own
        # The op's own gradient, such as that of a convolution, is faster than any contraction.
        if own is not None:
            return own.gradient(g[0] * weights_of_g, own.input)
        if self._is_one_product and is_large(g, g.numel() * math.prod(x.shape[len(self.out) :])):
            # oneDNN copies a first matrix that is transposed. That copy is made here, and
            # multiplied in place.
            matrix = g[0].flatten(0, -2).mT.clone(memory_format=torch.contiguous_format)
            matrix.view(len(matrix), len(weights), -1).mul_(weights[:, None])
            return mm(matrix, x.reshape(matrix.shape[1], -1))
        # The smaller factor is copied.
        if g.numel() <= x.numel():
            g = g * weights_of_g
        else:
            x = x * weights.reshape(-1, *[1] * (x.ndim - 1))
        return self.of(g, x).contract(self.par)

    @property
    def _is_one_product(self) -> bool:
        """Whether the sum over samples and positions is one product of matrices as they lie."""
        shared, rows, columns = self.out[:-1], self.par[:1], self.par[1:]
        in_order = self.out == shared + rows and self.inp == shared + columns
        return bool(columns) and in_order and self.g.is_contiguous()

    def squared_norms(self) -> Tensor:
        """Compute the squared norms of the outer products `g ⊗ x` where nothing is shared.

        Returns:
            The squared norms, `[V, N]`.
        """
        common_letters = {*self.out} & {*self.inp}
        if common_letters:
            x_squared = None if self.x is None else squared_sizes(self.x)
            squared_factors = self.of(squared_sizes(self.g), x_squared)
            return squared_factors.contract("vn")
        # ‖g ⊗ x‖ = ‖g‖ ‖x‖. The norms of `g` are kept for the next parameter of the op: they must
        # not be changed in place.
        g_norms, _ = _NORMS.get_or_compute(self.g, (), partial(_norms, self.g, 2))
        if self.x is None:
            return g_norms.square()
        x_norms = _norms(self.x, 1)
        return (g_norms * x_norms).square_()

    def norms(self) -> Tensor:
        """Bound the norms of the outer products `g ⊗ x` where nothing is shared.

        Returns:
            The norms, `[V, N]`, as of `Jacobian.norms`.
        """
        both = [letter for letter in self.out if letter in self.inp]
        if not both:
            norms_of_g, _ = _ROW_NORMS.get_or_compute(self.g, (), partial(row_norms, self.g, 2))
            if self.x is None:
                return norms_of_g
            norms_of_x = row_norms(self.x, 1)
            return product_norms(norms_of_g, norms_of_x, self.g.dtype)
        assert self.x is not None
        # Where both factors have an axis, the norm is one of products of norms along that axis.
        outputs = both + [letter for letter in self.out if letter not in both]
        inputs = both + [letter for letter in self.inp if letter not in both]
        g = _placed(self.g, "vn" + self.out, "vn" + "".join(outputs))
        x = _placed(self.x, "n" + self.inp, "n" + "".join(inputs))
        g_norms = row_norms(g, 2 + len(both))
        x_norms = row_norms(x, 1 + len(both))
        norms = product_norms(g_norms, x_norms, self.g.dtype)
        return row_norms(norms, 2)

    def squared(self, signs: Tensor | None = None) -> Term:
        """Square both factors: the result contracts to sums of squares where nothing is shared.

        Args:
            signs: Weight of the square of every column, `[V, N]`; `None`: one.

        Returns:
            The term of `g²`, summed over the columns, and of `x²`.
        """
        if signs is None and len(self.g) > 1:
            g, _ = _SQUARES.get_or_compute(self.g, (), partial(squares_of_columns, self.g))
        else:
            g = squares_of_columns(self.g, signs)
        x = self.x
        if x is not None and not self.classes:  # the square of a one-hot row is the row
            x = squared_sizes(x)
        return self.of(g, x)


def _norms(tensor: Tensor, start: int) -> Tensor:
    """Norms over all axes from `start` on."""
    if tensor.ndim == start:
        return tensor.abs()
    rows = tensor if tensor.ndim == start + 1 else tensor.flatten(start)
    return torch.linalg.vector_norm(rows, dim=start)


def _placed(tensor: Tensor, letters: str, result: str) -> Tensor:
    """A tensor with its axes where `result` has their letters, and axes of size 1 for others."""
    size_of = dict(zip(letters, tensor.shape, strict=True))
    order = [letters.index(letter) for letter in result if letter in letters]
    shape = [size_of.get(letter, 1) for letter in result]
    return tensor.permute(order).reshape(shape)
