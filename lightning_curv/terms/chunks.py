"""Per-sample gradients of one term, in pieces of consecutive samples: products of matrices with the positions last.

The features of the output are the columns of a product: they are more often a multiple of the width
of the vector units than those of a patch. Overlapping patches are copied a few samples at a time,
so that they stay in cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor

from lightning_curv.kernels import huge_pages, onednn
from lightning_curv.terms import one_hot
from lightning_curv.terms.term import Term

CHUNK_BYTES = (
    2**21
)  # of copies and of intermediate results; they then stay in cache, and memory does not grow with N


def pieces(term: Term, size: int, ordered: bool = False) -> Iterator[Tensor]:
    """J of consecutive samples, ``[V, n, *par]``; one piece without samples where there are none.

    Args:
        term: The term.
        size: The number of samples n.
        ordered: Whether memory is to be in the order ``n``, outputs, inputs, not in the faster one.
    """
    matrices = Matrices(term, ordered)
    if matrices.regular and term.own_gradients is None:
        yield from matrices.pieces(size)
        return
    for start in range(0, max(term.g.shape[1], 1), size):
        part = term[start : start + size]
        if (own := part.own_gradients) is not None:
            yield own()[None]
        else:
            yield one_hot.per_sample(part) if part.classes else part.contract(f"vn{part.par}")


class Matrices:
    """The factors of a term as matrices: cotangents ``[N, q, V·o, s]``, inputs ``[N, q, i, s]``.

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
        self.term, self.ordered = (
            term,
            ordered or len(term.g) > 1,
        )  # columns apart: each is squared on its own
        self.both = [x for x in term.par if x in term.out and x in term.inp]
        self.outputs = [x for x in term.par if x in term.out and x not in term.inp]
        self.inputs = [x for x in term.par if x not in term.out]
        self.shared = [*term.shared]

    @property
    def regular(self) -> bool:
        """Whether J is a product of the two matrices."""
        common = all(x in self.term.out and x in self.term.inp for x in self.shared)
        dense = self.term.x is not None and not self.term.classes
        return dense and bool(self.shared) and common and bool(self.outputs or self.inputs)

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return self.term.sizes()

    def size(self, letters: list[str]) -> int:
        """Number of entries along the axes ``letters``."""
        return math.prod(self._sizes[x] for x in letters)

    @cached_property
    def large(self) -> bool:
        """Whether the product of a single sample is large."""
        sizes = [self.size(x) for x in (self.outputs, self.inputs, self.shared)]
        multiplications = len(self.term.g) * math.prod(sizes)
        return self.regular and onednn.is_large(self.term.g, multiplications)

    @cached_property
    def _views(self) -> tuple[Tensor, Tensor, bool]:
        """Cotangents ``[N, *q, *s, V, *o]`` if their features are next to each other in memory (as told by the last).

        Otherwise ``[N, *q, V, *o, *s]``; inputs ``[N, *q, *i, *s]``.
        """
        term = self.term
        assert term.x is not None
        groups = self.both, self.outputs, self.shared
        both, rows, shared = ([2 + term.out.index(x) for x in group] for group in groups)
        last = bool(rows) and term.g.stride(rows[-1]) < term.g.stride(shared[-1])
        g = term.g.permute(1, *both, *(shared if last else []), 0, *rows, *([] if last else shared))
        return (
            g,
            term.x.permute(
                0, *(1 + term.inp.index(x) for x in self.both + self.inputs + self.shared)
            ),
            last,
        )

    def of(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Cotangents ``[n, q, V·o, s]`` and inputs ``[n, q, i, s]`` of some samples."""
        q, o, i, s = (self.size(x) for x in (self.both, self.outputs, self.inputs, self.shared))
        g, x, last = self._views
        g, x, o = g[start:stop], x[start:stop], len(self.term.g) * o
        g = g.reshape(len(g), q, s, o).mT if last else g.reshape(len(g), q, o, s)
        return g, x.reshape(len(x), q, i, s)

    def pieces(self, size: int) -> Iterator[Tensor]:
        """See `pieces`."""
        step = size * max(1, CHUNK_BYTES // (size * self._bytes)) if self.large else size
        for start in range(0, max(self.term.g.shape[1], 1), step):
            g, x = self.of(start, start + step)
            left, right = (g, x) if self.ordered else (x, g)
            if self.large:
                products = onednn.one_by_one(left.flatten(0, 1), right.flatten(0, 1).mT)
                while some := [*islice(products, size * left.shape[1])]:
                    yield self._shaped(some[0] if len(some) == 1 else torch.stack(some))
            else:
                yield self._shaped(huge_pages.bmm(left.flatten(0, 1), right.flatten(0, 1).mT))

    @property
    def _bytes(self) -> int:
        """Of the inputs of one sample."""
        letters = self.both + self.inputs + self.shared
        return self.size(letters) * self.term.g.element_size()

    @cached_property
    def _axes(self) -> tuple[list[int], list[int] | None]:
        """Sizes of the axes of products behind ``n``, and their order in J; ``None``: the same."""
        both, rows, columns = (
            [self._sizes[x] for x in group] for group in (self.both, self.outputs, self.inputs)
        )
        outputs, inputs = (["v", *self.outputs], [len(self.term.g), *rows]), (self.inputs, columns)
        first, second = (outputs, inputs) if self.ordered else (inputs, outputs)
        found = [*self.both, *first[0], *second[0]]
        order = [1 + found.index("v"), 0, *(1 + found.index(x) for x in self.term.par)]
        return [*both, *first[1], *second[1]], None if order == [
            1,
            0,
            *range(2, len(order)),
        ] else order

    def _shaped(self, product: Tensor) -> Tensor:
        """Products ``[n, q, rows, columns]`` or ``[n·q, rows, columns]``, or a single one, as ``[V, n, *par]``."""
        sizes, order = self._axes
        product = product.view(product.numel() // max(1, math.prod(sizes)), *sizes)
        return product.transpose(0, 1) if order is None else product.permute(order)
