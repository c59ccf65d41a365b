"""Convolutions: products of the weight with patches of the padded input.

The input of a transposed convolution is spread out first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_curv.rules.registry import Call, rule
from lightning_curv.terms.term import Adjoint, Term

Sizes = int | tuple[int, ...]
Settings = tuple[tuple[int, ...], list[int], tuple[int, ...]]
VECTOR = 8  # channels of a group, in multiples of which oneDNN uses whole vectors: `_by_groups`
LARGEST = 2**16  # entries of a weight that stays in cache: `_by_groups`


def _batched(call: Call, arguments: dict[str, Any]) -> tuple[int, ...]:
    """The axes that may carry samples: none where a single image came without a batch axis."""
    if arguments["input"].ndim == arguments["weight"].ndim:
        return (0,)
    return ()


@rule(
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    parameters=("weight", "bias"),
    axes=_batched,
    needs_values=lambda arguments: ("input", "weight"),  # its shape, where it is frozen
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
    """`F.conv1d`, `F.conv2d`, `F.conv3d`; other padding modes arrive padded."""
    dims = weight.ndim - 2
    s = "stu"[:dims]
    k = "xyz"[:dims]
    stride = _per_axis(stride, dims)
    dilation = _per_axis(dilation, dims)
    pads = _pads(weight, padding, dilation)
    padded = _padded(input, pads)
    x = patches(padded, weight, stride, dilation, groups)
    q, x, by_group = _grouped(x, g, groups)
    even = all(before == after for before, after in pads)
    if even:  # the op itself can pad, which is faster
        own_input = input
        own_padding = [before for before, _ in pads]
    else:
        own_input = padded
        own_padding = [0] * dims
    own = _adjoint(x, own_input, weight, (stride, own_padding, dilation), groups)
    out = q + "o" + s
    inp = q + "i" + k + s
    par = q + "oi" + k
    return {
        "weight": Term(out, inp, par, by_group, x, adjoint=own),
        "bias": Term("o" + s, "", "o", g),
    }


@rule(
    torch.conv_transpose1d,
    torch.conv_transpose2d,
    torch.conv_transpose3d,
    parameters=("weight", "bias"),
    axes=_batched,
    needs_values=lambda arguments: ("input", "weight"),  # its shape, where it is frozen
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
    """`F.conv_transpose1d`, `F.conv_transpose2d`, `F.conv_transpose3d`.

    They are convolutions of a spread input. Positions are the pixels of the output. They run
    backwards, so that the patches that they see are views.
    """
    dims = weight.ndim - 2
    kernel = weight.shape[2:]
    s = "stu"[:dims]
    k = "xyz"[:dims]
    stride = _per_axis(stride, dims)
    dilation = _per_axis(dilation, dims)
    backwards = [axis for axis in range(dims) if kernel[axis] > 1]
    spread = _spread(input, stride).flip([2 + axis for axis in backwards])
    padded = _padded(spread, _transposed_pads(kernel, padding, output_padding, dilation))
    x = patches(padded, weight, (1,) * dims, dilation, groups)
    shown = _flipped(g, [3 + axis for axis in backwards])
    q, x, by_group = _grouped(x, shown, groups)
    # A weight of the shape that a convolution of the spread input has; it takes no memory.
    outputs_first = weight.new_empty(()).expand(g.shape[2], len(weight) // groups, *kernel)
    settings = (1,) * dims, [0] * dims, dilation
    own = _adjoint(x, padded, outputs_first, settings, groups, transposed=True)
    out = q + "o" + s
    inp = q + "i" + k + s
    par = q + "io" + k
    return {
        "weight": Term(out, inp, par, by_group, x, adjoint=own),
        "bias": Term("o" + s, "", "o", g),
    }


def _grouped(x: Tensor, g: Tensor, groups: int) -> tuple[str, Tensor, Tensor]:
    """The letter of the groups, patches and cotangents: without that axis if there is one group."""
    if groups == 1:
        return "", x[:, 0], g
    return "q", x, g.unflatten(2, (groups, -1))


def patches(
    input: Tensor,
    weight: Tensor,
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """The receptive fields, `[N, groups, in/groups, *kernel, *positions]`.

    They are a view of the padded input: pixels of overlapping fields are the same memory.
    """
    kernel = weight.shape[2:]
    positions = []
    for size, taps, step, gap in zip(input.shape[2:], kernel, stride, dilation, strict=True):
        field = gap * (taps - 1) + 1
        positions.append((size - field) // step + 1)
    channels = input.shape[1] // groups
    by_sample, by_channel, *by_pixel = input.stride()
    by_tap = [pixel * gap for pixel, gap in zip(by_pixel, dilation, strict=True)]
    by_position = [pixel * step for pixel, step in zip(by_pixel, stride, strict=True)]
    return input.as_strided(
        (input.shape[0], groups, channels, *kernel, *positions),
        (by_sample, by_channel * channels, by_channel, *by_tap, *by_position),
    )


def _pads(
    weight: Tensor,
    padding: Sizes | str,
    dilation: tuple[int, ...],
) -> list[tuple[int, int]]:
    """Zeros before and after the input, per axis."""
    if padding == "same":
        kernel = weight.shape[2:]
        totals = [gap * (taps - 1) for gap, taps in zip(dilation, kernel, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    zeros = 0 if isinstance(padding, str) else padding  # the other word is "valid"
    return [(before, before) for before in _per_axis(zeros, len(dilation))]


def _transposed_pads(
    kernel: Sequence[int],
    padding: Sizes,
    output_padding: Sizes,
    dilation: tuple[int, ...],
) -> list[tuple[int, int]]:
    """Zeros before and after the spread input of a transposed convolution, per axis.

    Negative numbers are pixels that are cut off.
    """
    dims = len(kernel)
    cropped = _per_axis(padding, dims)
    added = _per_axis(output_padding, dims)
    pads = []
    for taps, crop, more, gap in zip(kernel, cropped, added, dilation, strict=True):
        before = gap * (taps - 1) - crop
        after = before + more
        # Axes with several taps run backwards, see `transposed_convolution`.
        pads.append((after, before) if taps > 1 else (before, after))
    return pads


def _spread(input: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The input with `stride - 1` zeros between its pixels."""
    if max(stride) == 1:
        return input
    sizes = [(size - 1) * step + 1 for size, step in zip(input.shape[2:], stride, strict=True)]
    spread = input.new_zeros(*input.shape[:2], *sizes)
    places = (slice(None), slice(None), *(slice(None, None, step) for step in stride))
    spread[places] = input
    return spread


