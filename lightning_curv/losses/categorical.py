"""The likelihood of classes, and square roots of its curvature.

That curvature is the covariance of a multinomial distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_curv.losses.likelihoods import Likelihood, drawable, nonnegative, signs_of
from lightning_curv.terms.owners import BatchAxis, Owners

Roots = Callable[[Tensor, Tensor, int], Iterator[Tensor]]  # see `_multinomial_roots`
BLOCK_BYTES = 2**22  # size of columns that are made at once


@dataclass(frozen=True)
class Categorical(Likelihood):
    r"""Softmax cross-entropy: H = w (diag(p) - p pᵀ) per row.

    Example:
        >>> p = torch.tensor([[0.5, 0.25, 0.25]])
        >>> likelihood = Categorical(p, weight=torch.ones(1, 1), axis=1)
        >>> likelihood.product(torch.tensor([[1.0, 0.0, 0.0]]))  # the first column of H
        tensor([[ 0.2500, -0.1250, -0.1250]])

    Attributes:
        probabilities: p, with classes on axis `axis`.
        weight: w, of p's shape with one entry on the axis of the classes.
        axis: The axis of the classes.
        normalized: Whether the input holds log-probabilities instead of logits: H is then w
            diag(p), the log-softmax below turns it into w (diag(p) - p pᵀ), and the loss, linear in
            its input, has no Hessian of its own.
    """

    probabilities: Tensor
    weight: Tensor
    axis: int
    normalized: bool = False

    def columns(self, owners: Owners) -> Iterator[Tensor]:
        """The columns √(w p_c) (e_c - p) for every class c and every row of a sample."""
        yield from self._positive(_one_class_each if self.normalized else _symmetric_roots, owners)

    def fewest_columns(self, owners: Owners) -> Iterator[Tensor]:
        r"""The Cholesky factor of H, one column less than classes.

        Column c is
        $\sqrt{w\, p_c\, q_c / (p_c + q_c)}\, (e_c - \sum_{i>c} (p_i / q_c)\, e_i)$ with the
        tail $q_c = \sum_{i>c} p_i$: nothing cancels. Tanabe & Sagae, *An exact Cholesky
        decomposition and the generalized inverse of the variance-covariance matrix of the
        multinomial distribution, with applications*, J. R. Stat. Soc. B, 1992.
        """
        if self.normalized or self.probabilities.shape[self.axis] == 1:
            yield from self.columns(owners)
        else:
            yield from self._positive(_multinomial_roots, owners)

    def sample(self, generator: torch.Generator) -> Tensor:
        """The gradient √w (e_y - p) with y drawn from p."""
        # √w: the weight carries the scale of the loss.
        root = self.checked(self.weight).sqrt()
        p = self.probabilities
        classes_last = drawable(p.movedim(self.axis, -1), 1.0)
        drawn = _classes(classes_last, generator).movedim(-1, self.axis)
        result = torch.zeros_like(p) if self.normalized else -root * p
        return result.scatter_add_(self.axis, drawn, root.to(p.dtype))

    def product(self, v: Tensor) -> Tensor:
        """The product w (p ⊙ v - p pᵀv)."""
        return self.weight * self._centred(self.probabilities * v)

    def hessian_columns(self, owners: Owners) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Those of `fewest_columns` with the signs of the weights; none for log-probabilities."""
        if not self.normalized:
            yield from self._columns(_multinomial_roots, owners)

    def _positive(self, roots: Roots, owners: Owners) -> Iterator[Tensor]:
        """The columns of a matrix without negative weights."""
        for column, signs in self._columns(roots, owners):
            if signs is not None:
                nonnegative(self.weight)
            yield column

    def _columns(self, roots: Roots, owners: Owners) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Columns of the input's shape and their signs, from those of every row of a sample."""
        p = self.probabilities.movedim(self.axis, -1)
        w = self.weight.movedim(self.axis, -1)
        # The classes at the end: every row of a sample is then a distribution.
        owners = owners.without(self.axis)
        weights = owners.split(w)  # [N, rows]
        entries = owners.split(p, trailing=1)  # [N, rows, C]
        rows = entries.shape[1]
        # Samples in front: a reshape is all that it takes.
        in_order = owners == BatchAxis(owners.count)
        # H has a block per row: its columns are those of the rows, one after the other.
        for row in range(rows):
            signs = None if self.unsigned else signs_of(weights[:, row])
            scale = weights[:, row, None].abs().sqrt()
            for block in roots(entries[:, row], scale, rows):
                columns = block.unsqueeze(2)
                if rows > 1:  # a column is zero at all other rows of the sample
                    columns = block.new_zeros(len(block), *entries.shape)
                    columns[:, :, row] = block
                if not in_order:
                    columns = torch.stack([owners.join(column, p.shape) for column in columns])
                columns = columns.reshape(len(block), *p.shape).movedim(-1, self.axis + 1)
                for column in columns.unbind():
                    yield column, signs

    def _centred(self, columns: Tensor) -> Tensor:
        """`columns - p Σ columns` over the classes, for any number of leading axes."""
        if self.normalized:  # the log-softmax below does that
            return columns
        axis = self.axis - self.probabilities.ndim
        return columns - self.probabilities * columns.sum(axis, keepdim=True)


