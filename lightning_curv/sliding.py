"""Per-sample gradients of convolutions whose patches overlap, with as little copying as possible.

Patches are a view of the padded image in which the rows of the kernel slide over the rows of the image: the patches of
kernel row k are those of kernel row 0, some image rows further down. With the columns of the kernel laid out once, the
patches of every kernel row are one slice of consecutive memory, a matrix that a product reads in place. Laying out all
of the kernel would copy as many times more as it has rows, and takes longer than the products themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_curv.terms import Term

PIECE_BYTES = 2**20  # of images with the columns laid out, so that they stay in cache


class Sliding:
    """A term whose inputs are overlapping patches.

    Attributes:
        term: The term; `slides` says whether it is one.
    """

    def __init__(self, term: Term) -> None:
        self.term = term
        self.both = [a for a in term.par if a in term.out and a in term.inp]
        self.rows = [a for a in term.par if a in term.out and a not in term.inp]
        self.columns = [a for a in term.par if a not in term.out and a != "x"]
        self.positions = [a for a in term.shared if a != "s"]
        self.sizes = term.sizes()

    @property
    def slides(self) -> bool:
        """Whether laying out the columns of the kernel saves copies."""
        term = self.term
        regular = "s" in term.shared and all(a in term.out and a in term.inp for a in term.shared)
        if term.x is None or "x" not in term.inp or "x" in term.out or not regular:
            return False
        return self._step * self.sizes["s"] > 0 and self._height < self.sizes["x"] * self.sizes["s"]

    @property
    def _strides(self) -> dict[str, int]:
        assert self.term.x is not None
        return dict(zip(self.term.inp, self.term.x.stride()[1:], strict=True))

    @property
    def _step(self) -> int:
        """Output rows from one kernel row to the next; zero: no whole number."""
        kernel, image = self._strides["x"], self._strides.get("s", 0)
        return 0 if not image or kernel % image else kernel // image

    @property
    def _height(self) -> int:
        """Image rows that are seen."""
        return self.sizes["s"] + (self.sizes["x"] - 1) * self._step

    def _size(self, letters: Sequence[str]) -> int:
        return math.prod(self.sizes[a] for a in letters)

    def _products(self) -> Iterator[list[Tensor]]:
        """The gradients of some consecutive samples by kernel row, ``[n·q, V·o, i]`` each."""
        term, x = self.term, self.term.x
        assert x is not None
        own = [*self.both, *self.columns, "s", *self.positions]
        sizes, strides = {**self.sizes, "s": self._height}, self._strides
        images = x.as_strided([len(x), *(sizes[a] for a in own)], [x.stride(0), *(strides[a] for a in own)])
        g = term.g.permute(1, *(2 + term.out.index(a) for a in self.both), 0, *self._g_axes)
        width, rows = self._size(self.positions), self.sizes["s"]
        many = max(1, PIECE_BYTES // (math.prod(images.shape[1:]) * images.element_size()))
        for start in range(0, max(len(x), 1), many):
            image = images[start : start + many].reshape(-1, self._size(self.columns), self._height * width)
            part = g[start : start + many].reshape(-1, len(term.g) * self._size(self.rows), rows * width)
            starts = (k * self._step * width for k in range(self.sizes["x"]))
            yield [part @ image[:, :, first : first + rows * width].mT for first in starts]

    @property
    def _g_axes(self) -> list[int]:
        return [2 + self.term.out.index(a) for a in [*self.rows, "s", *self.positions]]

    def formed(self) -> Term:
        """J itself as a term, the kernel rows before the other axes: nothing is moved once it is computed."""
        columns, samples = self.term.g.shape[:2]
        letters = [*self.both, "x", "v", *self.rows, *self.columns]
        sizes = {**self.sizes, "v": columns}
        shape = (self._size(self.both), sizes["x"], columns * self._size(self.rows), self._size(self.columns))
        found, start = self.term.g.new_empty(samples, *shape), 0
        for rows in self._products():
            stop = start + len(rows[0]) // shape[0]
            for k, row in enumerate(rows):
                found[start:stop, :, k] = row.view(-1, shape[0], *shape[2:])
            start = stop
        g = found.view(samples, *(sizes[a] for a in letters)).movedim(1 + letters.index("v"), 0)
        letters.remove("v")
        return replace(self.term, out="".join(letters), inp="", g=g, x=None, adjoint=None)

    def squared_norms(self) -> Tensor:
        """Squared norms of J[v, n], ``[V, N]``."""
        columns, groups = len(self.term.g), self._size(self.both)
        norms = []
        for rows in self._products():
            flat = [row.reshape(len(row) // groups, groups, columns, -1) for row in rows]
            norms.append(sum(torch.linalg.vecdot(row, row).sum(1) for row in flat))
        return torch.cat(norms).T
