"""Directional derivatives of the recorded columns along several directions at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_curv.terms.chunks import CHUNK_BYTES
from lightning_curv.terms.jacobian import Jacobian
from lightning_curv.terms.term import KERNEL, SHARED, Term

# The convolutions with as many spatial axes.
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def directional_derivatives(jacobian: Jacobian, vectors: Tensor) -> Tensor:
    """Inner products of J[v, n] with vectors of the parameter's shape.

    It is `Jacobian.dot` for several vectors: the inputs are read once for all of them, and a
    convolution is applied as one.

    Args:
        jacobian: Of a parameter.
        vectors: The directions, `[K, *p]`.

    Returns:
        The products, `[K, V, N]`.
    """
    terms = jacobian.terms
    if len(terms) == 1 and _forming_pays(terms[0], len(vectors)):
        flat_vectors = vectors.to(terms[0].g.dtype).flatten(1).mT
        products_of_chunks = [chunk.flatten(2) @ flat_vectors for chunk in jacobian.chunks()]
        by_sample = torch.cat(products_of_chunks, dim=1)  # [V, N, K]
        return by_sample.movedim(2, 0)
    products = [_products(term, vectors.to(term.g.dtype)) for term in terms]
    if len(products) == 1:
        return products[0]
    return torch.stack(products).sum(0)


def _forming_pays(term: Term, count: int) -> bool:
    """Whether it is cheaper to form the gradients of single samples first.

    That is where a matrix meets many positions of every sample.
    """
    if term.x is None or term.classes or len(term.g) > 1 or {*term.par} != {"o", "i"}:
        return False
    positions = term.positions
    return positions > 1 and term.sizes()["i"] <= count * positions


def _products(term: Term, vectors: Tensor) -> Tensor:
    """The part of one term, [K, V, N]; small and frequent ops without the cost of a general one."""
    if term.classes:
        return torch.stack([Jacobian(vectors[0], [term]).dot(vector) for vector in vectors])
    is_bias = (term.out, term.par) == ("o", "o") and term.x is None
    if is_bias:
        return (term.g @ vectors.mT).movedim(2, 0)
    is_linear_layer = (term.out, term.inp, term.par) == ("o", "i", "oi")
    if is_linear_layer and term.x is not None:
        return _products_of_linear_layer(term.x, term.g, vectors)
    sizes = term.sizes()
    vectors = vectors.reshape(-1, *(sizes[letter] for letter in term.par))
    if term.x is None:
        return torch.einsum(f"vn{term.out},K{term.par}->Kvn", term.g, vectors)
    # Outputs for all vectors take memory: some samples at a time.
    output_entries = math.prod(term.g.shape[2:])
    input_entries = math.prod(term.x.shape[1:])
    sample_entries = len(vectors) * max(output_entries, input_entries)
    sample_bytes = sample_entries * term.g.element_size()
    size = max(1, 4 * CHUNK_BYTES // max(1, sample_bytes))
    parts = []
    for start in range(0, max(1, len(term.x)), size):
        some_samples = term[start : start + size]
        parts.append(_outputs_times_cotangents(some_samples, vectors))
    return torch.cat(parts, dim=2)


def _products_of_linear_layer(x: Tensor, g: Tensor, vectors: Tensor) -> Tensor:
    """The layer's outputs for every vector as its weight, times the cotangents."""
    one_weight = vectors.flatten(0, 1)  # all vectors as the rows of one layer, [K·o, i]
    outputs = F.linear(x, one_weight).unflatten(1, (len(vectors), -1))  # [N, K, o]
    if len(g) == 1:  # `einsum` would make N products of matrices with one column
        products = outputs * g[0].unsqueeze(1)
        return products.sum(-1).T.unsqueeze(1)
    return torch.einsum("nko,vno->kvn", outputs, g)


def _outputs_times_cotangents(term: Term, vectors: Tensor) -> Tensor:
    """The op's outputs for every vector as its parameter, times the cotangents, [K, V, N]."""
    outputs = _convolved(term, vectors)
    if outputs is None:
        outputs = torch.einsum(f"n{term.inp},K{term.par}->Kn{term.out}", term.x, vectors)
    return torch.einsum("vna,Kna->Kvn", term.g.flatten(2), outputs.flatten(2))


def _convolved(term: Term, vectors: Tensor) -> Tensor | None:
    """The outputs of a convolution for every vector as its kernel, [K, n, *out].

    The inputs of its term are patches, which are usually a view of the input: then their strides
    tell the step and the dilation of the convolution, and they are never read as patches.

    Returns:
        None for any other op, and for patches that were copied.
    """
    dims = len(term.inp) // 2
    kernel_letters = KERNEL[:dims]
    position_letters = SHARED[1 : 1 + dims]
    if dims not in CONVOLUTIONS:
        return None
    if term.inp != "i" + kernel_letters + position_letters:
        return None
    if term.par != "oi" + kernel_letters:
        return None
    assert term.x is not None
    kernel = term.x.shape[2 : 2 + dims]
    positions = term.x.shape[2 + dims :]
    # Patches of a view overlap in memory.
    of_sample, of_channel, *strides = term.x.stride()
    of_kernel = strides[:dims]
    of_positions = strides[dims:]
    # The largest strides that an image can have along its axes.
    units = [math.gcd(a, b) for a, b in zip(of_kernel, of_positions, strict=True)]
    if not all(units):
        return None
    dilation = [stride // unit for stride, unit in zip(of_kernel, units, strict=True)]
    step = [stride // unit for stride, unit in zip(of_positions, units, strict=True)]
    size = []
    for axis in range(dims):
        within_kernel = (kernel[axis] - 1) * dilation[axis]
        between_positions = (positions[axis] - 1) * step[axis]
        size.append(within_kernel + between_positions + 1)
    # Patches that overlap cover less memory than they have entries; a copy does not overlap.
    is_copy = math.prod(size) > math.prod(kernel) * math.prod(positions)
    if is_copy:
        return None
    samples_and_channels = term.x.shape[:2]
    image = term.x.as_strided(
        (*samples_and_channels, *size),
        (of_sample, of_channel, *units),
    )
    kernels = vectors.flatten(0, 1)
    outputs = CONVOLUTIONS[dims](image, kernels, stride=step, dilation=dilation)
    by_vector = outputs.unflatten(1, (len(vectors), -1))
    return by_vector.movedim(1, 0)
