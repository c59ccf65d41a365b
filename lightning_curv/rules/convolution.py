"""Convolutions: products of the weight with patches of the padded input, spread out first where transposed."""

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

    own = _adjoint(x, input if even else padded, weight, settings, groups)
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
    """``F.conv_transpose1d``, ``F.conv_transpose2d``, ``F.conv_transpose3d``: convolutions of a spread input.

    Positions are the pixels of the output. They run backwards, so that the patches that they see
    are views.
    """
    dims = weight.ndim - 2
    s, k, kernel = "stu"[:dims], "xyz"[:dims], weight.shape[2:]
    stride, dilation = _per_axis(stride, dims), _per_axis(dilation, dims)
    backwards = [axis for axis in range(dims) if kernel[axis] > 1]
    spread = _spread(input, stride).flip([2 + axis for axis in backwards])
    padded = _padded(spread, _transposed_pads(kernel, padding, output_padding, dilation))
    x = patches(padded, weight, (1,) * dims, dilation, groups)
    shown = _flipped(g, [3 + axis for axis in backwards])
    q, x, shown = (
        ("", x[:, 0], shown) if groups == 1 else ("q", x, shown.unflatten(2, (groups, -1)))
    )
    outputs_first = weight.new_empty(()).expand(g.shape[2], len(weight) // groups, *kernel)
    settings = (1,) * dims, [0] * dims, dilation
    own = _adjoint(x, padded, outputs_first, settings, groups, transposed=True)
    weight_term = Term(q + "o" + s, q + "i" + k + s, q + "io" + k, shown, x, adjoint=own)
    return {"weight": weight_term, "bias": Term("o" + s, "", "o", g)}


def patches(
    input: Tensor, weight: Tensor, stride: tuple[int, ...], dilation: tuple[int, ...], groups: int
) -> Tensor:
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


def _transposed_pads(
    kernel: Sequence[int], padding: Sizes, output_padding: Sizes, dilation: tuple[int, ...]
) -> list[tuple[int, int]]:
    """Zeros before and after the spread input of a transposed convolution, per axis; negative: what is cut off."""
    dims = len(kernel)
    settings = zip(
        kernel, _per_axis(padding, dims), _per_axis(output_padding, dims), dilation, strict=True
    )
    pads = [(d * (k - 1) - p, d * (k - 1) - p + more) for k, p, more, d in settings]
    return [pair[::-1] if k > 1 else pair for pair, k in zip(pads, kernel, strict=True)]


def _spread(input: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The input with ``stride - 1`` zeros between its pixels."""
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
    return g[:, :1].flip(axes).expand(g.shape) if same else g.flip(axes) if axes else g


def _padded(input: Tensor, pads: list[tuple[int, int]]) -> Tensor:
    return (
        F.pad(input, [p for pair in reversed(pads) for p in pair]) if any(map(any, pads)) else input
    )


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

    def ordered(found: Tensor) -> Tensor:
        """``[*, out, in/groups, *kernel]``, or with the two axes swapped in every group."""
        axis = found.ndim - weight.ndim
        return (
            found.unflatten(axis, (groups, -1)).transpose(axis + 1, axis + 2)
            if transposed
            else found
        )

    def gradient(g: Tensor, input: Tensor) -> Tensor:
        return ordered(weight_gradient(flat(g), input, weight, *settings, groups))

    def gradients(g: Tensor, input: Tensor) -> Tensor:
        """Every sample is a group of its own."""
        n, shape = len(g), weight.shape
        g, input = flat(g).flatten(0, 1)[None], input.flatten(0, 1)[None]
        some = weight.new_empty(n * shape[0], *shape[1:])
        return ordered(weight_gradient(g, input, some, *settings, n * groups).unflatten(0, (n, -1)))

    return Adjoint(x, input, gradient, gradients if _by_groups(input, weight, groups) else None)


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
    known = (
        input.device.type == "cpu"
        and input.dtype == torch.float32
        and bool(torch.backends.mkldnn.enabled)
    )
    return (
        known
        and taps > 1
        and not outputs % VECTOR
        and not inputs % VECTOR
        and weight.numel() <= LARGEST
    )


def _per_axis(value: Sizes, dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values
