"""Per-sample gradients of one term, in pieces of consecutive samples.

They are products of matrices with the positions last. The features of the output are the columns of
a product: they are more often a multiple of the width of the vector units than those of a patch.
Overlapping patches are copied a few samples at a time, so that they stay in cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache, cached_property
from itertools import islice

import torch
from torch import Tensor

from lightning_curv.kernels import huge_pages, onednn
from lightning_curv.terms import one_hot
from lightning_curv.terms.term import Term, shared_letters

# Size of copies and of intermediate results: they stay in cache, and memory does not grow with N.
CHUNK_BYTES = 2**21


def joined(results: list[Tensor]) -> Tensor:
    """Results of consecutive samples, `[V, n]` each, as one; a single one is not copied."""
    return results[0] if len(results) == 1 else torch.cat(results, dim=1)


def pieces(term: Term, size: int, ordered: bool = False) -> Iterator[Tensor]:
    """J of consecutive samples, `[V, n, *par]`; one piece without samples where there are none.

    Args:
        term: The term.
        size: The number of samples n.
        ordered: Whether memory is to be in the order `n`, outputs, inputs, not in the faster one.
    """
    matrices = Matrices(term, ordered)
    if matrices.regular and term.own_gradients is None:
        yield from matrices.pieces(size)
        return
    for start in range(0, max(term.g.shape[1], 1), size):
        part = term[start : start + size]
        own_gradients = part.own_gradients
        if own_gradients is not None:
            yield own_gradients()[None]
        elif part.classes:
            yield one_hot.per_sample(part)
        else:
            yield part.contract(f"vn{part.par}")


@cache
def _letters(
    out: str,
    inp: str,
    par: str,
) -> tuple[list[str], list[str], list[str], list[str], bool]:
    """The letters of `Matrices`, and whether both factors have all that are shared.

    Nobody changes the lists.
    """
    both = [y for y in par if y in out and y in inp]
    outputs = [y for y in par if y in out and y not in inp]
    inputs = [y for y in par if y not in out]
    shared = [*shared_letters(out, inp, par)]
    # A letter that only one factor has is summed before the product, in `Term.contract`.
    common = all(letter in out and letter in inp for letter in shared)
    return both, outputs, inputs, shared, common


class Matrices:
    """The factors of a term as matrices: cotangents `[N, q, V·o, s]`, inputs `[N, q, i, s]`.

    Attributes:
        term: The term.
        ordered: Whether products have rows of outputs and columns of inputs, not the other way
            round.
        both: Letters of the parameter that both factors have.
        outputs: Those of the cotangents alone.
        inputs: Those of the inputs alone.
        shared: The letters that are summed.
    """

    def __init__(self, term: Term, ordered: bool = False) -> None:
        self.term = term
        # Several columns are kept apart in memory: each is squared on its own.
        self.ordered = ordered or len(term.g) > 1
        letters = _letters(term.out, term.inp, term.par)
        self.both, self.outputs, self.inputs, self.shared, self._common = letters

    @property
    def regular(self) -> bool:
        """Whether J is a product of the two matrices."""
        if self.term.x is None or self.term.classes or not self.shared:
            return False
        return self._common and bool(self.outputs or self.inputs)

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return self.term.sizes()

    def size(self, letters: list[str]) -> int:
        """Number of entries along the axes `letters`."""
        return math.prod(self._sizes[letter] for letter in letters)

    @cached_property
    def large(self) -> bool:
        """Whether the product of a single sample is large."""
        rows = len(self.term.g) * self.size(self.outputs)
        multiplications = rows * self.size(self.inputs) * self.size(self.shared)
        return self.regular and onednn.is_large(self.term.g, multiplications)

    @cached_property
    def _views(self) -> tuple[Tensor, Tensor, bool]:
        """Views of the factors that need no copy to become matrices, and whether features are last.

        Cotangents are `[N, *q, *s, V, *o]` if their features are next to each other in memory,
        otherwise `[N, *q, V, *o, *s]`; inputs are `[N, *q, *i, *s]`.
        """
        term = self.term
        assert term.x is not None
        # Axes of `g`, behind column and sample.
        both = [2 + term.out.index(letter) for letter in self.both]
        rows = [2 + term.out.index(letter) for letter in self.outputs]
        shared = [2 + term.out.index(letter) for letter in self.shared]
        # Cotangents of a sequence have their features last, those of an image their positions.
        features_last = bool(rows) and term.g.stride(rows[-1]) < term.g.stride(shared[-1])
        features = [0, *rows]
        if features_last:
            positions_and_features = shared + features
        else:
            positions_and_features = features + shared
        g = term.g.permute(1, *both, *positions_and_features)
        input_letters = self.both + self.inputs + self.shared
        input_axes = [1 + term.inp.index(letter) for letter in input_letters]
        x = term.x.permute(0, *input_axes)
        return g, x, features_last

    def piece(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Cotangents `[n, q, V·o, s]` and inputs `[n, q, i, s]` of some samples."""
        q = self.size(self.both)
        s = self.size(self.shared)
        i = self.size(self.inputs)
        o = len(self.term.g) * self.size(self.outputs)
        g, x, features_last = self._views
        g = g[start:stop]
        x = x[start:stop]
        # Views where memory allows it, else copies of these samples only.
        if features_last:
            g = g.reshape(len(g), q, s, o).mT
        else:
            g = g.reshape(len(g), q, o, s)
        return g, x.reshape(len(x), q, i, s)

    def pieces(self, size: int) -> Iterator[Tensor]:
        """See `pieces`."""
        # Products made one by one come in small pieces; their factors are still copied together.
        if self.large:
            step = size * max(1, CHUNK_BYTES // (size * self._bytes))
        else:
            step = size
        for start in range(0, max(self.term.g.shape[1], 1), step):
            g, x = self.piece(start, start + step)
            left, right = (g, x) if self.ordered else (x, g)
            groups = left.shape[1]
            left = left.flatten(0, 1)
            right = right.flatten(0, 1).mT
            if not self.large:
                yield self._shaped(huge_pages.bmm(left, right))
                continue
            products = onednn.one_by_one(left, right)
            while some := [*islice(products, size * groups)]:
                stacked = some[0] if len(some) == 1 else torch.stack(some)
                yield self._shaped(stacked)

    @property
    def _bytes(self) -> int:
        """The size of the inputs of one sample."""
        letters = self.both + self.inputs + self.shared
        return self.size(letters) * self.term.g.element_size()

    @cached_property
    def _axes(self) -> tuple[list[int], list[int] | None]:
        """Sizes of the axes of products behind `n`, and their order in J; `None`: the same."""
        outputs = ["v", *self.outputs]
        if self.ordered:
            factors = outputs + self.inputs
        else:
            factors = self.inputs + outputs
        # As the product has them, behind the sample.
        letters = self.both + factors
        order = [1 + letters.index("v"), 0]
        order += [1 + letters.index(letter) for letter in self.term.par]
        sizes = {**self._sizes, "v": len(self.term.g)}
        as_they_are = order == [1, 0, *range(2, len(order))]
        axis_sizes = [sizes[letter] for letter in letters]
        return axis_sizes, None if as_they_are else order

    def _shaped(self, product: Tensor) -> Tensor:
        """Products as `[V, n, *par]`.

        Args:
            product: `[n, q, rows, columns]`, `[n·q, rows, columns]`, or a single product.
        """
        sizes, order = self._axes
        samples = product.numel() // max(1, math.prod(sizes))
        product = product.view(samples, *sizes)
        if order is None:
            return product.transpose(0, 1)
        return product.permute(order)
