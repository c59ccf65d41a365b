"""Broadcast arithmetic with a parameter: position embeddings, layer scale, offsets, class tokens."""

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
    shapes = [_aligned(arguments[name].shape, len(call.shape)) for name in call.operands]
    return [axis for axis in range(len(call.shape)) if all(shape[axis] == 1 for shape in shapes)]


def _repeated_in_front(name: str, tensor: Tensor, out: Tensor) -> bool:
    return repeated(tensor, out)


def broadcast(call: Call, g: Tensor, operand: Tensor, factor: Tensor | None = None) -> Term:
    """The term of a parameter that is broadcast to the output and multiplied by ``factor``."""
    sizes = list(_aligned(operand.shape, len(call.shape)))
    del sizes[call.axis : call.axis + call.lead]
    if any(size not in (1, full) for size, full in zip(sizes, g.shape[2:], strict=True)):
        raise NotImplementedError("no rule for a parameter that is tiled")
    letters = [DIAGONAL[j] if size == sizes[j] else SUMMED[j] for j, size in enumerate(g.shape[2:])]
    out = "".join(letters)
    x = None if factor is None else call.rows(factor.expand(call.shape))
    return Term(
        out, out if x is not None else "", "".join(x for x in letters if x in DIAGONAL), g, x
    )


def _value(value: Tensor | float, like: Tensor) -> Tensor:
    return (
        value
        if isinstance(value, Tensor)
        else torch.as_tensor(value, dtype=like.dtype, device=like.device)
    )


@rule(
    torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__,
    axes=_repeats, accepts=_repeated_in_front, reads=lambda arguments: (),
)  # fmt: skip
def add(
    call: Call, g: Tensor, input: Tensor, other: Tensor, *, alpha: float = 1
) -> dict[str, Term]:
    """Y = a + α b."""
    return {
        k: broadcast(call, *((g, input) if k == "input" else (alpha * g, other)))
        for k in call.operands
    }


@rule(
    torch.sub, torch.subtract, Tensor.sub, Tensor.__sub__, Tensor.sub_, Tensor.__isub__,
    axes=_repeats, accepts=_repeated_in_front, reads=lambda arguments: (),
)  # fmt: skip
def sub(
    call: Call, g: Tensor, input: Tensor, other: Tensor, *, alpha: float = 1
) -> dict[str, Term]:
    """Y = a - α b."""
    return add(call, g, input, other, alpha=-alpha)


@rule(
    torch.rsub,
    Tensor.__rsub__,
    axes=_repeats,
    accepts=_repeated_in_front,
    reads=lambda arguments: (),
)
def rsub(
    call: Call, g: Tensor, input: Tensor, other: Tensor, *, alpha: float = 1
) -> dict[str, Term]:
    """Y = b - α a."""
    return {
        k: broadcast(call, *((g, other) if k == "other" else (-alpha * g, input)))
        for k in call.operands
    }


@rule(
    torch.mul, torch.multiply, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.mul_, Tensor.__imul__,
    axes=_repeats, accepts=_repeated_in_front,
)  # fmt: skip
def mul(call: Call, g: Tensor, input: Tensor, other: Tensor | float) -> dict[str, Term]:
    """Y = a b."""
    pairs = {"input": (input, other), "other": (other, input)}
    return {k: broadcast(call, g, pairs[k][0], _value(pairs[k][1], g)) for k in call.operands}  # type: ignore[arg-type]


@rule(
    torch.div, torch.divide, torch.true_divide, Tensor.div, Tensor.__truediv__, Tensor.__div__, Tensor.div_,
    Tensor.__itruediv__, Tensor.__idiv__,
    axes=_repeats, accepts=_repeated_in_front, affine=False,
)  # fmt: skip
def div(
    call: Call, g: Tensor, input: Tensor, other: Tensor | float, *, rounding_mode: str | None = None
) -> dict[str, Term]:
    """Y = a / b."""
    a, b = _value(input, g), _value(other, g)
    pairs = {"input": (a, 1 / b), "other": (b, -a / b.square())}
    return {k: broadcast(call, g, *pairs[k]) for k in call.operands}


@rule(Tensor.__rdiv__, axes=_repeats, accepts=_repeated_in_front, affine=False)
def rdiv(call: Call, g: Tensor, input: Tensor, other: Tensor | float) -> dict[str, Term]:
    """Y = b / a."""
    swapped = {"input": "other", "other": "input"}
    call = Call(call.shape, tuple(swapped[k] for k in call.operands), call.axis)
    return {swapped[k]: term for k, term in div(call, g, _value(other, g), input).items()}


@rule(
    torch.prelu, Tensor.prelu,
    slots=("weight",), reads=lambda arguments: ("input",),
    axes=lambda call, arguments: range(len(call.shape) if arguments["weight"].numel() == 1 else 1),
)  # fmt: skip
def prelu(call: Call, g: Tensor, input: Tensor, weight: Tensor) -> dict[str, Term]:
    """Y = max(x, 0) + a min(x, 0), with one slope or one per channel (axis 1)."""
    x = call.rows(input).clamp(max=0)
    if weight.numel() == 1:
        return {"weight": Term("s", "s", "", g.reshape(*g.shape[:2], -1), x.reshape(len(x), -1))}
    return {
        "weight": Term("ds", "ds", "d", g.reshape(*g.shape[:3], -1), x.reshape(*x.shape[:2], -1))
    }


@rule(
    Tensor.expand, Tensor.expand_as, torch.broadcast_to, Tensor.broadcast_to, Tensor.repeat, torch.tile, Tensor.tile,
    axes=_repeats, accepts=_repeated_in_front, reads=lambda arguments: (), expands=True,
)  # fmt: skip
def expand(call: Call, g: Tensor, input: Tensor, *sizes: Any, **named: Any) -> dict[str, Term]:
    """Y = a, repeated: class tokens, learned queries."""
    return {"input": broadcast(call, g, input)}
