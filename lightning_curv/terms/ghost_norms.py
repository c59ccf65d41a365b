"""Norms of per-sample gradients by Gram matrices of the shared positions."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from lightning_curv.kernels import onednn
from lightning_curv.kernels.memo import LastResult
from lightning_curv.precision import wide
from lightning_curv.terms.chunks import CHUNK_BYTES, Matrices, joined
from lightning_curv.terms.safe_norms import product_norms, row_norms
from lightning_curv.terms.term import ROUNDING, Term

# The last Gram matrices of cotangents and of inputs: parameters of one op share them.
_GRAMS = LastResult(), LastResult()
READ = 64  # measured: multiplications of Gram matrices in the time of reading an entry twice
# The range of usual squares of factors: products of two of them are normal numbers.
RANGE = {
    torch.float32: (2.0**-50, 2.0**50),
    torch.float64: (2.0**-400, 2.0**400),
}


def are_cheaper(term: Term) -> bool:
    """Whether Gram matrices over the shared positions are cheaper than per-sample gradients.

    The crossover was measured.
    """
    matrices = Matrices(term)
    out = matrices.size(matrices.outputs)
    inp = matrices.size(matrices.inputs)
    # Per position of a sample: one row of each Gram matrix, or one outer product.
    gram_cost = matrices.size(matrices.shared) * (out + inp)
    forming_cost = out * inp
    return matrices.regular and gram_cost <= 1.25 * forming_cost


def are_cheaper_with_a_sum(term: Term) -> bool:
    """The same where a weighted sum over the samples follows, which formed gradients need not.

    To form them takes as long as that sum, and to read them twice as long as `READ`
    multiplications an entry.
    """
    matrices = Matrices(term)
    out = matrices.size(matrices.outputs)
    inp = matrices.size(matrices.inputs)
    gram_cost = matrices.size(matrices.shared) ** 2 * (out + inp)
    return gram_cost <= READ * out * inp


def squared_norms(term: Term) -> Tensor:
    """‖Σ_s g_s ⊗ x_s‖² = Σ_{s,t} ⟨g_s, g_t⟩ ⟨x_s, x_t⟩ per column and sample, `[V, N]`.

    Both Gram matrices are made in chunks.
    """
    chunks = [products.sum(2) for products, *_ in _products(term)]
    return joined(chunks).clamp_(min=0)


def norms(term: Term) -> tuple[Tensor, Tensor, Tensor]:
    """The roots of `squared_norms`, rounded up, Σ_s ‖g_s‖ ‖x_s‖, and whose to look at again.

    Where the second is much more, positions cancel. What rounding may take away is added:
    `ROUNDING` times (Σ_s ‖g_s‖ ‖x_s‖)², which is more than the rest where large positions cancel.
    The third says whose Gram matrices may underflow or overflow: theirs are to be had from
    `norms_of_odd`.

    Returns:
        Norms and sizes, `[V, N]` of float64 each, and `[N]` of bool.
    """
    parts = [_rounded_up(*products, term.g.dtype) for products in _products(term)]
    all_norms, all_sizes, odd = ([*column] for column in zip(*parts, strict=True))
    return joined(all_norms), joined(all_sizes), odd[0] if len(odd) == 1 else torch.cat(odd)


def norms_of_odd(term: Term, norms: Tensor, sizes: Tensor, odd: Tensor) -> None:
    """Overwrite what `norms` gave for the samples that it names, a few at a time.

    They get Σ_s ‖g_s‖ ‖x_s‖ itself, where what positions that a sample lacks are filled up with
    was not the reason.
    """
    for numbers in odd.nonzero().flatten().split(_samples_at_once(Matrices(term))):
        g, x = Matrices(term[numbers]).piece(0, len(numbers))
        # Positions that a sample does not have may be filled up with anything: numbers of other
        # samples. What is not finite stays, for it would be in the sum too.
        missing = (g == 0).all(2, keepdim=True)
        x = x.masked_fill(missing & x.isfinite(), 0)
        g = g.unflatten(2, (len(term.g), -1))
        norms[:, numbers], sizes[:, numbers], still = _rounded_up(*_products_of(g, x), g.dtype)
        numbers, g, x = numbers[still], g[still], x[still]
        # Σ_s ‖g_s‖ ‖x_s‖ bounds the norm of the sum, and squares nothing in the factors' type.
        g_norms = row_norms(g.transpose(3, 4), 4)
        x_norms = row_norms(x.mT, 3).unsqueeze(2)
        bounds = product_norms(g_norms, x_norms, g.dtype)
        sums = bounds.sum((1, 3)).mT
        norms[:, numbers] = sums
        sizes[:, numbers] = sums


def _rounded_up(
    products: Tensor,
    g_squares: Tensor,
    x_squares: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Norms and sizes `[V, n]`, and whose Gram matrices may underflow or overflow, `[n]`.

    The arguments are what `_products` gives.
    """
    # ‖g_s‖ ‖x_s‖, whose sum bounds the norm of the sum.
    sizes = g_squares.sqrt() * x_squares.sqrt().unsqueeze(2)
    sizes_squared = wide(sizes.sum(3)).square().permute(2, 0, 1)
    rounding = ROUNDING * torch.finfo(dtype).eps * sizes_squared
    # In float64, where there is any, no squares of float32 underflow or overflow.
    squares = wide(products.clamp(min=0)) + rounding
    low, high = RANGE[dtype]
    g_total = g_squares.sum(3).permute(2, 0, 1)
    x_total = x_squares.sum(2)[None]
    g_usual = (g_total > low) & (g_total < high)
    x_usual = (x_total > low) & (x_total < high)
    # Of all columns and groups of a sample.
    usual = (g_usual & x_usual).all(2).all(0)
    norms = squares.sum(2).sqrt()
    bounds = sizes_squared.sum(2).sqrt()
    return norms, bounds, ~usual


