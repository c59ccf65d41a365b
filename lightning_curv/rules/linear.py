"""Linear maps: `F.linear`, products with a matrix parameter, `addmm`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_curv.rules import contraction, elementwise, fallback
from lightning_curv.rules.registry import Call, leading_axes, rule
from lightning_curv.terms.term import Term, flatten_shared


@rule(
    F.linear,
    parameters=("weight", "bias"),
    axes=leading_axes(1),
    needs_values=lambda arguments: ("input",),
)
def linear(
    call: Call,
    g: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
) -> dict[str, Term]:
    """Y = x Wᵀ + b."""
    weight_term, bias_term = product(g, call.rows(input), "oi")
    return {"weight": weight_term, "bias": bias_term}


@rule(
    torch.matmul,
    torch.mm,
    Tensor.matmul,
    Tensor.mm,
    Tensor.__matmul__,
    axes=lambda call, arguments: range(len(call.shape)),
    is_parameter=lambda name, tensor, out: name == "other" and tensor.ndim <= 2,
)
def matmul(call: Call, g: Tensor, input: Tensor, other: Tensor) -> dict[str, Term]:
    """Y = x W (W a matrix or a vector) and y = W x; other shapes by the fallback."""
    last = len(call.shape) - 1
    # One operand is the parameter, the other the data; which one decides the order of the letters.
    if call.operands == ("other",) and other.ndim == 2 and call.axis < last:
        return {"other": product(g, call.rows(input), "io")[0]}
    if call.operands == ("other",) and other.ndim == 1:
        return {"other": product(g.unsqueeze(-1), call.rows(input), "oi")[0]}
    if call.operands == ("input",) and input.ndim == 2 and other.ndim >= 2:
        # Where the columns of the data are the samples, moving them to the front leaves the
        # features last; else the columns are shared positions, which belong before the features.
        if call.axis == last:
            return {"input": product(g, call.rows(other), "oi")[0]}
        features_last = call.rows(other.mT).contiguous()
        return {"input": product(g.transpose(-1, -2), features_last, "oi")[0]}
    # A stack of products, whose samples are rows inside of each.
    if input.ndim == other.ndim == 3 and len(input) == len(other) and call.axis > 0:
        return contraction.batched(call, g, input, other)
    return fallback.per_sample(torch.matmul, call, g, {"input": input, "other": other})


@rule(
    torch.addmm,
    Tensor.addmm,
    axes=leading_axes(1),
    is_parameter=lambda name, tensor, out: name == "mat2",
)
def addmm(
    call: Call,
    g: Tensor,
    input: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> dict[str, Term]:
    """Y = β b + α x W, as in layers that keep the weight transposed."""
    terms = {}
    if "mat2" in call.operands:
        terms["mat2"] = Term("o", "i", "io", g, alpha * call.rows(mat1))
    if "input" in call.operands:
        terms["input"] = elementwise.broadcast(call, beta * g, input)
    return terms


@rule(
    torch.bilinear,
    parameters=("weight", "bias"),
    axes=leading_axes(1),
    needs_values=lambda arguments: ("input1", "input2"),
)
def bilinear(
    call: Call,
    g: Tensor,
    input1: Tensor,
    input2: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
) -> dict[str, Term]:
    """Y = x₁ᵀ W x₂ + b: linear in the outer product of the inputs."""
    # The letters of both inputs, `i` and `x`, are those of one matrix with `o`.
    outer_product = input1.unsqueeze(-1) * input2.unsqueeze(-2)
    x = flatten_shared(call.rows(outer_product), 1, -2)
    g = flatten_shared(g, 2, -1)
    shared = "s" if x.ndim > 3 else ""
    return {
        "weight": Term(shared + "o", shared + "ix", "oix", g, x),
        "bias": Term(shared + "o", "", "o", g),
    }


def product(g: Tensor, x: Tensor, par: str) -> tuple[Term, Term]:
    """The terms of a matrix and of an offset of its output.

    Args:
        g: Cotangents of the output, `[V, N, *, out]`.
        x: Inputs, `[N, *, in]`.
        par: The letters of the matrix in the order of its memory, `"oi"` or `"io"`.
    """
    g = flatten_shared(g, 2, -1)
    x = flatten_shared(x, 1, -1)
    shared = "s" if x.ndim > 2 else ""
    return Term(shared + "o", shared + "i", par, g, x), Term(shared + "o", "", "o", g)
