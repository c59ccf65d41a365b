"""Contractions with a parameter: ``torch.einsum`` of two tensors, batched matrix products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_curv.rules import fallback
from lightning_curv.rules.registry import Call, rule
from lightning_curv.terms.term import DIAGONAL, Term

SUMMED = "stuwabc"


def _bind(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    equation, *operands = args
    flat = (
        operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    )
    return {"equation": equation, **{f"operands{k}": v for k, v in enumerate(flat)}}


def _parsed(arguments: dict[str, Any]) -> tuple[list[str], str] | None:
    """The letters of the operands and of the output; ``None``: no product of two tensors with plain letters."""
    equation = arguments["equation"]
    if not isinstance(equation, str) or "." in equation or "operands2" in arguments:
        return None
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    operands = inputs.split(",")
    out = (
        out if arrow else "".join(sorted(x for x in inputs if x.isalpha() and inputs.count(x) == 1))
    )
    return (
        (operands, out)
        if len(operands) == 2 and all(len({*o}) == len(o) for o in operands)
        else None
    )


def _outside_parameters(call: Call, arguments: dict[str, Any]) -> list[int]:
    parsed = _parsed(arguments)
    if parsed is None or len(call.operands) != 1:
        return [0]
    par = parsed[0][int(call.operands[0][-1])]
    return [axis for axis, letter in enumerate(parsed[1]) if letter not in par]


@rule(
    torch.einsum,
    binds=_bind,
    axes=_outside_parameters,
    accepts=lambda name, tensor, out: name == "operands1" and tensor.ndim <= 2,
)
def einsum(call: Call, g: Tensor, **arguments: Any) -> dict[str, Term]:
    """A product of one parameter and data; anything else by the fallback."""
    parsed = _parsed(arguments)
    if parsed is not None and len(call.operands) == 1:
        (name,), (operands, out) = call.operands, parsed
        k = int(name[-1])
        term = contraction(
            call, g, arguments[f"operands{1 - k}"], operands[1 - k], operands[k], out
        )
        if term is not None:
            return {name: term}

    def einsum(equation: str, **tensors: Tensor) -> Tensor:
        return torch.einsum(equation, *(tensors[f"operands{k}"] for k in range(len(tensors))))

    return fallback.per_sample(einsum, call, g, arguments)


def contraction(call: Call, g: Tensor, x: Tensor, inp: str, par: str, out: str) -> Term | None:
    """The term of a parameter with the axes ``par`` in the product ``inp, par -> out`` with the data ``x``.

    ``None``: the parameter alone is summed over an axis, or there are more axes than letters.
    """
    sample = out[call.axis]
    if sample not in inp or {*par} - {*inp, *out}:
        return None
    both = [x for x in par if x in inp and x in out]
    rows, columns = [x for x in par if x not in inp], [x for x in par if x not in out]
    shared = [x for x in dict.fromkeys(inp + out) if x not in par and x != sample]
    spare = iter("xyz")
    letters = dict(zip(both, "q" if len(both) == 1 and rows + columns else DIAGONAL, strict=False))
    letters.update(zip(shared, SUMMED, strict=False))
    for first, axes in (("o", rows), ("i", columns)):
        letters.update((x, first if k == 0 else next(spare, "")) for k, x in enumerate(axes))
    if not all(letters.get(x) for x in (*par, *shared)):
        return None
    named = ["".join(letters[x] for x in axes if x != sample) for axes in (out, inp, par)]
    return Term(named[0], named[1], named[2], g, x.movedim(inp.index(sample), 0))


@rule(
    torch.bmm,
    Tensor.bmm,
    axes=lambda call, arguments: [1 if "mat2" in call.operands else 2],
)
def bmm(call: Call, g: Tensor, input: Tensor, mat2: Tensor) -> dict[str, Term]:
    """Y_q = X_q W_q: one matrix per expert."""
    return {{"other": "mat2"}.get(k, k): term for k, term in batched(call, g, input, mat2).items()}


def batched(call: Call, g: Tensor, input: Tensor, other: Tensor) -> dict[str, Term]:
    """The term of one of two factors of equally many matrices; the samples are rows or columns of the other one."""
    first = call.operands == ("input",)
    term = contraction(call, g, *((other, "adc", "abd") if first else (input, "abd", "adc")), "abc")
    if term is None or len(call.operands) > 1:
        raise NotImplementedError("no rule for a batched product without rows or columns of data")
    return {"input" if first else "other": term}
