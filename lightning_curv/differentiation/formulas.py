"""Fused ops that have no second derivative in torch, written in ops that have one.

A formula is a function of the op's node, for what that has saved of the call, and of the op's
differentiable inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_curv.differentiation.alignments import alignments
from lightning_curv.differentiation.fused_attention import attention

Formula = Callable[..., Tensor | None]  # `None`: there is none after all


def _hardsigmoid(node: Any, x: Tensor) -> Tensor:
    return F.hardtanh(x, -3, 3) / 6 + 0.5


def _logit(node: Any, x: Tensor) -> Tensor:
    eps = node._saved_eps
    if eps is not None:
        inside = (x >= eps) & (x <= 1 - eps)
        # Beyond, the op is constant; NaN stays NaN.
        constant = 0.5 + 0 * x.detach()
        x = torch.where(inside, x, constant)
    return x.log() - (1 - x).log()


def _distances(node: Any, a: Tensor, b: Tensor) -> Tensor:
    differences = a.unsqueeze(-2) - b.unsqueeze(-3)  # every row of `a` with every row of `b`
    return torch.linalg.vector_norm(differences, node._saved_p, -1)


def _pair_distances(node: Any, x: Tensor) -> Tensor:
    first, second = torch.triu_indices(len(x), len(x), 1, device=x.device)
    differences = x[first] - x[second]
    return torch.linalg.vector_norm(differences, node._saved_p, -1)


def _margins(node: Any, x: Tensor) -> Tensor:
    x = x.reshape(-1, x.shape[-1])
    target = node._saved_target.reshape(-1, 1)
    score = x.gather(1, target)
    margins = (node._saved_margin - score + x).clamp(min=0)
    # The target itself is no rival.
    losses = margins.scatter(1, target, 0) ** node._saved_p
    if node._saved_weight is not None:
        losses = losses * node._saved_weight[target]
    return _reduced(losses.sum(1) / x.shape[1], node)


def _label_margins(node: Any, x: Tensor) -> Tensor:
    classes = x.shape[-1]
    x = x.reshape(-1, classes)
    target = node._saved_target.reshape(-1, classes)
    listed = (target >= 0).cumprod(1)  # what follows the first negative label does not count
    others = node._saved_is_target.reshape(x.shape) == 0
    scores = x.gather(1, target.clamp(min=0))
    # Every listed class against every other one, [rows, listed, others].
    margins = (1 - scores[:, :, None] + x[:, None]).clamp(min=0)
    counted = margins * listed[:, :, None] * others[:, None]
    return _reduced(counted.sum((1, 2)) / classes, node)


def _reduced(losses: Tensor, node: Any) -> Tensor:
    # Torch's numbers: 0 is "none", 1 "mean", 2 "sum".
    if node._saved_reduction == 0:
        return losses.reshape(node._saved_self.shape[:-1])
    if node._saved_reduction == 1:
        return losses.mean()
    return losses.sum()


def _bags(node: Any, weight: Tensor | None, each: Tensor | None) -> Tensor | None:
    """Of the table the gradient needs the shape alone, where there are no weights."""
    indices = node._saved_indices
    offsets = node._saved_offsets
    counts = node._saved_result2
    if node._saved_sparse or node._saved_scale_grad_by_freq or weight is None:
        return None
    if node._saved_mode == 2:  # the largest entry of every bag and feature
        return weight.gather(0, node._saved_result3.clamp(min=0)).masked_fill(
            (counts == 0)[:, None], 0
        )
    if each is None:
        rows = weight[indices]
    else:
        rows = weight[indices] * each[:, None]
    rows = rows.masked_fill((indices == node._saved_padding_idx)[:, None], 0)
    bag = (
        torch.bucketize(torch.arange(len(indices), device=offsets.device), offsets, right=True) - 1
    )
    total = rows.new_zeros(len(counts), rows.shape[1]).index_add(0, bag, rows)
    if node._saved_mode == 1:
        return total / counts.clamp(min=1)[:, None]
    return total


def _entries(node: Any, values: Tensor) -> Tensor:
    """A sparse tensor as a dense one: torch's own gradient by its values leaves no graph."""
    result = node._saved_result
    dense = values.new_zeros(result.shape)
    return dense.index_put(tuple(result._indices()), values, accumulate=True)


# node name -> the op on its differentiable inputs, and the names under which the node has saved
# these (`None`: it saves no values, for the op is linear in them)
FORMULAS: dict[str, tuple[Formula, tuple[str | None, ...]]] = {
    "HardsigmoidBackward0": (_hardsigmoid, ("self",)),
    "LogitBackward0": (_logit, ("self",)),
    "CdistBackward0": (_distances, ("x1", "x2")),
    "PdistBackward0": (_pair_distances, ("self",)),
    "MultiMarginLossBackward0": (_margins, ("self",)),
    "MultilabelMarginLossBackward0": (_label_margins, ("self",)),
    "CtcLossBackward0": (alignments, ("log_probs",)),
    "CtcLossBackward1": (alignments, ("log_probs",)),
    "SparseCooTensorWithDimsAndTensorsBackward0": (_entries, (None,)),
    "EmbeddingBagBackward0": (_bags, ("weight", "per_sample_weights")),
    "ScaledDotProductFlashAttentionForCpuBackward0": (
        attention("attn_mask"),
        ("query", "key", "value"),
    ),
    "ScaledDotProductFlashAttentionBackward0": (attention(), ("query", "key", "value")),
    "ScaledDotProductCudnnAttentionBackward0": (attention("attn_bias"), ("query", "key", "value")),
    "ScaledDotProductEfficientAttentionBackward0": (
        attention(),
        ("query", "key", "value", "attn_bias"),
    ),
    "ScaledDotProductFusedAttentionOverrideableBackward0": (
        attention(),
        ("query", "key", "value", "attn_bias"),
    ),
}
