"""A term seen from its parameter: axes that are swapped or cut, and the op applied to a vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_curv.kernels import onednn
from lightning_curv.terms.term import Term


def permuted(term: Term, shape: Sequence[int], source: Sequence[int]) -> Term | None:
    """The term of a tensor that the parameter is a permutation of.

    Args:
        term: That of the permuted tensor; no one-hot inputs.
        shape: The shape of the permuted tensor.
        source: For each of its axes, the axis of the tensor that it came from.

    Returns:
        The term; `None` where the axes do not separate what the term multiplies.
    """
    letters = _letters_by_axis(term, shape)
    if letters is None or term.classes:
        return None
    by_source = dict(zip(source, letters, strict=True))
    return replace(term, par="".join(by_source[axis] for axis in range(len(letters))), adjoint=None)


def uncut(term: Term, shape: Sequence[int], axis: int, index: Tensor, size: int) -> Term | None:
    """The term of a tensor that the parameter is a part of: zeros stand for what was cut off.

    Args:
        term: That of the part; no one-hot inputs.
        shape: The shape of the part.
        axis: The axis along which it was cut.
        index: Which entries of that axis the part has.
        size: How many there were.

    Returns:
        The term; `None` where the axes do not separate what the term multiplies.
    """
    letters = _letters_by_axis(term, shape)
    if letters is None or len(letters[axis]) != 1 or term.classes:
        return None

    def padded(tensor: Tensor, letters_of: str, lead: int) -> Tensor:
        if letters[axis] not in letters_of:
            return tensor
        dim = lead + letters_of.index(letters[axis])
        whole_shape = [*tensor.shape[:dim], size, *tensor.shape[dim + 1 :]]
        return tensor.new_zeros(whole_shape).index_copy(dim, index, tensor)

    x = None if term.x is None else padded(term.x, term.inp, 1)
    return replace(term, g=padded(term.g, term.out, 2), x=x, adjoint=None)


def applied(term: Term, vector: Tensor) -> Tensor:
    """The op applied to a vector in place of its parameter: the transpose of what the term does.

    Args:
        term: The term, whose cotangents are not read; no one-hot inputs.
        vector: Like the parameter.

    Returns:
        What broadcasts to one column of the cotangents, `[N, *out]`.
    """
    sizes = term.sizes()
    vector = vector.reshape([sizes[letter] for letter in term.par])
    # The axes that the result has; it is the same along all others.
    known = "n" + term.par + term.inp
    letters = "".join(letter for letter in term.out if letter in known)
    if term.x is None:
        image = torch.einsum(f"{term.par}->{letters}", vector)[None]
    else:
        image = onednn.einsum(f"n{term.inp},{term.par}->n{letters}", term.x, vector)
    return image[tuple(slice(None) if letter in known else None for letter in "n" + term.out)]


def _letters_by_axis(term: Term, shape: Sequence[int]) -> list[str] | None:
    """The letters of every axis of a value; `None`: the axes do not separate them."""
    sizes = term.sizes()
    remaining = list(term.par)
    groups = []
    for size in shape:
        group = ""
        count = 1
        while remaining and (count < size or (not group and size == sizes[remaining[0]])):
            group = group + remaining[0]
            count = count * sizes[remaining.pop(0)]
        if count != size:
            return None
        groups.append(group)
    return groups if not remaining else None