def _products_of(g: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`_products` of `g [n, q, V, o, s]` and `x [n, q, i, s]`."""
    g_gram = g.mT @ g
    x_gram = x.mT @ x
    products = torch.einsum("nqvst,nqst->vnq", g_gram, x_gram)
    g_squares = g_gram.diagonal(dim1=3, dim2=4)
    x_squares = x_gram.diagonal(dim1=2, dim2=3)
    return products, g_squares, x_squares


def _products(term: Term) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Inner products of both Gram matrices, and their diagonals, some samples at a time.

    They are Σ_{s,t} ⟨g_s, g_t⟩ ⟨x_s, x_t⟩ per group, `[V, n, q]`, ‖g_s‖² `[n, q, V, s]` and
    ‖x_s‖² `[n, q, s]`.
    """
    matrices = Matrices(term)
    assert term.x is not None
    columns = len(term.g)
    both = matrices.size(matrices.both)
    size = _samples_at_once(matrices)
    for start in range(0, term.g.shape[1], size):
        g, x = matrices.piece(start, start + size)  # [n, q, V·o, s], [n, q, i, s]
        x = x.flatten(0, 1)
        g = g.flatten(0, 1).unflatten(1, (columns, -1))
        # Weights that are applied to the same tensor (query, key and value) share its Gram matrix.
        how = start, size, *matrices.both, *matrices.shared
        g_gram, _ = _GRAMS[0].get_or_compute(
            term.g, (term.out, *how), partial(_gram, g.flatten(0, 1))
        )
        x_gram, _ = _GRAMS[1].get_or_compute(term.x, (term.inp, *how), partial(_gram, x))
        g_gram = g_gram.unflatten(0, (-1, columns))
        products = (g_gram * x_gram.unsqueeze(1)).flatten(2).sum(2).mT
        g_squares = g_gram.diagonal(dim1=2, dim2=3)
        x_squares = x_gram.diagonal(dim1=1, dim2=2)
        yield (
            products.unflatten(1, (-1, both)),
            g_squares.unflatten(0, (-1, both)),
            x_squares.unflatten(0, (-1, both)),
        )


def _samples_at_once(matrices: Matrices) -> int:
    """Of how many samples Gram matrices are made together."""
    g = matrices.term.g
    gram_entries = matrices.size(matrices.shared) ** 2
    sample_bytes = gram_entries * len(g) * matrices.size(matrices.both) * g.element_size()
    return max(1, CHUNK_BYTES // max(1, sample_bytes))


def _gram(x: Tensor) -> Tensor:
    """⟨x_s, x_t⟩ for `x [b, i, s]`."""
    return onednn.bmm(x.mT, x)
