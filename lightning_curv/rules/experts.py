"""Mixtures of experts: products of the rows of data with one matrix per expert."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_curv.rules import contraction
from lightning_curv.rules.registry import Call, rule
from lightning_curv.terms.term import Term


def _rows_or_columns(call: Call, arguments: dict[str, Any]) -> list[int]:
    """The axis of a grouped product that data alone has."""
    input = arguments["input"]
    mat2 = arguments["mat2"]
    if input.ndim == 2:
        return [0] if mat2.ndim == 3 else []
    if mat2.ndim == 3 and "mat2" not in call.operands:
        return [2]
    return [1]


# Torch has the op from 2.8 on; before, the rule is one of no function.
if hasattr(torch, "_grouped_mm"):
    _GROUPED_MM = [torch._grouped_mm]
else:
    _GROUPED_MM = []


@rule(
    *_GROUPED_MM,
    axes=_rows_or_columns,
    is_parameter=lambda name, tensor, out: name == "mat2" and tensor.ndim == 3 and out.ndim == 2,
)
def grouped_mm(
    call: Call,
    g: Tensor,
    input: Tensor,
    mat2: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> dict[str, Term]:
    """`F.grouped_mm`: row r times the matrix of its expert, Y_r = x_r W_e(r).

    The op also multiplies W_e X, whose columns have experts. Expert e ends with row
    `offs[e] - 1`; rows that no expert has get no gradient. Rows are zero for all experts but
    their own: memory is that of the rows times the number of experts.
    """
    dims = input.ndim, mat2.ndim
    if call.operands == ("mat2",) and dims == (2, 3) and offs is not None:
        by_expert, x = _of_experts(g, input, offs)
        return {"mat2": Term("qo", "qi", "qio", by_expert, x)}
    if call.operands == ("input",) and dims == (3, 2) and offs is not None:
        by_expert, x = _of_experts(g, mat2.mT, offs)
        return {"input": Term("qo", "qi", "qoi", by_expert, x)}
    if dims == (3, 3) and "bias" not in call.operands:
        return contraction.bmm(call, g, input, mat2)
    raise NotImplementedError(
        "no rule for a grouped product other than that of data with one matrix per expert"
    )


def _of_experts(g: Tensor, x: Tensor, offs: Tensor) -> tuple[Tensor, Tensor]:
    """Cotangents `[V, R, q, o]` and inputs `[R, q, i]` of rows `[V, R, o]` and `[R, i]`."""
    rows = torch.arange(len(x), device=x.device)
    own_expert = torch.bucketize(rows, offs.to(rows.dtype), right=True)
    experts = torch.arange(len(offs), device=x.device)
    others = (own_expert[:, None] != experts)[..., None]
    # Both factors are masked: what is not finite in the one would meet zeros of the other as NaN.
    by_expert = g.unsqueeze(2).masked_fill(others, 0)
    return by_expert, x.unsqueeze(1).masked_fill(others, 0)
