r"""The per-sample Jacobian of one parameter, as a sum of terms, and its contractions.

Every extension is a function of a `Jacobian`. All contractions add the uses of the parameter
*before* squaring, and none materialises ``[V, N, *p]`` but `Jacobian.per_sample`, whose result that
is: sums over samples run in chunks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor

from lightning_curv.kernels import huge_pages
from lightning_curv.terms import ghost_norms, one_hot
from lightning_curv.terms.chunks import CHUNK_BYTES, Matrices, pieces
from lightning_curv.terms.term import DIAGONAL, Term, signed

STACK_BYTES = (
    2**18
)  # of products that are worked on together: those made one by one, or of single entries
KEPT_BYTES = (
    2**25
)  # of a Jacobian that several quantities share, up to which it is kept once formed
BLOCK = 2**16  # entries of several tensors that are worked on in turn, in cache
SMALL = 2**12  # entries of a parameter up to which squares are summed by one reduction


class Jacobian:
    r"""J[v, n, *p]: derivatives of the backpropagated columns ``v`` of sample ``n`` by one parameter.

    With the gradient as the only column, ``J[0, n]`` is the per-sample gradient :math:`s\,g_n`;
    with the columns of :math:`\sqrt{s H_n}`, :math:`\sum_{v,n} J[v,n] J[v,n]^\top` is the GGN.

    Attributes:
        parameter: The parameter.
        terms: One term per group of uses with the same letters.
        signs: Weight of the square of every column, ``[V, N]``; ``None``: one.
        gradient: The sum over the samples of the only column, where it is known.
        shared: Whether several quantities are functions of it: J is then kept once it has been
            formed.
        continues: Whether other columns of the same uses came before.
    """

    def __init__(
        self,
        parameter: Tensor,
        terms: Sequence[Term],
        signs: Tensor | None = None,
        gradient: Tensor | None = None,
    ) -> None:
        self.parameter = parameter
        self.signs = signs
        self.gradient = gradient
        self.shared = False
        self.continues = False
        self._formed: Tensor | None = None
        self._squares: Tensor | None = None
        self.terms = _merged([term.promoted() for term in terms])

    @property
    def columns(self) -> int:
        """V, the number of backpropagated columns."""
        return self.terms[0].g.shape[0]

    @property
    def samples(self) -> int:
        """N, the number of samples."""
        return self.terms[0].g.shape[1]

    @property
    def shape(self) -> torch.Size:
        """Shape of the parameter."""
        return self.parameter.shape

    @cached_property
    def _factorised(self) -> Term | None:
        """The term, if J is an outer product: then J² is one too."""
        term = self.terms[0]
        return term if len(self.terms) == 1 and {*term.out, *term.inp} <= {*term.par} else None

    @property
    def _onehot(self) -> Term | None:
        return self.terms[0] if len(self.terms) == 1 and self.terms[0].classes else None

    def __getitem__(self, samples: slice | list[int]) -> Jacobian:
        """The Jacobian of some samples."""
        signs = None if self.signs is None else self.signs[:, samples]
        return Jacobian(self.parameter, [term[samples] for term in self.terms], signs)

    def stacked(self, other: Jacobian) -> Jacobian:
        """The Jacobian of the columns of both; the uses must be the same."""
        terms = [
            a.of(torch.cat([a.g, b.g]), a.x) for a, b in zip(self.terms, other.terms, strict=True)
        ]
        return Jacobian(self.parameter, terms)

    def per_sample(self) -> Tensor:
        """J itself, ``[V, N, *p]``."""
        if self._formed is not None:
            return self._formed
        if not self._in_pieces:
            formed = next(self._pieces(max(1, self.samples), ordered=True))
        else:
            formed, start = (
                huge_pages.empty(self.terms[0].g, self.columns, self.samples, *self.shape),
                0,
            )
            for piece in self._pieces(self._size, ordered=True):
                formed[:, start : start + piece.shape[1]] = piece
                start += piece.shape[1]
        if self.shared:
            self._formed = formed
        return formed

    def chunks(self) -> Iterator[Tensor]:
        """J in pieces ``[V, n, *p]`` of consecutive samples, each of at most `CHUNK_BYTES` where one sample fits.

        They are not to be changed in place.
        """
        sparse = any(term.classes for term in self.terms)
        if (
            self.shared
            and self._formed is None
            and not sparse
            and self._bytes * self.samples <= KEPT_BYTES
        ):
            self.per_sample()
        return (
            self._pieces(self._size)
            if self._formed is None
            else iter(self._formed.split(self._size, dim=1))
        )

    @property
    def _bytes(self) -> int:
        """Of J of one sample."""
        return self.columns * self.parameter.numel() * self.terms[0].g.element_size()

    @cached_property
    def _size(self) -> int:
        """Samples at a time."""
        products = [t for t in self.terms if t.own_gradients is None]
        if any(Matrices(t).large for t in products):  # made one by one
            return max(1, STACK_BYTES // self._bytes)
        inputs = [
            math.prod(t.x.shape[1:]) * t.g.element_size() for t in products if t.x is not None
        ]
        if any({*t.out} == {*t.inp} for t in products):  # multiplied entry by entry, then summed
            return max(
                1, STACK_BYTES // max(self._bytes, *(self.columns * size for size in inputs), 1)
            )
        return max(1, CHUNK_BYTES // max(self._bytes, *inputs, 1, 1))

    def _pieces(self, size: int, ordered: bool = False) -> Iterator[Tensor]:
        return (
            self._added(parts)
            for parts in zip(*(pieces(t, size, ordered) for t in self.terms), strict=True)
        )

    @cached_property
    def _in_pieces(self) -> bool:
        """Whether J is made faster in pieces than as a whole."""
        return any(term.own_gradients is not None or Matrices(term).large for term in self.terms)

    def _added(self, parts: Iterable[Tensor]) -> Tensor:
        """The sum of pieces ``[V, n, *par]``, ``[V, n, *p]``."""
        parts = [
            part if part.shape[2:] == self.shape else part.reshape(*part.shape[:2], *self.shape)
            for part in parts
        ]
        return sum(parts[1:], start=parts[0])

    def total(self) -> Tensor:
        """Sum over the samples, ``[V, *p]``."""
        parts = [one_hot.total(t) if t.classes else t.contract(f"v{t.par}") for t in self.terms]
        parts = [p.reshape(self.columns, *self.shape) for p in parts]
        return sum(parts[1:], start=parts[0])

    def weighted_total(self, weights: Tensor) -> Tensor:
        r"""Weighted sum over the samples of the only column, :math:`\sum_n c_n J[0, n]`, of the parameter's shape.

        One contraction per term; no per-sample gradient is formed. With norms from `norms` this is
        the second half of book-keeping (Bu, Wang, Zha & Karypis, *Differentially Private
        Optimization on Large Model at Small Cost*, ICML 2023).

        Args:
            weights: c, ``[N]``.
        """
        parts = [
            one_hot.weighted_total(t, weights) if t.classes else t.weighted_total(weights)
            for t in self.terms
        ]
        return sum((p.reshape(self.shape) for p in parts[1:]), start=parts[0].reshape(self.shape))

    @cached_property
    def forms_norms(self) -> bool:
        """Whether `norms` have to form the per-sample gradients: no product of norms or Gram matrices do."""
        if self._onehot is not None or self._factorised is not None:
            return False
        return len(self.terms) > 1 or not ghost_norms.pay(self.terms[0])

    def formed(self) -> Jacobian:
        """The same with its only column formed, in the order of memory that is the fastest."""
        if self._factorised is not None and self._factorised.x is None:
            return self
        chunks = self.chunks()
        first = next(chunks)
        order = sorted(range(first.ndim - 2), key=lambda axis: -first.stride(axis + 2))
        places = 0, 1, *(axis + 2 for axis in order)
        rows, start = first.permute(places), 0
        if first.shape[1] < self.samples:
            rows = huge_pages.empty(first, 1, self.samples, *rows.shape[2:])
            for j in chain([first], chunks):
                rows[:, start : start + j.shape[1]] = j.permute(places)
                start += j.shape[1]
        letters = DIAGONAL[: len(order)]
        return Jacobian(
            self.parameter, [Term("".join(letters[axis] for axis in order), "", letters, rows)]
        )

    def dot(self, vector: Tensor) -> Tensor:
        """Inner products of J[v, n] with a vector of the parameter's shape, ``[V, N]``: directional derivatives.

        The op is applied with the vector in the parameter's place; no per-sample gradient is
        formed.
        """
        return torch.stack([_dot(t, vector.to(t.g.dtype)) for t in self.terms]).sum(0)

    def squared_norms(self) -> Tensor:
        """Squared norms of J[v, n], ``[V, N]``."""
        if self._onehot is not None:
            return one_hot.squared_norms(self._onehot)
        if self._factorised is not None:
            return self._factorised.squared_norms()
        if not self.forms_norms:
            return ghost_norms.squared_norms(self.terms[0])
        norms = [
            torch.linalg.vector_norm(j[..., None], dim=[*range(2, j.ndim + 1)])
            for j in self.chunks()
        ]
        return torch.cat(norms, dim=1).square_()

    def norms(self) -> Tensor:
        """Norms of J[v, n] that bound what a sample adds to `weighted_total`, ``[V, N]`` of float64.

        They are no less than those, in spite of rounding, and neither underflow nor overflow where
        only one factor of J is very small or large. Where a factor is larger than the root of the
        largest number they are infinite.
        """
        return self.norms_and_sizes()[0]

    def norms_and_sizes(self) -> tuple[Tensor, Tensor]:
        """`norms`, and those of the same sum if nothing of it cancelled: how much larger its rounding errors may be."""
        if self._onehot is not None:
            return one_hot.norms(self._onehot)
        if not self.forms_norms and self._factorised is None:
            return ghost_norms.norms(self.terms[0])
        if self._factorised is not None:
            norms = self._factorised.norms()
        else:
            parts = [
                torch.linalg.vector_norm(_rows(j), dim=2, dtype=torch.float64)
                for j in self.chunks()
            ]
            norms = torch.cat(parts, dim=1)
        return norms, norms

    def sum_squares(self) -> Tensor:
        """Sum over columns and samples of the squared entries, of the parameter's shape."""
        if self._squares is not None:
            return self._squares
        if self._onehot is not None:
            squares = one_hot.sum_squares(self._onehot, self.signs).reshape(self.shape)
        elif self._factorised is not None:
            squares = (
                self._factorised.squared(self.signs)
                .contract(self._factorised.par)
                .reshape(self.shape)
            )
        else:
            squares = _sum_squares(self.chunks(), self.signs)
        self._squares = squares if self.shared else None
        return squares

    def sum_squares_per_sample(self, total: Tensor | None = None) -> Tensor:
        """Sum over columns of the squared entries, ``[N, *p]``.

        Args:
            total: What they are added to, in place: a second tensor of this size is never in
                memory.
        """
        term = self._factorised
        if term is not None and not self._onehot:
            squares = term.squared(self.signs)
            if total is None:
                return squares.contract(f"n{term.par}").reshape(self.samples, *self.shape)
            squares.add_to(total)
            return total
        result = (
            huge_pages.empty(self.terms[0].g, self.samples, *self.shape) if total is None else total
        )
        start = 0
        for j in self.chunks():
            stop = start + j.shape[1]
            added = signed(
                j.square(), None if self.signs is None else self.signs[:, start:stop]
            ).sum(0)
            part = result[start:stop]
            part.copy_(added) if total is None else part.add_(added)
            start = stop
        return result

    def variance(self) -> Tensor:
        """Population variance over the samples of the (single-column) Jacobian, of the parameter's shape."""
        if self._onehot is not None:
            return one_hot.variance(self._onehot).reshape(self.shape)
        term = self._factorised
        if term is not None and term.x is None:
            j = term.contract(f"vn{term.par}")[0]
            return (j - j.mean(0)).square_().mean(0).reshape(self.shape)
        if term is not None and term.g.dtype == torch.float32:
            return self._variance_of_moments()
        return _sum_squares(self._deviations(self.sum_of_gradients() / self.samples), None).div_(
            self.samples
        )

    def _deviations(self, mean: Tensor) -> Iterator[Tensor]:
        """The chunks minus the mean, in their order of memory."""
        first = True
        for j in self.chunks():
            if first and j.shape[1]:
                mean, first = torch.empty_like(j[0, 0]).copy_(mean), False
            yield j - mean

    def sum_of_gradients(self) -> Tensor:
        """Sum over the samples of the only column: the gradient, where it is known in full."""
        if (
            self.gradient is not None
            and self.gradient.dtype == self.terms[0].g.dtype
            and not self.gradient.is_sparse
        ):
            return self.gradient
        return self.total()[0]

    def _variance_of_moments(self) -> Tensor:
        """The difference of the moments; if it cancels anywhere, in float64, where products of float32 are exact."""
        squares = self.sum_squares()
        result = (
            squares.clone(memory_format=torch.contiguous_format)
            if self.shared
            else squares.contiguous()
        )
        if _subtract_mean(result.view(-1), self.sum_of_gradients().reshape(-1), self.samples):
            exact = Jacobian(self.parameter, [_doubled(term) for term in self.terms])
            second = exact.sum_squares() / self.samples
            result = (second - (exact.total()[0] / self.samples).square()).clamp_(min=0).float()
        return result


