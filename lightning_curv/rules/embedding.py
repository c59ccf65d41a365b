"""Embeddings: linear maps of one-hot inputs that are never written out."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from lightning_curv.rules.registry import Call, leading_axes, rule
from lightning_curv.terms import Term


@rule(F.embedding, slots=("weight",), axes=leading_axes(1), reads=lambda arguments: ("input",))
def embedding(
    call: Call,
    g: Tensor,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> dict[str, Term]:
    """``F.embedding``; the row ``padding_idx`` gets no gradient."""
    if scale_grad_by_freq:
        raise NotImplementedError(
            "`scale_grad_by_freq=True` divides by counts over the whole batch, so there are no per-sample gradients; "
            "use `scale_grad_by_freq=False`."
        )
    index, classes = call.rows(input).flatten(1), weight.shape[0]
    if padding_idx is not None:
        index = index.masked_fill(index == padding_idx % classes, -1)
    return {"weight": Term("so", "si", "io", g.reshape(*g.shape[:2], index.shape[1], g.shape[-1]), index, classes)}
