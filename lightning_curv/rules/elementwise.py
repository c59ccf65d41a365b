"""Broadcast arithmetic with a parameter: position embeddings, layer scale, class tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_curv.rules.registry import Call, repeated, rule
from lightning_curv.terms.term import DIAGONAL, Term

SUMMED = "stuwabc"


def _aligned(shape: torch.Size, rank: int) -> tuple[int, ...]:
    return (1,) * (rank - len(shape)) + tuple(shape)


def _repeats(call: Call, arguments: dict[str, Any]) -> list[int]:
    """The axes along which every parameter of the call is repeated."""
    rank = len(call.shape)
    shapes = [_aligned(arguments[name].shape, rank) for name in call.operands]
    repeated_everywhere = []
    for axis in range(rank):
        if all(shape[axis] == 1 for shape in shapes):
            repeated_everywhere.append(axis)
    return repeated_everywhere


def _repeated_in_front(name: str, tensor: Tensor, out: Tensor) -> bool:
    return repeated(tensor, out)


def broadcast(
    call: Call,
    g: Tensor,
    operand: Tensor,
    factor: Tensor | None = None,
) -> Term:
    """The term of a parameter that is broadcast to the output and multiplied by `factor`."""
    sizes = list(_aligned(operand.shape, len(call.shape)))
    # The axes that make up the rows are in front of g, as n.
    del sizes[call.axis : call.axis + call.lead]
    letters = []
    for axis, (size, full) in enumerate(zip(sizes, g.shape[2:], strict=True)):
        if size not in (1, full):
            raise NotImplementedError("no rule for a parameter that is tiled")
        # An axis that the parameter has is one of its own; along all others its gradient is summed.
        letters.append(DIAGONAL[axis] if size == full else SUMMED[axis])
    out = "".join(letters)
    par = "".join(letter for letter in letters if letter in DIAGONAL)
    if factor is None:
        return Term(out, "", par, g)
    return Term(out, out, par, g, call.rows(factor.expand(call.shape)))


def _value(value: Tensor | float, like: Tensor) -> Tensor:
    """A number as a tensor of the type and on the device of another; a tensor as it is."""
    if isinstance(value, Tensor):
        return value
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)


def _sum_terms(
    call: Call,
    operands: dict[str, Tensor],
    cotangents: dict[str, Tensor],
) -> dict[str, Term]:
    """The terms of the parameters among the summands of an output.

    Args:
        call: The recorded call.
        operands: The summands by name.
        cotangents: The cotangents of each, `[V, N, *]`.
    """
    return {name: broadcast(call, cotangents[name], operands[name]) for name in call.operands}


@rule(
    torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__,
    axes=_repeats, is_parameter=_repeated_in_front, needs_values=lambda arguments: (),
)  # fmt: skip
def add(
    call: Call,
    g: Tensor,
    input: Tensor,
    other: Tensor,
    *,
    alpha: float = 1,
) -> dict[str, Term]:
    """Y = a + α b."""
    scaled = alpha * g if "other" in call.operands else g
    operands = {"input": input, "other": other}
    return _sum_terms(call, operands, {"input": g, "other": scaled})


@rule(
    torch.sub, torch.subtract, Tensor.sub, Tensor.__sub__, Tensor.sub_, Tensor.__isub__,
    axes=_repeats, is_parameter=_repeated_in_front, needs_values=lambda arguments: (),
)  # fmt: skip
def sub(
    call: Call,
    g: Tensor,
    input: Tensor,
    other: Tensor,
    *,
    alpha: float = 1,
) -> dict[str, Term]:
    """Y = a - α b."""
    return add(call, g, input, other, alpha=-alpha)


@rule(
    torch.rsub,
    Tensor.__rsub__,
    axes=_repeats,
    is_parameter=_repeated_in_front,
    needs_values=lambda arguments: (),
)
def rsub(
    call: Call,
    g: Tensor,
    input: Tensor,
    other: Tensor,
    *,
    alpha: float = 1,
) -> dict[str, Term]:
    """Y = b - α a."""
    scaled = -alpha * g if "input" in call.operands else g
    operands = {"input": input, "other": other}
    return _sum_terms(call, operands, {"input": scaled, "other": g})


@rule(
    torch.mul, torch.multiply, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.mul_,
    Tensor.__imul__,
    axes=_repeats, is_parameter=_repeated_in_front,
)  # fmt: skip
def mul(call: Call, g: Tensor, input: Tensor, other: Tensor | float) -> dict[str, Term]:
    """Y = a b."""
    # The derivative by either factor is the other one.
    first = _value(input, g)
    second = _value(other, g)
    pairs = {"input": (first, second), "other": (second, first)}
    return {name: broadcast(call, g, *pairs[name]) for name in call.operands}


@rule(
    torch.div, torch.divide, torch.true_divide, Tensor.div, Tensor.__truediv__, Tensor.__div__,
    Tensor.div_, Tensor.__itruediv__, Tensor.__idiv__,
    axes=_repeats, is_parameter=_repeated_in_front, affine=False,
)  # fmt: skip
def div(
    call: Call,
    g: Tensor,
    input: Tensor,
    other: Tensor | float,
    *,
    rounding_mode: str | None = None,
) -> dict[str, Term]:
    """Y = a / b."""
    numerator = _value(input, g)
    denominator = _value(other, g)
    pairs = {
        "input": (numerator, 1 / denominator),
        "other": (denominator, -numerator / denominator.square()),
    }
    return {name: broadcast(call, g, *pairs[name]) for name in call.operands}


@rule(Tensor.__rdiv__, axes=_repeats, is_parameter=_repeated_in_front, affine=False)
def rdiv(
    call: Call,
    g: Tensor,
    input: Tensor,
    other: Tensor | float,
) -> dict[str, Term]:
    """Y = b / a."""
    swapped = {"input": "other", "other": "input"}
    operands = tuple(swapped[name] for name in call.operands)
    terms = div(Call(call.shape, operands, call.axis), g, _value(other, g), input)
    return {swapped[name]: term for name, term in terms.items()}


@rule(
    torch.prelu, Tensor.prelu,
    parameters=("weight",), needs_values=lambda arguments: ("input",),
    axes=lambda call, arguments: range(len(call.shape) if arguments["weight"].numel() == 1 else 1),
)  # fmt: skip
def prelu(call: Call, g: Tensor, input: Tensor, weight: Tensor) -> dict[str, Term]:
    """Y = max(x, 0) + a min(x, 0), with one slope or one per channel (axis 1)."""
    x = call.rows(input).clamp(max=0)
    if weight.numel() == 1:
        g = g.reshape(*g.shape[:2], -1)
        return {"weight": Term("s", "s", "", g, x.reshape(len(x), -1))}
    g = g.reshape(*g.shape[:3], -1)
    return {"weight": Term("ds", "ds", "d", g, x.reshape(*x.shape[:2], -1))}


@rule(
    Tensor.expand, Tensor.expand_as, torch.broadcast_to, Tensor.broadcast_to, Tensor.repeat,
    torch.tile, Tensor.tile,
    axes=_repeats, is_parameter=_repeated_in_front, needs_values=lambda arguments: (),
    broadcasts=True,
)  # fmt: skip
def expand(
    call: Call,
    g: Tensor,
    input: Tensor,
    *sizes: Any,
    **named: Any,
) -> dict[str, Term]:
    """Y = a, repeated: class tokens, learned queries."""
    return {"input": broadcast(call, g, input)}
