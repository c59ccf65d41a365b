"""Norms of per-sample gradients by Gram matrices of the shared positions."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from lightning_curv.kernels import onednn
from lightning_curv.kernels.memo import Latest
from lightning_curv.terms.chunks import CHUNK_BYTES, Matrices
from lightning_curv.terms.safe_norms import product_norms, row_norms
from lightning_curv.terms.term import ROUNDING, Term

_GRAMS = Latest(), Latest()  # of cotangents, of inputs
RANGE = {
    torch.float32: (2.0**-50, 2.0**50),
    torch.float64: (2.0**-400, 2.0**400),
}  # of the squares of usual factors


def pay(term: Term) -> bool:
    """Whether Gram matrices over the shared positions are cheaper than the per-sample gradient; crossover measured."""
    m = Matrices(term)
    out, inp = m.size(m.outputs), m.size(m.inputs)
    return m.regular and m.size(m.shared) * (out + inp) <= 1.25 * out * inp


def squared_norms(term: Term) -> Tensor:
    """‖Σ_s g_s ⊗ x_s‖² = Σ_{s,t} ⟨g_s, g_t⟩ ⟨x_s, x_t⟩ per column and sample; both Gram matrices in chunks."""
    found = [products.sum(2) for products, *_ in _products(term)]
    return torch.cat(found, dim=1).clamp_(min=0)


def norms(term: Term) -> tuple[Tensor, Tensor]:
    """The roots of the same, rounded up, and Σ_s ‖g_s‖ ‖x_s‖: where that is much more, positions cancel.

    Both ``[V, N]`` of float64.

    What rounding may take away is added: `ROUNDING` times (Σ_s ‖g_s‖ ‖x_s‖)², which is more than
    the rest where large positions cancel. Samples whose Gram matrices may underflow or overflow get
    Σ_s ‖g_s‖ ‖x_s‖ itself.
    """
    found, every, start = [], [], 0
    for products in _products(term):
        norms, sizes, odd = _rounded_up(*products, term.g.dtype)
        if len(odd):
            g, x = Matrices(term[(odd + start).tolist()]).of(
                0, len(odd)
            )  # [n, q, V·o, s], [n, q, i, s]
            # positions that a sample does not have may be filled up with anything: numbers of other
            # samples; what is not finite stays, for it would be in the sum too
            x = x.masked_fill((g == 0).all(2, keepdim=True) & x.isfinite(), 0)
            g = g.unflatten(2, (len(term.g), -1))
            norms[:, odd], sizes[:, odd], still = _rounded_up(*_products_of(g, x), term.g.dtype)
            odd, g, x = odd[still], g[still], x[still]
            bounds = product_norms(
                row_norms(g.transpose(3, 4), 4), row_norms(x.mT, 3).unsqueeze(2), g.dtype
            )
            norms[:, odd] = sizes[:, odd] = bounds.sum((1, 3)).mT
        start += norms.shape[1]
        found.append(norms)
        every.append(sizes)
    return torch.cat(found, dim=1), torch.cat(every, dim=1)


def _rounded_up(
    products: Tensor, g_squares: Tensor, x_squares: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Norms and sizes ``[V, n]``, and the samples whose Gram matrices may underflow or overflow; see `_products`."""
    sizes = g_squares.sqrt() * x_squares.sqrt().unsqueeze(2)
    sizes_squared = sizes.sum(3).double().square_().permute(2, 0, 1)
    squares = products.clamp(min=0).double() + ROUNDING * torch.finfo(dtype).eps * sizes_squared
    low, high = RANGE[dtype]
    g_total, x_total = g_squares.sum(3).permute(2, 0, 1), x_squares.sum(2)[None]
    usual = (g_total > low) & (g_total < high) & (x_total > low) & (x_total < high)
    odd = (~usual.all(2).all(0)).nonzero().flatten()
    return squares.sum(2).sqrt(), sizes_squared.sum(2).sqrt(), odd


def _products_of(g: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`_products` of ``g [n, q, V, o, s]`` and ``x [n, q, i, s]``."""
    g_gram, x_gram = g.mT @ g, x.mT @ x
    products = torch.einsum("nqvst,nqst->vnq", g_gram, x_gram)
    return products, g_gram.diagonal(dim1=3, dim2=4), x_gram.diagonal(dim1=2, dim2=3)


def _products(term: Term) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of some samples: ``[V, n, q]``, and ‖g_s‖² ``[n, q, V, s]`` and ‖x_s‖² ``[n, q, s]``."""
    m = Matrices(term)
    assert term.x is not None
    columns, both = len(term.g), m.size(m.both)
    size = max(
        1, CHUNK_BYTES // max(1, m.size(m.shared) ** 2 * columns * both * term.g.element_size())
    )
    for start in range(0, term.g.shape[1], size):
        g, x = m.of(start, start + size)  # [n, q, V·o, s], [n, q, i, s]
        x = x.flatten(0, 1)
        g = g.flatten(0, 1).unflatten(1, (columns, -1))
        rest = start, size, *m.both, *m.shared
        g_gram, _ = _GRAMS[0].of(term.g, (term.out, *rest), partial(_gram, g.flatten(0, 1)))
        x_gram, _ = _GRAMS[1].of(term.x, (term.inp, *rest), partial(_gram, x))
        g_gram = g_gram.unflatten(0, (-1, columns))
        products = torch.einsum("bvst,bst->vb", g_gram, x_gram).unflatten(1, (-1, both))
        g_squares = g_gram.diagonal(dim1=2, dim2=3).unflatten(0, (-1, both))
        yield products, g_squares, x_gram.diagonal(dim1=1, dim2=2).unflatten(0, (-1, both))


def _gram(x: Tensor) -> Tensor:
    """⟨x_s, x_t⟩ for ``x [b, i, s]``."""
    return onednn.bmm(x.mT, x)
