"""Convolutions: products of the weight with patches of the padded input, or of the output where transposed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from lightning_curv.rules.registry import Call, rule
from lightning_curv.terms import Adjoint, Term

Sizes = int | tuple[int, ...]
GRADIENTS = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}


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
    padded = _padded(input, weight, padding, dilation)
    x = patches(padded, weight, stride, 0, dilation, groups)
    q, by_group = ("", g) if groups == 1 else ("q", g.unflatten(2, (groups, -1)))
    x = x[:, 0] if groups == 1 else x

    def gradient(g: Tensor) -> Tensor:
        g = g.flatten(1, 2) if q else g
        return GRADIENTS[dims](padded, weight.shape, g, stride, 0, dilation, groups)

    weight_term = Term(q + "o" + s, q + "i" + k + s, q + "oi" + k, by_group, x, adjoint=Adjoint(x, gradient))
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
    input = _padded(input, weight, padding, dilation)
    stride, dilation = _per_axis(stride, len(kernel)), _per_axis(dilation, len(kernel))
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


def _padded(input: Tensor, weight: Tensor, padding: Sizes | str, dilation: Sizes) -> Tensor:
    kernel = weight.shape[2:]
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(_per_axis(dilation, len(kernel)), kernel, strict=True)]
        pads = [(t // 2, t - t // 2) for t in total]
    else:
        pads = [(p, p) for p in _per_axis(0 if isinstance(padding, str) else padding, len(kernel))]
    return F.pad(input, [p for pair in reversed(pads) for p in pair]) if any(map(any, pads)) else input


def _per_axis(value: Sizes, dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values
