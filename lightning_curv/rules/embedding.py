"""Tables that are read at places that the data name.

Embeddings are linear maps of one-hot inputs that are never written out; `F.grid_sample` weighs the
entries around a place instead of picking one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_curv.errors import UnsupportedError
from lightning_curv.rules.registry import Call, leading_axes, rule
from lightning_curv.terms.term import Term


@rule(
    F.embedding,
    parameters=("weight",),
    axes=leading_axes(1),
    needs_values=lambda arguments: ("input",),
)
def embedding(
    call: Call,
    g: Tensor,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> dict[str, Term]:
    """`F.embedding`; the row `padding_idx` gets no gradient."""
    _refuse_frequencies(scale_grad_by_freq)
    classes = weight.shape[0]
    index = call.rows(input).reshape(g.shape[1], -1)
    if padding_idx is not None:
        index = index.masked_fill(index == padding_idx % classes, -1)
    g = g.reshape(*g.shape[:2], index.shape[1], g.shape[-1])
    return {"weight": Term("so", "si", "io", g, index, classes)}


@rule(
    F.embedding_bag,
    parameters=("weight",),
    needs_values=lambda arguments: ("input", "offsets", "per_sample_weights"),
)
def embedding_bag(
    call: Call,
    g: Tensor,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> dict[str, Term]:
    """`F.embedding_bag`: an embedding whose tokens share the cotangent of their bag."""
    _refuse_frequencies(scale_grad_by_freq)
    place = torch.arange(input.numel(), device=input.device).reshape(input.shape)
    if offsets is not None:
        place = _bags(offsets[:-1] if include_last_offset else offsets, len(input))
    index = input.flatten()[place].masked_fill(place < 0, -1)  # [N, tokens]
    if padding_idx is not None:
        index = index.masked_fill(index == padding_idx % len(weight), -1)
    # The share of every token in the cotangent of its bag, per feature or for all of them.
    if mode == "max":
        values = weight[index].masked_fill((index < 0).unsqueeze(-1), -torch.inf)
        largest = values.argmax(1, keepdim=True)
        share = torch.zeros_like(values).scatter_(1, largest, 1.0)
    elif mode == "mean":
        lengths = (index >= 0).sum(1).clamp(min=1)
        share = 1 / lengths.to(g.dtype)[:, None, None]
    elif per_sample_weights is None:
        share = g.new_ones(())
    else:
        share = per_sample_weights.flatten()[place].unsqueeze(-1)
    by_token = (g.unsqueeze(2) * share).expand(-1, -1, index.shape[1], -1)
    return {"weight": Term("so", "si", "io", by_token, index, len(weight))}


def _places(call: Call, arguments: dict[str, Any]) -> range:
    """The axes of the places where a table is read; none where there is a table per sample."""
    return range(2 if len(arguments["input"]) == 1 else len(call.shape), len(call.shape))


@rule(
    F.grid_sample,
    parameters=("input",),
    axes=_places,
    # Every place has coordinates of its own, and a table per sample is read by its own sample.
    keeps=lambda call, arguments: [0, *range(2, len(call.shape))],
    needs_values=lambda arguments: ("grid",),
)
def grid_sample(
    call: Call,
    g: Tensor,
    input: Tensor,
    grid: Tensor,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool | None = None,
) -> dict[str, Term]:
    """`F.grid_sample` of one table `[1, C, *]`: position tables of any resolution, feature planes.

    What is read is linear in the table, and the same for all channels.
    """
    sizes = input.shape[2:]
    entries = math.prod(sizes)
    # A table with a channel per entry, which is one there and zero elsewhere: it reads the weights.
    each = torch.eye(entries, dtype=grid.dtype, device=grid.device).reshape(1, entries, *sizes)
    weights = F.grid_sample(each, grid, mode, padding_mode, align_corners)
    weights = call.rows(weights).reshape(g.shape[1], entries, -1)
    g = g.reshape(*g.shape[:2], call.shape[1], -1)
    return {"input": Term("ds", "es", "de", g, weights.to(g.dtype))}


def rows_of(call: Call, g: Tensor, table: Tensor, index: Tensor) -> Term:
    """The term of a parameter whose leading axis is indexed: rows, or matrices of experts.

    Args:
        call: The recorded call.
        g: Cotangents, `[V, N, *]`.
        table: The parameter.
        index: Integers, of the shape of the output without the axes behind the first of `table`.
    """
    index = (call.rows(index) % len(table)).reshape(g.shape[1], -1)
    # A Kronecker factor for the entries of a matrix would have its size squared.
    feature = "o" if table.ndim == 2 else "d"
    g = g.reshape(*g.shape[:2], index.shape[1], -1)
    return Term("s" + feature, "si", "i" + feature, g, index, len(table))


def _bags(starts: Tensor, length: int) -> Tensor:
    """The place of every token of every bag, `[N, longest]`; -1 behind the end of a bag."""
    ends = torch.cat([starts[1:], starts.new_tensor([length])])
    longest = int((ends - starts).max())
    place = starts[:, None] + torch.arange(longest, device=starts.device)
    return place.masked_fill(place >= ends[:, None], -1)


def _refuse_frequencies(scale_grad_by_freq: bool) -> None:
    if scale_grad_by_freq:
        raise UnsupportedError(
            "Per-sample quantities need an embedding whose rows do not depend on the batch, found "
            "`scale_grad_by_freq=True`, which divides by counts over the whole batch. Use "
            "`scale_grad_by_freq=False`."
        )
