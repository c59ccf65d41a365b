"""Connectionist temporal classification as its kernel computes it, in ops that have derivatives.

Torch differentiates these twice, the kernel once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NEVER = -1e30  # the logarithm of no probability, finite so that it has derivatives


def alignments(node: Any, log_probs: Tensor) -> Tensor:
    r"""The formula of a node of `F.ctc_loss`, `[N]`.

    That is $-\log \sum_{\pi} \prod_t p_t(\pi_t)$ over alignments π.

    The sum is taken forward in time over the labels with blanks between them (Graves et al.,
    *Connectionist temporal classification*, ICML 2006, eq. 6-8). The kernel's gradient is right for
    probabilities that add up to one, and of any others it is that of the loss plus their sum, so
    this is added, less its value.

    Args:
        node: The node.
        log_probs: `[T, N, C]`.
    """
    steps, count, _ = log_probs.shape
    blank = node._saved_blank
    inputs, lengths = (torch.as_tensor(n).to(log_probs.device) for n in _lengths(node))
    labels = _with_blanks(node._saved_targets, lengths, blank)
    emitted = log_probs.gather(2, labels.expand(steps, -1, -1))  # [T, N, S]
    # To a label from another one two places before: the blank between them may be left out.
    skips = torch.zeros_like(labels, dtype=torch.bool)
    differs = labels[:, 2:] != labels[:, :-2]
    skips[:, 2:] = differs & (labels[:, 2:] != blank)
    never = log_probs.new_full((count, 2), NEVER)
    # An alignment begins with the first blank or with the first label.
    start = torch.arange(labels.shape[1], device=labels.device) < 2
    # α, the logarithm of the sum over the beginnings of alignments that end at a label.
    if steps:
        alpha = emitted[0].where(start, NEVER)
    else:
        alpha = never.expand(count, -1)
    for t in range(1, steps):
        before = torch.cat([never, alpha], 1)
        stays = alpha
        moves = before[:, 1:-1]
        jumps = before[:, :-2].where(skips, NEVER)
        ways = torch.stack([stays, moves, jumps])
        moved = ways.logsumexp(0) + emitted[t]
        # Behind the end of a sample α stays as it was.
        running = (t < inputs)[:, None]
        alpha = torch.where(running, moved, alpha)
    # An alignment ends with the last blank or with the last label; without labels with the blank.
    last = 2 * lengths[:, None]
    last_places = torch.cat([last, (last - 1).clamp(min=0)], 1)
    with_blank, with_label = alpha.gather(1, last_places).unbind(1)
    ends = torch.stack([with_blank, with_label.where(lengths > 0, NEVER)])
    loss = -ends.logsumexp(0)
    # The kernel's gradient is that of the loss plus the sum of the probabilities.
    of_sample = torch.arange(steps, device=inputs.device)[:, None] < inputs
    probabilities = log_probs.exp().sum(2)
    total = (probabilities * of_sample).sum(0)
    impossible = loss > -NEVER / 2
    with_gradient_of_total = loss + total - total.detach()
    return with_gradient_of_total.masked_fill(impossible, torch.inf)


def _lengths(node: Any) -> tuple[Any, Any]:
    return node._saved_input_lengths, node._saved_target_lengths


def _with_blanks(targets: Tensor, lengths: Tensor, blank: int) -> Tensor:
    """The labels of every sample, padded, with blanks around each, `[N, 2 L + 1]`."""
    if targets.ndim == 1:  # those of all samples behind each other
        ends = lengths.cumsum(0)
        longest = int(lengths.max()) if len(lengths) else 0
        starts = (ends - lengths)[:, None]
        places = starts + torch.arange(longest, device=lengths.device)
        if len(targets):
            last_place = max(0, len(targets) - 1)
            targets = targets.to(lengths.device)[places.clamp(max=last_place)]
        else:
            targets = targets.new_full((len(lengths), longest), blank)
    targets = targets.long().to(lengths.device)
    samples, longest_target = targets.shape
    padding = torch.arange(longest_target, device=lengths.device) >= lengths[:, None]
    labels = torch.full((samples, 2 * longest_target + 1), blank, device=lengths.device)
    labels[:, 1::2] = targets.masked_fill(padding, blank)
    return labels
