"""Contractions with a parameter: `torch.einsum` of two tensors, batched matrix products."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_curv.rules import elementwise, fallback
from lightning_curv.rules.registry import Call, rule
from lightning_curv.terms.term import DIAGONAL, Term

SUMMED = "stuwabc"


def _bind(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    equation, *operands = args
    # Torch takes the operands one by one, or as a list.
    listed = len(operands) == 1 and isinstance(operands[0], (list, tuple))
    arguments = {"equation": equation}
    for number, operand in enumerate(operands[0] if listed else operands):
        arguments[f"operands{number}"] = operand
    return arguments


def _parsed(arguments: dict[str, Any]) -> tuple[list[str], str] | None:
    """The letters of the two operands and of the output.

    `None`: the call is no product of two tensors, or has other than plain letters.
    """
    equation = arguments["equation"]
    if not isinstance(equation, str) or "." in equation or "operands2" in arguments:
        return None
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    operands = inputs.split(",")
    if not arrow:
        # Without an arrow the output has the letters that occur once, in alphabetical order.
        once = [letter for letter in inputs if letter.isalpha() and inputs.count(letter) == 1]
        out = "".join(sorted(once))
    # A letter twice in one operand is a diagonal of it.
    plain = all(len({*letters}) == len(letters) for letters in operands)
    if len(operands) != 2 or not plain:
        return None
    return operands, out


def _outside_parameters(call: Call, arguments: dict[str, Any]) -> list[int]:
    parsed = _parsed(arguments)
    if parsed is None or len(call.operands) != 1:
        return [0]
    operands, out = parsed
    number = int(call.operands[0][-1])  # "operands0" or "operands1"
    par = operands[number]
    # An axis that the parameter has too cannot be that of the samples.
    return [axis for axis, letter in enumerate(out) if letter not in par]


def _of_data(call: Call, arguments: dict[str, Any]) -> list[int]:
    parsed = _parsed(arguments)
    if parsed is None or len(call.operands) != 1:
        return []
    operands, out = parsed
    data = operands[1 - int(call.operands[0][-1])]
    return [axis for axis, letter in enumerate(out) if letter in data]


@rule(
    torch.einsum,
    binds=_bind,
    axes=_outside_parameters,
    keeps=_of_data,
    is_parameter=lambda name, tensor, out: name == "operands1" and tensor.ndim <= 2,
)
def einsum(call: Call, g: Tensor, **arguments: Any) -> dict[str, Term]:
    """A product of one parameter and data; anything else by the fallback."""
    parsed = _parsed(arguments)
    if parsed is not None and len(call.operands) == 1:
        (name,) = call.operands
        operands, out = parsed
        own = int(name[-1])
        other = 1 - own
        data = arguments[f"operands{other}"]
        term = contraction(
            call,
            g,
            data,
            inp=operands[other],
            par=operands[own],
            out=out,
        )
        if term is not None:
            return {name: term}

    # The fallback calls ops by the names of their arguments, which `torch.einsum` has none of.
    def einsum(equation: str, **tensors: Tensor) -> Tensor:
        in_order = [tensors[f"operands{k}"] for k in range(len(tensors))]
        return torch.einsum(equation, *in_order)

    return fallback.per_sample(einsum, call, g, arguments)


def contraction(
    call: Call,
    g: Tensor,
    x: Tensor,
    inp: str,
    par: str,
    out: str,
) -> Term | None:
    """The term of a parameter in a product with data, `inp, par -> out`.

    `None`: the parameter alone is summed over an axis, or there are more axes than letters.

    Args:
        call: The recorded call.
        g: Cotangents, `[V, N, *]`.
        x: The data.
        inp: The letters of the data's axes.
        par: Those of the parameter's axes.
        out: Those of the output's axes.
    """
    sample = out[call.axis]
    summed_alone = {*par} - {*inp, *out}
    if sample not in inp or summed_alone:
        return None
    # The user's letters mean nothing: those of terms do.
    letters = _meanings(inp, par, out, sample)
    if letters is None:
        return None

    def named(axes: str) -> str:
        return "".join(letters[axis] for axis in axes if axis != sample)

    samples_first = x.movedim(inp.index(sample), 0)
    return Term(named(out), named(inp), named(par), g, samples_first)


def _meanings(inp: str, par: str, out: str, sample: str) -> dict[str, str] | None:
    """The letters of a `Term` for those of the product `inp, par -> out`; `None`: too few."""
    # Axes that both factors and the output have are not summed: a product for each entry.
    both = [axis for axis in par if axis in inp and axis in out]
    rows = [axis for axis in par if axis not in inp]
    columns = [axis for axis in par if axis not in out]
    data_axes = dict.fromkeys(inp + out)
    shared = [axis for axis in data_axes if axis not in par and axis != sample]
    # One axis beside rows or columns counts groups; without any of these the map is diagonal.
    grouped = len(both) == 1 and bool(rows + columns)
    letters = dict(zip(both, "q" if grouped else DIAGONAL, strict=False))
    letters.update(zip(shared, SUMMED, strict=False))
    # The first of several rows or columns gets their letter, the others those of a kernel's axes.
    spare = iter("xyz")
    for first, axes in (("o", rows), ("i", columns)):
        for number, axis in enumerate(axes):
            letters[axis] = first if number == 0 else next(spare, "")
    if all(letters.get(axis) for axis in (*par, *shared)):
        return letters
    return None


@rule(
    torch.bmm,
    Tensor.bmm,
    axes=lambda call, arguments: [1 if "mat2" in call.operands else 2],
    keeps=lambda call, arguments: [0, 1 if "mat2" in call.operands else 2],
)
def bmm(call: Call, g: Tensor, input: Tensor, mat2: Tensor) -> dict[str, Term]:
    """Y_q = X_q W_q: one matrix per expert."""
    terms = batched(call, g, input, mat2)
    if "other" in terms:
        return {"mat2": terms["other"]}
    return terms


def _rows_of_stack(call: Call, arguments: dict[str, Any]) -> list[int]:
    """The axis of the samples beside the parameter of `baddbmm`."""
    if "batch2" in call.operands:
        return [1]
    return [2] if "batch1" in call.operands else [0]


@rule(
    torch.baddbmm,
    Tensor.baddbmm,
    axes=_rows_of_stack,
    keeps=lambda call, arguments: [0, *_rows_of_stack(call, arguments)],
)
def baddbmm(
    call: Call,
    g: Tensor,
    input: Tensor,
    batch1: Tensor,
    batch2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> dict[str, Term]:
    """Y_q = β B_q + α X_q W_q: an offset and one matrix per expert or member."""
    terms = {}
    if "input" in call.operands:
        terms["input"] = elementwise.broadcast(call, beta * g, input)
    matrices = [name for name in call.operands if name != "input"]
    if matrices:
        inner = ["input" if name == "batch1" else "other" for name in matrices]
        product = replace(call, operands=tuple(inner))
        terms[matrices[0]] = next(iter(batched(product, alpha * g, batch1, batch2).values()))
    return terms


def batched(call: Call, g: Tensor, input: Tensor, other: Tensor) -> dict[str, Term]:
    """The term of one of two stacks of equally many matrices.

    The samples are the rows or the columns of the other one.
    """
    first = call.operands == ("input",)
    if first:
        term = contraction(call, g, other, inp="adc", par="abd", out="abc")
    else:
        term = contraction(call, g, input, inp="abd", par="adc", out="abc")
    if term is None or len(call.operands) > 1:
        raise NotImplementedError("no rule for a batched product without rows or columns of data")
    return {"input" if first else "other": term}
