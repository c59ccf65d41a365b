"""Squares of tensors: of complex numbers, with signs, summed over columns."""

from __future__ import annotations

import torch
from torch import Tensor

SMALL = 2**14  # entries of a column up to which the squares of all columns are made at once


def squared_sizes(tensor: Tensor) -> Tensor:
    """The squared absolute values of all entries: real numbers, those of complex ones too."""
    if not tensor.is_complex():
        return tensor.square()
    return torch.view_as_real(tensor.resolve_conj()).square().sum(-1)


def signed(squares: Tensor, signs: Tensor | None) -> Tensor:
    """`squares [V, N, *]` times `signs [V, N]`, which may come from a layer on another device."""
    if signs is None:
        return squares
    trailing_ones = [1] * (squares.ndim - 2)
    return squares * signs.to(squares.device).reshape(*signs.shape, *trailing_ones)


def squares_of_columns(g: Tensor, signs: Tensor | None = None) -> Tensor:
    """The sum of the squares over the columns, `[1, N, *]`.

    Large columns are added up one after the other: their squares are never all in memory.
    """
    if len(g) == 1 or g[0].numel() < SMALL or g.is_complex():
        squares = signed(squared_sizes(g), signs)
        if len(g) == 1:
            return squares
        return squares.sum(0, keepdim=True)
    total = torch.zeros_like(g[:1])
    for number, column in enumerate(g.unbind()):
        factor = column
        if signs is not None:
            sign_of_column = signs[number : number + 1]
            factor = signed(column[None], sign_of_column)[0]
        total[0].addcmul_(column, factor)
    return total
