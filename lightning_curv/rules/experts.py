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
    input, mat2 = arguments["input"], arguments["mat2"]
    if input.ndim == 2:
        return [0] if mat2.ndim == 3 else []
    return [2] if mat2.ndim == 3 and "mat2" not in call.operands else [1]


@rule(
    *(
        function for function in [getattr(torch, "_grouped_mm", None)] if function
    ),  # of torch 2.8 and later
    axes=_rows_or_columns,
    accepts=lambda name, tensor, out: name == "mat2" and tensor.ndim == 3 and out.ndim == 2,
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
    """``F.grouped_mm``: row r times the matrix of its expert, Y_r = x_r W_e(r); also W_e X with columns of experts.

    Expert e ends with row ``offs[e] - 1``; rows that no expert has get no gradient. Rows are zero
    for all experts but their own: memory is that of the rows times the number of experts.
    """
    dims = input.ndim, mat2.ndim
    if call.operands == ("mat2",) and dims == (2, 3) and offs is not None:
        return {"mat2": Term("qo", "qi", "qio", *_of_experts(g, input, offs))}
    if call.operands == ("input",) and dims == (3, 2) and offs is not None:
        return {"input": Term("qo", "qi", "qoi", *_of_experts(g, mat2.mT, offs))}
    if dims == (3, 3) and "bias" not in call.operands:
        return contraction.bmm(call, g, input, mat2)
    raise NotImplementedError(
        "no rule for a grouped product other than that of data with one matrix per expert"
    )


def _of_experts(g: Tensor, x: Tensor, offs: Tensor) -> tuple[Tensor, Tensor]:
    """Cotangents ``[V, R, q, o]`` and inputs ``[R, q, i]`` of rows ``[V, R, o]`` and ``[R, i]``."""
    rows = torch.arange(len(x), device=x.device)
    expert = torch.bucketize(rows, offs.to(rows.dtype), right=True)
    others = (expert[:, None] != torch.arange(len(offs), device=x.device))[..., None]
    return g.unsqueeze(2).masked_fill(others, 0), x.unsqueeze(1).masked_fill(others, 0)