def _classes(p: Tensor, generator: torch.Generator) -> Tensor:
    """One class drawn from every row of `p [*, C]`, `[*, 1]`."""
    *shape, classes = p.shape
    if p.device.type != "cpu":
        # On other devices a cumulative sum is the slower one.
        rows = p.reshape(-1, classes)
        return torch.multinomial(rows, 1, generator=generator).reshape(*shape, 1)
    # The inverse of the distribution function takes a tenth of the time of `multinomial`, which
    # draws a number for every class.
    below = p.cumsum(-1, dtype=torch.promote_types(p.dtype, torch.float32))
    uniform = torch.rand(*shape, 1, generator=generator, dtype=below.dtype)
    level = uniform * below[..., -1:]  # the sum may not be one, by rounding
    return torch.searchsorted(below, level, right=True).clamp_(max=classes - 1)


def _multinomial_roots(p: Tensor, scale: Tensor, rows: int) -> Iterator[Tensor]:
    """Columns c < C - 1 of the Cholesky factors of diag(p) - p pᵀ, in pieces `[c, N, C]`.

    The formula is in `Categorical.fewest_columns`.

    Args:
        p: The probabilities of one row of every sample, `[N, C]`.
        scale: What the columns are multiplied by, `[N, 1]`.
        rows: The number of rows of a sample, which pieces have to be made for.
    """
    smallest = torch.finfo(p.dtype).tiny
    tails = p.flip(1).cumsum(1).flip(1)  # Σ_{i>=c} p_i
    rest = tails[:, 1:].clamp(min=smallest)  # q_c
    # A ratio of tails instead of a difference from one: it cancels nowhere.
    remaining = tails[:, 1:] / tails[:, :-1].clamp(min=smallest)  # q_c / (p_c + q_c)
    roots = scale * (p[:, :-1] * remaining).sqrt()
    for start, own in _pieces(roots, rows):
        ratios = -(own / rest[:, start : start + own.shape[1]]).mT
        ones = torch.ones(len(ratios), p.shape[1], dtype=p.dtype, device=p.device)
        above = ones.triu_(start + 1)  # the classes i > c
        block = (above.unsqueeze(1) * p).mul_(ratios.unsqueeze(-1))
        block.diagonal(start, 0, 2).copy_(own)
        yield block


def _symmetric_roots(p: Tensor, scale: Tensor, rows: int) -> Iterator[Tensor]:
    """Columns √p_c (e_c - p) of diag(p) - p pᵀ for every class c; see `_multinomial_roots`."""
    roots = scale * p.sqrt()
    for start, own in _pieces(roots, rows):
        # Minus √p_c p in all classes, plus √p_c in class c.
        block = own.mT.unsqueeze(-1) * -p
        block.diagonal(start, 0, 2).add_(own)
        yield block


def _one_class_each(p: Tensor, scale: Tensor, rows: int) -> Iterator[Tensor]:
    """Columns √p_c e_c of diag(p) for every class c; see `_multinomial_roots`."""
    roots = scale * p.sqrt()
    for start, own in _pieces(roots, rows):
        block = roots.new_zeros(own.shape[1], *roots.shape)
        block.diagonal(start, 0, 2).copy_(own)
        yield block


def _pieces(roots: Tensor, rows: int) -> Iterator[tuple[int, Tensor]]:
    """As many classes at a time as `BLOCK_BYTES` allow, from which one on."""
    class_bytes = roots.numel() * rows * roots.element_size()
    size = max(1, BLOCK_BYTES // max(1, class_bytes))
    for start in range(0, roots.shape[1], size):
        yield start, roots[:, start : start + size]
