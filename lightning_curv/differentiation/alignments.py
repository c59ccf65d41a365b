"""Connectionist temporal classification as its kernel computes it, in ops that torch differentiates twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NEVER = -1e30  # the logarithm of no probability, finite so that it has derivatives


def alignments(node: Any, log_probs: Tensor) -> Tensor:
    r"""The formula of a node of ``F.ctc_loss``: :math:`-\log \sum_{\pi} \prod_t p_t(\pi_t)` over alignments π, ``[N]``.

    The sum is taken forward in time over the labels with blanks between them (Graves et al.,
    *Connectionist temporal classification*, ICML 2006, eq. 6-8). The kernel's gradient is right for
    probabilities that add up to one, and of any others it is that of the loss plus their sum, so
    this is added, less its value.

    Args:
        node: The node.
        log_probs: ``[T, N, C]``.
    """
    steps, count, _ = log_probs.shape
    inputs, lengths = (torch.as_tensor(n).to(log_probs.device) for n in _lengths(node))
    labels = _with_blanks(node._saved_targets, lengths, node._saved_blank)
    emitted = log_probs.gather(2, labels.expand(steps, -1, -1))  # [T, N, S]
    skips = torch.zeros_like(labels, dtype=torch.bool)  # to a label from another two places before
    skips[:, 2:] = (labels[:, 2:] != labels[:, :-2]) & (labels[:, 2:] != node._saved_blank)
    never = log_probs.new_full((count, 2), NEVER)
    start = torch.arange(labels.shape[1], device=labels.device) < 2
    if steps:
        alpha = emitted[0].where(start, NEVER)
    else:
        alpha = never.expand(count, -1)
    for t in range(1, steps):
        before = torch.cat([never, alpha], 1)
        ways = [alpha, before[:, 1:-1], before[:, :-2].where(skips, NEVER)]
        moved = torch.stack(ways).logsumexp(0) + emitted[t]
        alpha = torch.where((t < inputs)[:, None], moved, alpha)
    last = 2 * lengths[:, None]
    ends = alpha.gather(1, torch.cat([last, (last - 1).clamp(min=0)], 1))
    ends = torch.stack([ends[:, 0], ends[:, 1].where(lengths > 0, NEVER)])
    loss = -ends.logsumexp(0)
    running = torch.arange(steps, device=inputs.device)[:, None] < inputs
    total = (log_probs.exp().sum(2) * running).sum(0)
    impossible = loss > -NEVER / 2
    return (loss + total - total.detach()).masked_fill(impossible, torch.inf)


def _lengths(node: Any) -> tuple[Any, Any]:
    return node._saved_input_lengths, node._saved_target_lengths


def _with_blanks(targets: Tensor, lengths: Tensor, blank: int) -> Tensor:
    """The labels of every sample, padded, with blanks around each, ``[N, 2 L + 1]``."""
    if targets.ndim == 1:  # those of all samples behind each other
        ends = lengths.cumsum(0)
        longest = int(lengths.max()) if len(lengths) else 0
        places = (ends - lengths)[:, None] + torch.arange(longest, device=lengths.device)
        if len(targets):
            targets = targets.to(lengths.device)[places.clamp(max=max(0, len(targets) - 1))]
        else:
            targets = targets.new_full((len(lengths), longest), blank)
    targets = targets.long().to(lengths.device)
    padding = torch.arange(targets.shape[1], device=lengths.device) >= lengths[:, None]
    labels = torch.full((len(targets), 2 * targets.shape[1] + 1), blank, device=lengths.device)
    labels[:, 1::2] = targets.masked_fill(padding, blank)
    return labels