def _subtract_mean(squares: Tensor, total: Tensor, samples: int) -> bool:
    """Σ j² becomes Σ j² / N - (Σ j / N)², in place and in cache; whether less than a tenth is left anywhere."""
    cancelled = []
    for part, sums in zip(squares.split(BLOCK), total.split(BLOCK), strict=True):
        part.div_(samples).addcmul_(sums, sums, value=-1 / samples**2)
        cancelled.append(torch.addcmul(part, sums, sums, value=-1 / (3 * samples) ** 2).amin() < 0)
    return bool(torch.stack(cancelled).any())


def _sum_squares(parts: Iterator[Tensor], signs: Tensor | None) -> Tensor:
    """Sum over columns and samples of the squares of ``[V, n, *p]``, one entry of ``v n`` at a time: all in cache."""
    result, start = None, 0
    for j in parts:
        if result is None:
            result = torch.zeros_like(j.select(1, 0)[0] if j.shape[1] else j.sum((0, 1)))
        if j.device.type != "cpu" or result.numel() < SMALL:
            part = None if signs is None else signs[:, start : start + j.shape[1]]
            result += signed(j.square(), part).flatten(0, 1).sum(0)
        else:
            for v, column in enumerate(j.unbind(0)):
                for n, row in enumerate(column.unbind(0), start):
                    result.addcmul_(row, row if signs is None else row * signs[v, n])
        start += j.shape[1]
    assert result is not None
    return result.contiguous()


