"""Convolutions: products of the weight with patches of the padded input, or of the output where transposed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_curv.rules.registry import Call, rule
from lightning_curv.terms import Adjoint, Term

Sizes = int | tuple[int, ...]
VECTOR, LARGEST = 8, 2**16  # of `_by_groups`: channels of a group, entries of the weight


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
    stride, dilation = _per_axis(stride, dims), _per_axis(dilation, dims)
    pads = _pads(weight, padding, dilation)
    padded = _padded(input, pads)
    x = patches(padded, weight, stride, dilation, groups)
    q, by_group = ("", g) if groups == 1 else ("q", g.unflatten(2, (groups, -1)))
    x = x[:, 0] if groups == 1 else x
    even = all(before == after for before, after in pads)  # the op itself can pad: faster
    settings = stride, [before if even else 0 for before, _ in pads], dilation

    def gradient(g: Tensor, input: Tensor) -> Tensor:
        return weight_gradient(g.flatten(1, 2) if q else g, input, weight, *settings, groups)

    def gradients(g: Tensor, input: Tensor) -> Tensor:
        """Every sample is a group of its own."""
        n, shape = len(g), weight.shape
        g, input = g.flatten(0, 2 if q else 1)[None], input.flatten(0, 1)[None]
        some = weight.new_empty(n * shape[0], *shape[1:])
        return weight_gradient(g, input, some, *settings, n * groups).unflatten(0, (n, -1))

    separate = gradients if _by_groups(input, weight, groups) else None
    own = Adjoint(x, input if even else padded, gradient, separate)
    weight_term = Term(q + "o" + s, q + "i" + k + s, q + "oi" + k, by_group, x, adjoint=own)
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
    stride, dilation = _per_axis(stride, dims), _per_axis(dilation, dims)
    padded = _padded(g.flatten(0, 1), _pads(weight, padding, dilation))
    written = patches(padded, weight, stride, dilation, groups).unflatten(0, g.shape[:2])
    for axis, size in enumerate(input.shape[2:]):  # output_padding may add room for one more
        written = written.narrow(axis - dims, 0, size)
    if groups == 1:
        weight_term = Term("o" + k + s, "i" + s, "io" + k, written[:, :, 0], input)
    else:
        weight_term = Term("qo" + k + s, "qi" + s, "qio" + k, written, input.unflatten(1, (groups, -1)))
    return {"weight": weight_term, "bias": Term("o" + s, "", "o", g)}


def patches(input: Tensor, weight: Tensor, stride: tuple[int, ...], dilation: tuple[int, ...], groups: int) -> Tensor:
    """The receptive fields ``[N, groups, in/groups, *kernel, *positions]``, a view of the padded input."""
    kernel = weight.shape[2:]
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


def _pads(weight: Tensor, padding: Sizes | str, dilation: tuple[int, ...]) -> list[tuple[int, int]]:
    """Zeros before and after the input, per axis."""
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        return [(t // 2, t - t // 2) for t in total]
    return [(p, p) for p in _per_axis(0 if isinstance(padding, str) else padding, len(dilation))]


def _padded(input: Tensor, pads: list[tuple[int, int]]) -> Tensor:
    return F.pad(input, [p for pair in reversed(pads) for p in pair]) if any(map(any, pads)) else input


def weight_gradient(
    g: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: tuple[int, ...],
    padding: list[int],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """The gradient by a weight whose shape alone is looked at."""
    none, mask = [0] * len(stride), [False, True, False]
    found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward.default(
        g, input, weight, None, stride, padding, dilation, False, none, groups, mask
    )
    return found[1]


def _by_groups(input: Tensor, weight: Tensor, groups: int) -> bool:
    """Whether oneDNN forms the gradients of samples as groups faster than products of patches do, measured.

    Whole vectors of channels, no copies of patches; large weights do not stay in cache.
    """
    outputs, inputs, taps = weight.shape[0] // groups, weight.shape[1], weight[0, 0].numel()
    known = input.device.type == "cpu" and input.dtype == torch.float32 and bool(torch.backends.mkldnn.enabled)
    return known and taps > 1 and not outputs % VECTOR and not inputs % VECTOR and weight.numel() <= LARGEST


def _per_axis(value: Sizes, dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values
