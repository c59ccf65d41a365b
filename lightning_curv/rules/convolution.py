"""Convolutions: products of the weight with patches of the padded input, or of the output where transposed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_curv.rules.registry import Call, rule
from lightning_curv.terms import Term

Sizes = int | tuple[int, ...]


def _batched(call: Call, arguments: dict[str, Any]) -> tuple[int, ...]:
    return (0,) if arguments["input"].ndim == arguments["weight"].ndim else ()


@rule(
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    slots=("weight", "bias"),
    axes=_batched,
    reads=lambda arguments: ("input",),
)
def convolution(
    call: Call,
    g: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> dict[str, Term]:
    """``F.conv1d``, ``F.conv2d``, ``F.conv3d``; other padding modes arrive padded."""
    dims = weight.ndim - 2
    s, k = "stu"[:dims], "xyz"[:dims]
    x = patches(input, weight, stride, padding, dilation, groups)
    by_group = g.unflatten(2, (groups, -1))
    if groups == 1:
        weight_term = Term("o" + s, "i" + k + s, "oi" + k, g, x[:, 0])
    else:
        weight_term = Term("qo" + s, "qi" + k + s, "qoi" + k, by_group, x)
    return {"weight": weight_term, "bias": Term("o" + s, "", "o", g)}


@rule(
    torch.conv_transpose1d,
    torch.conv_transpose2d,
    torch.conv_transpose3d,
    slots=("weight", "bias"),
    axes=_batched,
    reads=lambda arguments: ("input",),
)
def transposed_convolution(
    call: Call,
    g: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
) -> dict[str, Term]:
    """``F.conv_transpose1d``, ``F.conv_transpose2d``, ``F.conv_transpose3d``: each pixel writes one patch."""
    dims = weight.ndim - 2
    s, k = "stu"[:dims], "xyz"[:dims]
    written = patches(g.flatten(0, 1), weight, stride, padding, dilation, groups).unflatten(0, g.shape[:2])
    for axis, size in enumerate(input.shape[2:]):  # output_padding may add room for one more
        written = written.narrow(axis - dims, 0, size)
    if groups == 1:
        weight_term = Term("o" + k + s, "i" + s, "io" + k, written[:, :, 0], input)
    else:
        weight_term = Term("qo" + k + s, "qi" + s, "qio" + k, written, input.unflatten(1, (groups, -1)))
    return {"weight": weight_term, "bias": Term("o" + s, "", "o", g)}


def patches(input: Tensor, weight: Tensor, stride: Sizes, padding: Sizes | str, dilation: Sizes, groups: int) -> Tensor:
    """The receptive fields ``[N, groups, in/groups, *kernel, *positions]``, a view of the padded input."""
    kernel = weight.shape[2:]
    stride, dilation = _per_axis(stride, len(kernel)), _per_axis(dilation, len(kernel))
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pads = [(t // 2, t - t // 2) for t in total]
    else:
        pads = [(p, p) for p in _per_axis(0 if isinstance(padding, str) else padding, len(kernel))]
    if any(map(any, pads)):
        input = F.pad(input, [p for pair in reversed(pads) for p in pair])
    fields = list(zip(input.shape[2:], kernel, stride, dilation, strict=True))
    positions = [(size - d * (k - 1) - 1) // step + 1 for size, k, step, d in fields]
    n, c, *steps = input.stride()
    channels = input.shape[1] // groups
    return input.as_strided(
        (input.shape[0], groups, channels, *kernel, *positions),
        (
            n,
            c * channels,
            c,
            *(s * d for s, d in zip(steps, dilation, strict=True)),
            *(s * d for s, d in zip(steps, stride, strict=True)),
        ),
    )


def _per_axis(value: Sizes, dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values
