r"""Terms: per-sample Jacobian-vector products as contractions that are not carried out.

Ops are affine in each parameter, so the derivative of a backpropagated column ``v`` and sample
``n`` by a parameter is

.. math:: J[v, n, *par] = \sum_{\text{letters not in } v, n, par} g[v, n, *out]\; x[n, *inp],

with the cotangents ``g`` at the op's output and the recorded input ``x``. A `Term` keeps ``g``,
``x`` and one letter per axis. Letters have a meaning that every quantity relies on:

``v`` column, ``n`` sample, ``r s t u`` shared positions (never in ``par``), ``q`` group, ``o`` and
``i x y z`` output and input features (a Kronecker factor each), ``d`` and all later letters of
`DIAGONAL` diagonal features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lightning_curv.errors import UnsupportedError
from lightning_curv.kernels import huge_pages
from lightning_curv.kernels.memo import Latest
from lightning_curv.kernels.onednn import einsum, is_large
from lightning_curv.terms.owners import BatchAxis, ChosenOwners, Owners, RowOwners
from lightning_curv.terms.safe_norms import product_norms, row_norms

DIAGONAL = "defghjklm"
SHARED = "rstu"
CHUNK_BYTES = 2**25  # of products that are added up at once
WASTE = 4  # how many times as much memory as their rows samples of different lengths may take
SMALL = 2**14  # entries of a column up to which the squares of all columns are made at once
_SQUARES, _NORMS, _ROW_NORMS = (
    Latest(),
    Latest(),
    Latest(),
)  # of the cotangents that a weight and its bias share
# Rounding of a squared norm and of a weighted sum together, in machine epsilons of the squared sum
# of what is added up.
ROUNDING = 2.0  # measured: at most 1.5 + 0.4 (two positions), less for more of them


def flatten_shared(tensor: Tensor, start: int, stop: int) -> Tensor:
    """The axes ``start`` to ``stop`` (excluded) as one axis; no such axes: unchanged."""
    shape = tensor.shape
    stop = stop % tensor.ndim
    return (
        tensor.reshape(*shape[:start], math.prod(shape[start:stop]), *shape[stop:])
        if stop > start
        else tensor
    )


@dataclass(frozen=True)
class Adjoint:
    """An op's own way from cotangents to gradients, where it is faster than a contraction.

    Attributes:
        x: The inputs of the term that it is made for; a term with others (squared) must not use it.
            Nor must one with another order or other sizes of the parameter's axes: it has none.
        input: The op's own input, ``[N, *]``.
        gradient: From cotangents ``[N, *out]`` and inputs to the sum over the samples, in the
            parameter's memory order.
        gradients: The same without the sum, ``[N, *]``; ``None``: not faster.
    """

    x: Tensor
    input: Tensor
    gradient: Callable[[Tensor, Tensor], Tensor]
    gradients: Callable[[Tensor, Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Term:
    """The contribution of one use of a parameter.

    Attributes:
        out: Letters of ``g`` behind ``v n``.
        inp: Letters of ``x`` behind ``n``.
        par: Letters of the parameter in the order of its memory; several letters may make up one
            axis.
        g: Cotangents, ``[V, N, *out]``; carry the scale of the loss.
        x: Inputs, ``[N, *inp]``; ``None`` stands for ones. With ``classes``, indices that stand for
            their one-hot rows (negative: a row of zeros), ``[N, *inp without i]``.
        classes: Number of classes of one-hot inputs (``i``), else 0.
        adjoint: The op's own gradient, if it has one.
        lengths: The number of shared positions of every sample, ``[N]``, where they differ: what
            follows them in ``g`` and ``x`` is filled up with zeros.
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
        return "".join(
            dict.fromkeys(letter for letter in self.out + self.inp if letter not in self.par)
        )

    def sizes(self) -> dict[str, int]:
        """Size of every letter."""
        sizes = dict(zip(self.out, self.g.shape[2:], strict=True))
        if self.x is not None:
            sizes.update(
                zip(
                    self.inp.replace("i", "") if self.classes else self.inp,
                    self.x.shape[1:],
                    strict=True,
                )
            )
        return {**sizes, "i": self.classes} if self.classes else sizes

    def __getitem__(self, samples: slice | list[int] | Tensor) -> Term:
        x, own = None if self.x is None else self.x[samples], self.own
        adjoint = None if own is None or x is None else replace(own, x=x, input=own.input[samples])
        lengths = None if self.lengths is None else self.lengths[samples]
        return Term(
            self.out,
            self.inp,
            self.par,
            self.g[:, samples],
            x,
            self.classes,
            adjoint or self.adjoint,
            lengths,
        )

    def of(self, g: Tensor, x: Tensor | None, adjoint: Adjoint | None = None) -> Term:
        """The same letters with other cotangents and inputs; in a third of the time of `dataclasses.replace`."""
        return Term(
            self.out, self.inp, self.par, g, x, self.classes, adjoint or self.adjoint, self.lengths
        )

    @property
    def own(self) -> Adjoint | None:
        """The adjoint, if it is made for these inputs."""
        return self.adjoint if self.adjoint is not None and self.adjoint.x is self.x else None

    @property
    def own_gradients(self) -> Callable[[], Tensor] | None:
        """The op's own per-sample gradients, ``[N, *]``, where they are the fastest way to the only column."""
        own = self.own
        if own is None or own.gradients is None or len(self.g) > 1 or not self.g.shape[1]:
            return None
        return partial(own.gradients, self.g[0], own.input)

    def promoted(self) -> Term:
        """The term in float32 or better, with one dtype for ``g`` and ``x``."""
        if self.g.dtype == torch.float32 and (
            self.x is None or self.classes or self.x.dtype == torch.float32
        ):
            return self
        dtype = torch.promote_types(self.g.dtype, torch.float32)
        x = self.x
        if x is not None and not self.classes:
            dtype = torch.promote_types(dtype, x.dtype)
            x = x.to(dtype)
        return self if self.g.dtype == dtype and x is self.x else self.of(self.g.to(dtype), x)

    def grouped(self, owners: Owners) -> Term:
        """Rows regrouped to samples: the rows of a sample become its shared positions ``r``.

        Args:
            owners: Which sample owns each row.

        Raises:
            RuntimeError: A cotangent arrives at a row that was found to belong to no sample.
        """
        if isinstance(owners, RowOwners):
            return self._gathered(owners.to(self.g.device))
        assert isinstance(owners, BatchAxis)
        rows, samples = self.g.shape[1], owners.count
        if rows == samples:
            return self

        def split(tensor: Tensor, axis: int) -> Tensor:
            if not owners.minor:
                return tensor.unflatten(axis, (samples, rows // samples))
            return tensor.unflatten(axis, (rows // samples, samples)).transpose(axis, axis + 1)

        x = None if self.x is None else split(self.x, 0)
        return replace(
            self,
            out="r" + self.out,
            inp="r" + self.inp if x is not None else "",
            g=split(self.g, 1),
            x=x,
        )

    def of_chosen(self, owners: ChosenOwners, left: Tensor | None) -> Term:
        """Rows of some samples regrouped to these.

        Args:
            owners: The samples, and which rows belong to them.
            left: The rows that the rule was asked for; it may have left out all others.
        """
        if left is not None and self.g.shape[1] == len(left):
            return self.grouped(owners.within)
        if isinstance(owners.whole, RowOwners):
            self._refuse_unowned(owners.whole.to(self.g.device))
        return self[owners.rows(self.g.shape[1]).to(self.g.device)].grouped(owners.within)

    def _refuse_unowned(self, owners: RowOwners) -> None:
        unowned = self.g[:, owners.index < 0]
        rounding = (
            1e4 * torch.finfo(self.g.dtype).eps * self.g.abs().amax() if unowned.numel() else 0
        )
        if bool((unowned.abs() > rounding).any()):
            raise RuntimeError(
                "Expected no gradient at rows that no sample depended on when the samples were found, found one. Pass "
                "`check=True` to `curvature`: the samples are then found anew."
            )
        if (
            self.x is not None
            and not self.classes
            and not bool(self.x[owners.index < 0].isfinite().all())
        ):
            raise UnsupportedError(
                "Expected finite inputs in rows that no gradient arrives at, found others: which sample they make "
                "undefined cannot be told. Leave samples that are not finite out of the batch."
            )

    def _gathered(self, owners: RowOwners) -> Term:
        """The rows of every sample next to each other, filled up; where that costs more memory than J, J itself."""
        self._refuse_unowned(owners)
        sizes, (samples, longest) = self.sizes(), owners.table.shape
        padded = longest * (self.g[:, :1].numel() + (0 if self.x is None else self.x[:1].numel()))
        formed = len(self.g) * math.prod(sizes[letter] for letter in self.par)
        if not self.classes and longest * samples > WASTE * len(owners.index) and padded > formed:
            return self._formed(owners)
        positions = math.prod(sizes[letter] for letter in self.shared)
        x = None if self.x is None else owners.padded(self.x, 0, -1 if self.classes else 0)
        return replace(
            self,
            out="r" + self.out,
            inp="r" + self.inp if x is not None else "",
            g=owners.padded(self.g, 1),
            x=x,
            lengths=owners.lengths * positions,
        )

    def _formed(self, owners: RowOwners) -> Term:
        """J itself, ``[V, N, *par]``, some rows at a time."""
        sizes = self.sizes()
        shape = [sizes[letter] for letter in self.par]
        total = self.g.new_zeros(len(self.g), owners.count, *shape)
        size = max(1, CHUNK_BYTES // max(1, total[:, :1].numel() * total.element_size()))
        for start in range(0, len(owners.index), size):
            index = owners.index[start : start + size]
            owned = (index >= 0).nonzero().squeeze(1)
            rows = self[(owned + start).tolist()].contract(f"vn{self.par}")
            total.index_add_(1, index[owned], rows)
        letters = DIAGONAL[: len(shape)] if len(shape) > 1 else "d"
        return Term(letters, "", letters, total if shape else total[..., None])

    def canonical(self) -> Term:
        """The same term with one shared letter ``s``, in front."""
        out = [letter for letter in self.out if letter in self.par]
        g = self.g.permute(
            0,
            1,
            *(2 + self.out.index(x) for x in self.out if x in self.shared),
            *(2 + self.out.index(x) for x in out),
        )
        g = g.flatten(2, g.ndim - len(out) - 1) if g.ndim - len(out) > 2 else g.unsqueeze(2)
        if self.x is None:
            return replace(self, out="s" + "".join(out), inp="", g=g)
        letters = self.inp.replace("i", "") if self.classes else self.inp
        kept = [letter for letter in letters if letter in self.par]
        x = self.x.permute(
            0,
            *(1 + letters.index(y) for y in letters if y in self.shared),
            *(1 + letters.index(y) for y in kept),
        )
        x = x.flatten(1, x.ndim - len(kept) - 1) if x.ndim - len(kept) > 1 else x.unsqueeze(1)
        return replace(
            self,
            out="s" + "".join(out),
            inp="s" + ("i" if self.classes else "") + "".join(kept),
            g=g,
            x=x,
        )

    def contract(self, result: str) -> Tensor:
        """``g·x`` summed to the letters ``result`` (of ``v n`` and ``par``); dense inputs only."""
        if self.x is None:
            summed = [axis for axis, letter in enumerate("vn" + self.out) if letter not in result]
            kept = [letter for letter in "vn" + self.out if letter in result]
            total = self.g.sum(summed) if summed else self.g
            return (
                total
                if kept == [*result]
                else total.permute([kept.index(letter) for letter in result])
            )
        columns = "v" if "v" in result or len(self.g) > 1 else ""
        if set(result) == {
            *columns,
            "n",
            *self.out,
            *self.inp,
        }:  # an outer product: no matrix product
            g = _placed(self.g if columns else self.g[0], columns + "n" + self.out, result)
            return huge_pages.multiply(g, _placed(self.x, "n" + self.inp, result))
        if {*self.out} == {*self.inp}:  # a norm's scale: nothing to multiply out
            product = self.g * _placed(self.x, "n" + self.inp, "vn" + self.out)
            return torch.einsum(f"vn{self.out}->{result}", product)
        return einsum(f"vn{self.out},n{self.inp}->{result}", self.g, self.x)

    def add_to(self, total: Tensor) -> None:
        """Add the outer products of the only column to ``total [N, *p]``, in place and without making them."""
        sizes, result = self.sizes(), f"n{self.par}"
        total = total.view(len(total), *(sizes[letter] for letter in self.par))
        g = _placed(self.g[0], f"n{self.out}", result)
        if self.x is None:
            total.add_(g)
        else:
            total.addcmul_(g, _placed(self.x, f"n{self.inp}", result))

    def weighted_total(self, weights: Tensor) -> Tensor:
        """``g·x`` of the first column, times ``weights [N]``, summed over the samples; dense inputs only."""
        g, x = self.g[:1], self.x
        if x is None:
            kept = "".join(letter for letter in self.out if letter in self.par)
            total = torch.einsum(f"n,n{self.out}->{kept}", weights.to(g.dtype), g[0])
            return total.permute([kept.index(letter) for letter in self.par])
        weights = weights.to(g.dtype)
        if (own := self.own) is not None:
            return own.gradient(g[0] * weights.reshape(-1, *[1] * (g.ndim - 2)), own.input)
        if (left := self._weighted_matrix(weights)) is not None:
            g = left
        elif g.numel() <= x.numel():
            g = g * weights.reshape(-1, *[1] * (g.ndim - 2))
        else:
            x = x * weights.reshape(-1, *[1] * (x.ndim - 1))
        return self.of(g, x).contract(self.par)

    def _weighted_matrix(self, weights: Tensor) -> Tensor | None:
        """The first column's ``g`` times weights, in memory as `contract` multiplies it; ``None``: no need for that.

        oneDNN copies a first matrix that is transposed. That copy is made here, and multiplied in
        place.
        """
        g, sizes = self.g[0], self.sizes()
        rows = [y for y in self.out if y in self.par]
        summed = ["n", *(y for y in self.out if y not in self.par)]
        columns = math.prod(sizes[y] for y in self.par if y not in self.out)
        if {*rows} & {*self.inp} or not is_large(g, g.numel() * columns):
            return None
        transposed = g.permute([("n" + self.out).index(y) for y in summed + rows])
        if not transposed.is_contiguous():
            return None
        matrix = transposed.flatten(0, len(summed) - 1).flatten(1)
        matrix = g.new_empty(matrix.shape[::-1]).copy_(matrix.t())
        matrix.view(len(matrix), len(weights), -1).mul_(weights[:, None])
        shape = transposed.shape[len(summed) :] + transposed.shape[: len(summed)]
        return matrix.view(shape).permute([(rows + summed).index(y) for y in "n" + self.out])[None]

    def squared_norms(self) -> Tensor:
        """Squared norms of the outer products ``g ⊗ x`` where nothing is shared, ``[V, N]``."""
        if {*self.out} & {*self.inp}:
            return self.of(self.g.square(), None if self.x is None else self.x.square()).contract(
                "vn"
            )
        norms, _ = _NORMS.of(self.g, (), partial(_norms, self.g, 2))
        return norms.square() if self.x is None else (norms * _norms(self.x, 1)).square_()

    def norms(self) -> Tensor:
        """Norms of the outer products ``g ⊗ x`` where nothing is shared, ``[V, N]``: see `Jacobian.norms`."""
        both = [letter for letter in self.out if letter in self.inp]
        if not both:
            norms, _ = _ROW_NORMS.of(self.g, (), partial(row_norms, self.g, 2))
            return (
                norms
                if self.x is None
                else product_norms(norms, row_norms(self.x, 1), self.g.dtype)
            )
        assert self.x is not None
        g = _placed(
            self.g, "vn" + self.out, "vn" + "".join(both + [y for y in self.out if y not in both])
        )
        x = _placed(
            self.x, "n" + self.inp, "n" + "".join(both + [y for y in self.inp if y not in both])
        )
        return row_norms(
            product_norms(row_norms(g, 2 + len(both)), row_norms(x, 1 + len(both)), self.g.dtype), 2
        )

    def squared(self, signs: Tensor | None = None) -> Term:
        """``g²`` (summed over the columns) and ``x²``: contracts to sums of squares where nothing is shared."""
        if signs is None and len(self.g) > 1:
            g, _ = _SQUARES.of(self.g, (), partial(squares_of_columns, self.g))
        else:
            g = squares_of_columns(self.g, signs)
        return self.of(g, None if self.x is None else self.x if self.classes else self.x.square())


def signed(squares: Tensor, signs: Tensor | None) -> Tensor:
    """``squares [V, N, *]`` times ``signs [V, N]``."""
    return (
        squares
        if signs is None
        else squares * signs.reshape(*signs.shape, *[1] * (squares.ndim - 2))
    )


def squares_of_columns(g: Tensor, signs: Tensor | None = None) -> Tensor:
    """The sum of the squares over the columns, ``[1, N, *]``; one column after the other where that pays."""
    if len(g) == 1 or g[0].numel() < SMALL:
        squares = signed(g.square(), signs)
        return squares if len(g) == 1 else squares.sum(0, keepdim=True)
    total = torch.zeros_like(g[:1])
    for v, column in enumerate(g.unbind()):
        total[0].addcmul_(
            column, column if signs is None else signed(column[None], signs[v : v + 1])[0]
        )
    return total


def _norms(tensor: Tensor, start: int) -> Tensor:
    """Norms over all axes from ``start`` on."""
    if tensor.ndim == start:
        return tensor.abs()
    return torch.linalg.vector_norm(
        tensor if tensor.ndim == start + 1 else tensor.flatten(start), dim=start
    )


def _placed(tensor: Tensor, letters: str, result: str) -> Tensor:
    """``tensor`` with its axes where ``result`` has their letters, and axes of size 1 for the others."""
    shape = [tensor.shape[letters.index(letter)] if letter in letters else 1 for letter in result]
    return tensor.permute(
        [letters.index(letter) for letter in result if letter in letters]
    ).reshape(shape)
