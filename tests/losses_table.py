"""The losses under test: one row each, with the n-th summand written naively (the summands add to the loss)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASS_WEIGHT = torch.tensor([0.5, 2.0, 1.3], dtype=torch.float64)
POS_WEIGHT = torch.tensor([3.0, 0.4, 1.7], dtype=torch.float64)
ENTRY_WEIGHT = torch.tensor([[0.3, 1.0, 2.0], [1.5, 0.2, 0.9], [0.7, 0.1, 1.1], [2.2, 0.6, 0.8]], dtype=torch.float64)


@dataclass(frozen=True)
class Loss:
    """A loss as function and as module, a maker of targets, and its n-th summand."""

    name: str
    function: Callable[[Tensor, Tensor], Tensor]
    module: Callable[[], nn.Module]
    target: Callable[[torch.Size], Tensor]
    summand: Callable[[Tensor, Tensor, int], Tensor]
    extra: tuple[int, ...] = ()  # axes of the output after [N, C]


def positions(output: Tensor, n: int):
    """Scores [C] of sample n at each of its positions, with the position's index."""
    scores = output[n].flatten(1) if output.dim() > 2 else output[n].unsqueeze(1)
    return [(position, scores[:, position]) for position in range(scores.shape[1])]


def cross_entropy_summand(
    output, y, n, weight=None, ignore_index=-100, label_smoothing=0.0, reduction="mean", **_unused
):
    """-Σ_positions Σ_c w_c q_c log p_c over the loss' normaliser; q mixes the target with the uniform distribution."""
    C = output.shape[1]
    weight = torch.ones(C, dtype=output.dtype) if weight is None else weight
    indices = not y.is_floating_point()
    total = 0 * output[n].sum()  # in the graph even if every position is ignored
    for position, scores in positions(output, n):
        if indices:
            label = int(y[n].flatten()[position])
            if label == ignore_index:
                continue
            q = torch.zeros(C, dtype=output.dtype)
            q[label] = 1.0
        else:
            q = y[n].reshape(C, -1)[:, position]
        q = (1 - label_smoothing) * q + label_smoothing / C
        log_p = scores - torch.log(torch.exp(scores).sum())
        total = total - (weight * q * log_p).sum()
    if reduction == "sum":
        return total
    if indices:
        return total / sum(weight[int(label)] for label in y.flatten() if int(label) != ignore_index)
    return total / (output.numel() // C)


def mse_summand(output, y, n, reduction="mean"):
    total = ((output[n] - y[n]) ** 2).sum()
    return total / output.numel() if reduction == "mean" else total


def bce_summand(output, y, n, weight=None, pos_weight=None, reduction="mean"):
    p = 1 / (1 + torch.exp(-output))
    positive = torch.ones_like(output) if pos_weight is None else pos_weight.expand_as(output)
    weight = torch.ones_like(output) if weight is None else weight.expand_as(output)
    entries = -weight * (positive * y * torch.log(p) + (1 - y) * torch.log(1 - p))
    total = entries[n].sum()
    return total / output.numel() if reduction == "mean" else total


def labels(shape, ignored=None):
    """Class indices [N, *extra], every third one ignored; always at least one of each kind."""
    y = torch.randint(shape[1], (shape[0], *shape[2:]))
    if ignored is not None:
        y.view(-1)[::3] = ignored
        y.view(-1)[1] = 2
    return y


def probabilities(shape):
    return torch.rand(shape, dtype=torch.float64).softmax(1)


def real(shape):
    return torch.randn(shape, dtype=torch.float64)


def soft_bits(shape):
    return torch.rand(shape, dtype=torch.float64)


def cross_entropy(name, target=labels, extra=(), **options) -> Loss:
    return Loss(
        name,
        partial(F.cross_entropy, **options),
        partial(nn.CrossEntropyLoss, **options),
        target,
        partial(cross_entropy_summand, **options),
        extra,
    )


class LogSoftmaxNLL(nn.Module):
    """The pair that users write; its curvature is that of the cross entropy of the logits."""

    def __init__(self, **options):
        super().__init__()
        self.nll = nn.NLLLoss(**options)

    def forward(self, output, y):
        return self.nll(output.log_softmax(1), y)


def nll(name, target=labels, extra=(), **options) -> Loss:
    return Loss(
        name,
        lambda output, y: F.nll_loss(F.log_softmax(output, 1), y, **options),
        partial(LogSoftmaxNLL, **options),
        target,
        partial(cross_entropy_summand, **options),
        extra,
    )


def mse(name, extra=(), **options) -> Loss:
    return Loss(
        name,
        partial(F.mse_loss, **options),
        partial(nn.MSELoss, **options),
        real,
        partial(mse_summand, **options),
        extra,
    )


def bce(name, extra=(), **options) -> Loss:
    return Loss(
        name,
        partial(F.binary_cross_entropy_with_logits, **options),
        partial(nn.BCEWithLogitsLoss, **options),
        soft_bits,
        partial(bce_summand, **options),
        extra,
    )


IGNORE_1 = partial(labels, ignored=1)
IGNORE_DEFAULT = partial(labels, ignored=-100)

LOSSES = [
    cross_entropy("ce"),
    cross_entropy("ce_sum", reduction="sum"),
    cross_entropy("ce_weight", weight=CLASS_WEIGHT),
    cross_entropy("ce_weight_sum", weight=CLASS_WEIGHT, reduction="sum"),
    cross_entropy("ce_ignore_default", target=IGNORE_DEFAULT),
    cross_entropy("ce_ignore_class", target=IGNORE_1, ignore_index=1),
    cross_entropy("ce_ignore_sum", target=IGNORE_1, ignore_index=1, reduction="sum"),
    cross_entropy("ce_smoothing", label_smoothing=0.2),
    cross_entropy("ce_smoothing_weight", label_smoothing=0.2, weight=CLASS_WEIGHT),
    cross_entropy(
        "ce_weight_ignore_smoothing", target=IGNORE_1, label_smoothing=0.2, weight=CLASS_WEIGHT, ignore_index=1
    ),
    cross_entropy(
        "ce_all_sum",
        target=IGNORE_DEFAULT,
        label_smoothing=0.3,
        weight=CLASS_WEIGHT,
        reduction="sum",
    ),
    cross_entropy("ce_probabilities", target=probabilities),
    cross_entropy("ce_probabilities_sum", target=probabilities, reduction="sum"),
    cross_entropy("ce_probabilities_weight", target=probabilities, weight=CLASS_WEIGHT),
    cross_entropy("ce_probabilities_weight_smoothing", target=probabilities, weight=CLASS_WEIGHT, label_smoothing=0.2),
    cross_entropy("ce_sequence", extra=(2,)),
    cross_entropy("ce_image", extra=(2, 3)),
    cross_entropy("ce_image_sum", extra=(2, 3), reduction="sum"),
    cross_entropy(
        "ce_image_all", target=IGNORE_1, extra=(2, 2), weight=CLASS_WEIGHT, ignore_index=1, label_smoothing=0.1
    ),
    cross_entropy("ce_image_probabilities", target=probabilities, extra=(2, 2)),
    nll("nll"),
    nll("nll_sum", reduction="sum"),
    nll("nll_weight_ignore", target=IGNORE_1, weight=CLASS_WEIGHT, ignore_index=1),
    nll("nll_image", target=IGNORE_DEFAULT, extra=(2, 2)),
    mse("mse"),
    mse("mse_sum", reduction="sum"),
    mse("mse_image", extra=(2, 2)),
    mse("mse_image_sum", extra=(2, 2), reduction="sum"),
    bce("bce"),
    bce("bce_sum", reduction="sum"),
    bce("bce_weight", weight=ENTRY_WEIGHT),
    bce("bce_pos_weight", pos_weight=POS_WEIGHT),
    bce("bce_weight_pos_weight_sum", weight=ENTRY_WEIGHT, pos_weight=POS_WEIGHT, reduction="sum"),
    bce("bce_image", extra=(2, 2), pos_weight=POS_WEIGHT.view(3, 1, 1), weight=ENTRY_WEIGHT.view(4, 3, 1, 1)),
]
LOSS = {loss.name: loss for loss in LOSSES}