def _flipped(g: Tensor, axes: list[int]) -> Tensor:
    """Cotangents with reversed axes; those that are equal in all samples stay one in memory."""
    same = g.shape[1] > 1 and not g.stride(1)
    if same:
        return g[:, :1].flip(axes).expand(g.shape)
    return g.flip(axes) if axes else g


def _padded(input: Tensor, pads: list[tuple[int, int]]) -> Tensor:
    """The input with zeros around it; `F.pad` takes the last axis first."""
    if not any(map(any, pads)):
        return input
    return F.pad(input, [zeros for pair in reversed(pads) for zeros in pair])


def _adjoint(
    x: Tensor,
    input: Tensor,
    weight: Tensor,
    settings: Settings,
    groups: int,
    transposed: bool = False,
) -> Adjoint:
    """The weight's gradients by a convolution's own backward function.

    Args:
        x: The inputs of the term.
        input: What the convolution is applied to.
        weight: Has the shape of the convolution's weight; nothing else of it is looked at.
        settings: Stride, padding and dilation.
        groups: Of the convolution.
        transposed: Whether the parameter has its inputs before its outputs.
    """

    def flat(g: Tensor) -> Tensor:
        return g if groups == 1 else g.flatten(1, 2)

    def ordered(gradients: Tensor) -> Tensor:
        """`[*, out, in/groups, *kernel]`, or with the two axes swapped in every group."""
        if not transposed:
            return gradients
        axis = gradients.ndim - weight.ndim
        by_group = gradients.unflatten(axis, (groups, -1))
        return by_group.transpose(axis + 1, axis + 2)

    def gradient(g: Tensor, input: Tensor) -> Tensor:
        return ordered(weight_gradient(flat(g), input, weight, *settings, groups))

    def gradients(g: Tensor, input: Tensor) -> Tensor:
        """Every sample is a group of its own."""
        samples, (outputs, *rest) = len(g), weight.shape
        g = flat(g).flatten(0, 1)[None]
        input = input.flatten(0, 1)[None]
        weights = weight.new_empty(samples * outputs, *rest)
        stacked = weight_gradient(g, input, weights, *settings, samples * groups)
        return ordered(stacked.unflatten(0, (samples, -1)))

    fast = _by_groups(input, weight, groups)
    return Adjoint(x, input, gradient, gradients if fast else None)


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
    output_padding = [0] * len(stride)
    wanted = [False, True, False]  # by the input, the weight, the bias
    gradients: tuple[Tensor, ...] = torch.ops.aten.convolution_backward.default(
        g,
        input,
        weight,
        None,
        stride,
        padding,
        dilation,
        False,
        output_padding,
        groups,
        wanted,
    )
    return gradients[1]


def _by_groups(input: Tensor, weight: Tensor, groups: int) -> bool:
    """Whether oneDNN forms samples' gradients as groups faster than products of patches do.

    This was measured. It uses whole vectors of channels and makes no copies of patches; large
    weights do not stay in cache.
    """
    in_float32 = input.device.type == "cpu" and input.dtype == torch.float32
    if not (in_float32 and torch.backends.mkldnn.enabled):
        return False
    outputs = weight.shape[0] // groups
    inputs = weight.shape[1]
    taps = weight[0, 0].numel()
    whole_vectors = outputs % VECTOR == 0 and inputs % VECTOR == 0
    return taps > 1 and whole_vectors and weight.numel() <= LARGEST


def _per_axis(value: Sizes, dims: int) -> tuple[int, ...]:
    """A setting of a convolution for every axis."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values
