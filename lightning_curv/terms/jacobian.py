r"""The per-sample Jacobian of one parameter, as a sum of terms, and its contractions.

Every extension is a function of a `Jacobian`. All contractions add the uses of the parameter
*before* squaring, and none materialises `[V, N, *p]` but `Jacobian.per_sample`, whose result that
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
from lightning_curv.precision import wide
from lightning_curv.terms import ghost_norms, one_hot
from lightning_curv.terms.chunks import CHUNK_BYTES, Matrices, joined, pieces
from lightning_curv.terms.safe_norms import row_norms
from lightning_curv.terms.squares import signed, squared_sizes
from lightning_curv.terms.term import DIAGONAL, Term

# Size of per-sample products that are worked on together where they are made one by one or, entry
# by entry, without a product of matrices.
STACK_BYTES = 2**18
# Size of a Jacobian up to which it is kept once formed, if several quantities share it.
KEPT_BYTES = 2**25
BLOCK = 2**16  # entries of several tensors that are worked on in turn, in cache
SMALL = 2**12  # entries of a parameter up to which squares are summed by one reduction


class Jacobian:
    r"""J[v, n, *p]: derivatives of backpropagated columns `v` of sample `n` by one parameter.

    With the gradient as the only column, `J[0, n]` is the per-sample gradient $s\,g_n$;
    with the columns of $\sqrt{s H_n}$, $\sum_{v,n} J[v,n] J[v,n]^\top$ is the GGN.

    Example:
        >>> g, x = torch.ones(1, 2, 1), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> jacobian = Jacobian(torch.zeros(1, 2), [Term("o", "i", "oi", g, x)])
        >>> jacobian.per_sample()  # one column, two samples
        tensor([[[[1., 2.]],
        <BLANKLINE>
                 [[3., 4.]]]])
        >>> jacobian.sum_squares()
        tensor([[10., 20.]])

    Attributes:
        parameter: The parameter.
        terms: One term per group of uses with the same letters.
        signs: Weight of the square of every column, `[V, N]`; `None`: one.
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
        # Uses with the same letters become one term: sums over them are one contraction, and
        # squares come after the sum.
        if len(terms) == 1:
            self.terms = [terms[0].promoted()]
        else:
            self.terms = _merged([term.promoted() for term in terms])
        only = self.terms[0] if len(self.terms) == 1 else None
        # The term, if J is an outer product: then J² is one too.
        self._factorised = None if only is None or only.shared else only
        # The term, if it is the only one and has one-hot inputs.
        self._onehot = only if only is not None and only.classes else None

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

    def __getitem__(self, samples: slice | list[int] | Tensor) -> Jacobian:
        """The Jacobian of some samples."""
        signs = None if self.signs is None else self.signs[:, samples]
        terms = [term[samples] for term in self.terms]
        return Jacobian(self.parameter, terms, signs)

    def stacked(self, other: Jacobian) -> Jacobian:
        """Take the columns of two Jacobians together.

        Args:
            other: The Jacobian of other columns of the same uses.

        Returns:
            The Jacobian of the columns of both.
        """
        terms = [
            own.of(torch.cat([own.g, others.g]), own.x)
            for own, others in zip(self.terms, other.terms, strict=True)
        ]
        return Jacobian(self.parameter, terms)

    def per_sample(self) -> Tensor:
        """Form J itself.

        Returns:
            J, `[V, N, *p]`.
        """
        if self._formed is not None:
            return self._formed
        if not self._in_pieces:
            # In one piece, in the order of memory of the parameter.
            formed = next(self._pieces(max(1, self.samples), ordered=True))
        else:
            formed = huge_pages.empty(self.terms[0].g, self.columns, self.samples, *self.shape)
            start = 0
            for piece in self._pieces(self._size, ordered=True):
                stop = start + piece.shape[1]
                formed[:, start:stop] = piece
                start = stop
        if self.shared:
            self._formed = formed
        return formed

    def chunks(self) -> Iterator[Tensor]:
        """Form J some samples at a time.

        Returns:
            Pieces `[V, n, *p]` of consecutive samples, each of at most `CHUNK_BYTES` where one
            sample fits. They are not to be changed in place.
        """
        sparse = any(term.classes for term in self.terms)
        small = self._bytes * self.samples <= KEPT_BYTES
        # The formed J of an embedding is mostly zeros, which no quantity of its own reads.
        if self.shared and small and not sparse:
            self.per_sample()  # and keep it
        if self._formed is None:
            return self._pieces(self._size)
        return iter(self._formed.split(self._size, dim=1))

    @property
    def _bytes(self) -> int:
        """The size of J of one sample."""
        return self.columns * self.parameter.numel() * self.terms[0].g.element_size()

    @cached_property
    def _size(self) -> int:
        """The number of samples of a piece, so that it and what it is made of stay in cache."""
        products = [term for term in self.terms if term.own_gradients is None]
        made_one_by_one = any(Matrices(term).large for term in products)
        if made_one_by_one:
            return max(1, STACK_BYTES // self._bytes)
        # The product, its factors, and one, since a parameter may be empty.
        sizes = [self._bytes, 1]
        entry_by_entry = any({*term.out} == {*term.inp} for term in products)
        for term in products:
            if term.x is not None:
                input_bytes = math.prod(term.x.shape[1:]) * term.g.element_size()
                # Entry by entry the products are as large as the inputs, for every column.
                sizes.append(self.columns * input_bytes if entry_by_entry else input_bytes)
        piece_bytes = STACK_BYTES if entry_by_entry else CHUNK_BYTES
        return max(1, piece_bytes // max(sizes))

    def _pieces(self, size: int, ordered: bool = False) -> Iterator[Tensor]:
        """J of `size` samples at a time, summed over the terms; `ordered`: see `pieces`."""
        # Iterators, so that one piece of every term is in memory at a time.
        by_term = [pieces(term, size, ordered) for term in self.terms]
        return (self._added(parts) for parts in zip(*by_term, strict=True))

    @cached_property
    def _in_pieces(self) -> bool:
        """Whether J is made faster in pieces than as a whole."""
        return any(term.own_gradients is not None or Matrices(term).large for term in self.terms)

    def _added(self, parts: Iterable[Tensor]) -> Tensor:
        """The sum of pieces `[V, n, *par]`, `[V, n, *p]`."""
        shaped = []
        for part in parts:
            # A reshape of what has the shape costs little, but it is done for every piece.
            if part.shape[2:] != self.shape:
                part = part.reshape(*part.shape[:2], *self.shape)
            shaped.append(part)
        return sum(shaped[1:], start=shaped[0])

    def total(self) -> Tensor:
        """Sum over the samples, without forming J.

        Returns:
            The sum of every column, `[V, *p]`.
        """
        parts = []
        for term in self.terms:
            if term.classes:
                part = one_hot.total(term)
            else:
                part = term.contract(f"v{term.par}")
            parts.append(part.reshape(self.columns, *self.shape))
        return sum(parts[1:], start=parts[0])

    def weighted_total(self, weights: Tensor) -> Tensor:
        r"""Sum the only column over the samples, each times a weight: $\sum_n c_n J[0, n]$.

        One contraction per term; no per-sample gradient is formed. With norms from `norms` this is
        the second half of book-keeping (Bu, Wang, Zha & Karypis, *Differentially Private
        Optimization on Large Model at Small Cost*, ICML 2023).

        Args:
            weights: c, `[N]`.

        Returns:
            The weighted sum, of the parameter's shape.
        """
        parts = []
        for term in self.terms:
            if term.classes:
                part = one_hot.weighted_total(term, weights)
            else:
                part = term.weighted_total(weights)
            parts.append(part.reshape(self.shape))
        return sum(parts[1:], start=parts[0])

    @cached_property
    def forms_norms(self) -> bool:
        """Whether `norms` form per-sample gradients, not products of norms or Gram matrices."""
        if self._onehot is not None or self._factorised is not None:
            return False
        return len(self.terms) > 1 or not ghost_norms.are_cheaper(self.terms[0])

    def formed(self) -> Jacobian:
        """Form the only column, in the order of memory that is the fastest.

        Returns:
            The same Jacobian, as one term without inputs.
        """
        if self._factorised is not None and self._factorised.x is None:
            return self
        chunks = self.chunks()
        first = next(chunks)
        # The axes of the parameter from the slowest to the fastest, behind those of V and N: a
        # copy in this order runs through memory without jumps.
        order = sorted(range(first.ndim - 2), key=lambda axis: -first.stride(axis + 2))
        by_memory = 0, 1, *(axis + 2 for axis in order)
        rows = first.permute(by_memory)
        if first.shape[1] < self.samples:
            # The first piece has told the order of memory: the others are copied behind it.
            rows = huge_pages.empty(first, 1, self.samples, *rows.shape[2:])
            start = 0
            for chunk in chain([first], chunks):
                stop = start + chunk.shape[1]
                rows[:, start:stop] = chunk.permute(by_memory)
                start = stop
        letters = DIAGONAL[: len(order)]
        out = "".join(letters[axis] for axis in order)
        return Jacobian(self.parameter, [Term(out, "", letters, rows)])

    def dot(self, vector: Tensor) -> Tensor:
        """Compute directional derivatives: inner products of J[v, n] with a vector.

        The op is applied with the vector in the parameter's place; no per-sample gradient is
        formed.

        Args:
            vector: The direction, of the parameter's shape.

        Returns:
            The inner products, `[V, N]`.
        """
        products = []
        for term in self.terms:
            products.append(_dot(term, vector.to(term.g.dtype)))
        return torch.stack(products).sum(0)

    def squared_norms(self) -> Tensor:
        """Compute the squared norms of J[v, n], the cheapest way that there is.

        Returns:
            The squared norms, `[V, N]`.
        """
        if self._onehot is not None:
            return one_hot.squared_norms(self._onehot)
        if self._factorised is not None:
            return self._factorised.squared_norms()
        # Neither formed gradients nor an outer product: the Gram matrices of its positions.
        if not self.forms_norms:
            return ghost_norms.squared_norms(self.terms[0])
        norms = []
        for chunk in self.chunks():
            # One more axis: a parameter that is a number has none to take the norm over.
            rows = chunk[..., None]
            parameter_axes = [*range(2, rows.ndim)]
            norms.append(torch.linalg.vector_norm(rows, dim=parameter_axes))
        return joined(norms).square_()

    def norms(self) -> Tensor:
        """Compute norms of J[v, n] that bound what a sample adds to `weighted_total`.

        They are no less than those, in spite of rounding, and neither underflow nor overflow where
        only one factor of J is very small or large. Where a factor is larger than the root of the
        largest number they are infinite.

        Returns:
            The norms, `[V, N]` in the widest type of the device.
        """
        return self.norms_and_sizes()[0]

    def norms_and_sizes(self) -> tuple[Tensor, Tensor]:
        """Compute `norms`, and how much larger the rounding errors of what they measure may be.

        Returns:
            The norms, and those that the same sums would have if nothing of them cancelled,
            `[V, N]` in the widest type of the device each.
        """
        norms, sizes, odd = self.unread_norms()
        if odd is not None and bool(odd.any()):
            self.settle_norms(norms, sizes, odd)
        return norms, sizes

    def unread_norms(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Compute `norms_and_sizes` as far as that is possible without knowing any of them.

        The host then waits for no device; whoever has several Jacobians waits once for all.

        Returns:
            The norms and sizes, and of which samples they are not good before `settle_norms`,
            `[N]` of bool; `None`: of none.
        """
        if self._onehot is not None:
            return *one_hot.norms(self._onehot), None
        if self._factorised is not None:
            norms = self._factorised.norms()
            return norms, norms, None
        if not self.forms_norms:
            return ghost_norms.norms(self.terms[0])
        parts = []
        for chunk in self.chunks():
            rows = _rows(chunk)
            parts.append(row_norms(rows, 2))
        norms = joined(parts)
        return norms, norms, None

    def settle_norms(self, norms: Tensor, sizes: Tensor, odd: Tensor) -> None:
        """Look again at the samples that `unread_norms` named, and overwrite theirs.

        Args:
            norms: The norms, `[V, N]`.
            sizes: The sizes, `[V, N]`.
            odd: Which samples, `[N]` of bool.
        """
        ghost_norms.norms_of_odd(self.terms[0], norms, sizes, odd)

    def sum_squares(self) -> Tensor:
        """Sum the squared entries over columns and samples, each times the sign of its column.

        Returns:
            The sums, of the parameter's shape.
        """
        if self._squares is not None:
            return self._squares
        term = self._factorised
        if self._onehot is not None:
            squares = one_hot.sum_squares(self._onehot, self.signs).reshape(self.shape)
        elif term is not None:
            # (g ⊗ x)² = g² ⊗ x², entry by entry: the squares are one contraction.
            squared_term = term.squared(self.signs)
            squares = squared_term.contract(term.par).reshape(self.shape)
        else:
            squares = _sum_squares(self.chunks(), self.signs)
        self._squares = squares if self.shared else None
        return squares

    def sum_squares_per_sample(self, total: Tensor | None = None) -> Tensor:
        """Sum the squared entries over the columns, each times the sign of its column.

        Args:
            total: What they are added to, in place: a second tensor of this size is never in
                memory.

        Returns:
            The sums, `[N, *p]`; `total` where it was given.
        """
        term = self._factorised
        if term is not None and not self._onehot:
            squares = term.squared(self.signs)
            if total is None:
                return squares.contract(f"n{term.par}").reshape(self.samples, *self.shape)
            squares.add_to(total)
            return total
        result = total
        if result is None:
            result = huge_pages.empty(self.terms[0].g.real, self.samples, *self.shape)
        start = 0
        for chunk in self.chunks():
            stop = start + chunk.shape[1]
            signs = None if self.signs is None else self.signs[:, start:stop]
            added = signed(squared_sizes(chunk), signs).sum(0)
            part = result[start:stop]
            part.copy_(added) if total is None else part.add_(added)
            start = stop
        return result

    def variance(self) -> Tensor:
        """Compute the population variance over the samples of the only column.

        Returns:
            The variance of every entry, of the parameter's shape.
        """
        if self._onehot is not None:
            return one_hot.variance(self._onehot).reshape(self.shape)
        term = self._factorised
        if term is not None and term.x is None:
            gradients = term.contract(f"vn{term.par}")[0]
            deviations = gradients - gradients.mean(0)
            if deviations.is_complex():
                return squared_sizes(deviations).mean(0).reshape(self.shape)
            return deviations.square_().mean(0).reshape(self.shape)
        if term is not None and term.g.dtype == torch.float32:
            return self._variance_of_moments()
        mean = self.sum_of_gradients() / self.samples
        return _sum_squares(self._deviations(mean), None).div_(self.samples)

    def _deviations(self, mean: Tensor) -> Iterator[Tensor]:
        """The chunks minus the mean, in their order of memory."""
        reordered = False
        for chunk in self.chunks():
            if not reordered and chunk.shape[1]:
                # In the order of memory of the chunks: the difference then runs through both
                # without jumps.
                mean = torch.empty_like(chunk[0, 0]).copy_(mean)
                reordered = True
            yield chunk - mean

    def sum_of_gradients(self) -> Tensor:
        """Sum the only column over the samples.

        Returns:
            The gradient where it is known in full, else `total`; of the parameter's shape.
        """
        gradient = self.gradient
        if gradient is None or gradient.is_sparse:
            return self.total()[0]
        # Under autocast the gradient may have been rounded to fewer digits than the terms have.
        if gradient.dtype != self.terms[0].g.dtype:
            return self.total()[0]
        return gradient

    def _variance_of_moments(self) -> Tensor:
        """The difference of the moments; where it cancels, that of all entries in float64.

        There, products of two numbers of float32 are exact.
        """
        squares = self.sum_squares()
        if self.shared:  # others want the squares too
            # `squares` is kept for the others: it must not be changed in place.
            result = squares.clone(memory_format=torch.contiguous_format)
        else:
            result = squares.contiguous()
        total = self.sum_of_gradients()
        cancels = _subtract_mean(result.view(-1), total.reshape(-1), self.samples)
        if not cancels:
            return result
        exact = Jacobian(self.parameter, [_doubled(term) for term in self.terms])
        second_moment = exact.sum_squares() / self.samples
        mean = exact.total()[0] / self.samples
        difference = second_moment - mean.square()
        return difference.clamp_(min=0).float()


def _subtract_mean(squares: Tensor, total: Tensor, samples: int) -> bool:
    """Turn Σ j² into Σ j² / N - (Σ j / N)², in place; whether less than a tenth is left anywhere.

    A difference of less than (Σ j / 3N)² is less than a tenth of the second moment.
    """
    cancelled = []
    # Blocks stay in cache from the first operation to the last.
    for part, sums in zip(squares.split(BLOCK), total.split(BLOCK), strict=True):
        part.div_(samples)
        part.addcmul_(sums, sums, value=-1 / samples**2)
        beyond_tenth = torch.addcmul(part, sums, sums, value=-1 / (3 * samples) ** 2)
        # No synchronisation here: all blocks are asked at once, behind the loop.
        cancelled.append(beyond_tenth.amin() < 0)
    return bool(torch.stack(cancelled).any())


def _sum_squares(parts: Iterator[Tensor], signs: Tensor | None) -> Tensor:
    """Sum over columns and samples of the squares of `[V, n, *p]`."""
    result = None
    start = 0
    for part in parts:
        stop = start + part.shape[1]
        if result is None:
            # The result takes over the order of memory that the parts have, one sample's where
            # there is a sample.
            if part.shape[1]:
                like = part.select(1, 0)[0]
            else:
                like = part.sum((0, 1))
            result = torch.zeros_like(like.real)
        if part.device.type != "cpu" or result.numel() < SMALL or part.is_complex():
            some_signs = None if signs is None else signs[:, start:stop]
            result += signed(squared_sizes(part), some_signs).flatten(0, 1).sum(0)
        else:
            # One row at a time: it and the result stay in cache, and squares are never written.
            for v, column in enumerate(part.unbind(0)):
                for n, row in enumerate(column.unbind(0), start):
                    factor = row if signs is None else row * signs[v, n]
                    result.addcmul_(row, factor)
        start = stop
    assert result is not None
    return result.contiguous()


def _rows(j: Tensor) -> Tensor:
    """`[V, n, *p]` as `[V, n, P]` in its order of memory."""
    strides = j.stride()
    slowest_first = sorted(range(2, j.ndim), key=lambda axis: -strides[axis])
    by_memory = j.permute(0, 1, *slowest_first)
    return by_memory[..., None].flatten(2)


def _dot(term: Term, vector: Tensor) -> Tensor:
    """The share of one term in `Jacobian.dot`: the op's output for the vector, times cotangents."""
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
    groups: dict[tuple[str, ...], list[Term]] = {}
    for term in terms:
        groups.setdefault(_structure(term), []).append(term)
    merged = []
    for group in groups.values():
        merged.append(group[0] if len(group) == 1 else _concatenated(group))
    return merged


def _structure(term: Term) -> tuple[str, ...]:
    """What the terms of uses must have in common to become one."""
    sizes = term.sizes()
    inputs = "".join(letter for letter in term.inp if letter in term.par)
    ones = "1" if term.x is None else ""
    # A parameter whose axes one use splits and another does not has sizes of its own in each.
    par_sizes = [sizes[letter] for letter in term.par]
    return (
        term.par,
        inputs + ones,
        str(par_sizes),
        str(term.classes),
    )


def _concatenated(terms: list[Term]) -> Term:
    """Terms of one structure as one, the shared positions of all behind each other."""
    terms = [term.canonical() for term in terms]
    g = torch.cat([term.g for term in terms], dim=2)
    inputs = [term.x for term in terms if term.x is not None]
    x = torch.cat(inputs, dim=1) if inputs else None
    merged = terms[0].of(g, x)
    if all(term.lengths is None for term in terms):
        return merged
    lengths = []
    for term in terms:
        if term.lengths is not None:
            lengths.append(term.lengths.cpu())
        else:  # every sample has all positions
            samples, positions = term.g.shape[1:3]
            lengths.append(torch.full((samples,), positions))
    return replace(merged, lengths=torch.stack(lengths).sum(0))


def _doubled(term: Term) -> Term:
    """The term in the widest type of its device."""
    x = None if term.x is None else wide(term.x)
    return term.of(wide(term.g), x)