def _rows(j: Tensor) -> Tensor:
    """``[V, n, *p]`` as ``[V, n, P]`` in its order of memory."""
    strides = j.stride()
    axes = sorted(range(2, j.ndim), key=lambda axis: -strides[axis])
    return j.permute(0, 1, *axes)[..., None].flatten(2)


def _dot(term: Term, vector: Tensor) -> Tensor:
    sizes = term.sizes()
    vector = vector.reshape([sizes[letter] for letter in term.par])
    if term.classes:
        return one_hot.dot(term, vector)
    if term.x is None:
        return torch.einsum(f"vn{term.out},{term.par}->vn", term.g, vector)
    output = torch.einsum(f"n{term.inp},{term.par}->n{term.out}", term.x, vector)
    return torch.einsum(f"vn{term.out},n{term.out}->vn", term.g, output)


def _merged(terms: Sequence[Term]) -> list[Term]:
    """Uses with the same letters become more shared positions of one term."""
    if len(terms) == 1:
        return [*terms]
    groups: dict[tuple[str, ...], list[Term]] = {}
    for term in terms:
        groups.setdefault(_structure(term), []).append(term)
    return [group[0] if len(group) == 1 else _concatenated(group) for group in groups.values()]


def _structure(term: Term) -> tuple[str, ...]:
    sizes = term.sizes()
    inp = "".join(letter for letter in term.inp if letter in term.par) + (
        "" if term.x is not None else "1"
    )
    return term.par, inp, str([sizes[letter] for letter in term.par]), str(term.classes)


def _concatenated(terms: list[Term]) -> Term:
    terms = [t.canonical() for t in terms]
    x = [t.x for t in terms if t.x is not None]
    merged = terms[0].of(torch.cat([t.g for t in terms], dim=2), torch.cat(x, dim=1) if x else None)
    if all(t.lengths is None for t in terms):
        return merged
    lengths = [
        torch.full(t.g.shape[1:2], t.g.shape[2]) if t.lengths is None else t.lengths.cpu()
        for t in terms
    ]
    return replace(merged, lengths=torch.stack(lengths).sum(0))


def _doubled(term: Term) -> Term:
    return term.of(term.g.double(), None if term.x is None else term.x.double())
