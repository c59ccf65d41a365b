"""The losses under test: one row each, with the n-th summand written naively (the summands add to the loss)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASS_WEIGHT = torch.tensor([0.5, 2.0, 1.3], dtype=torch.float64)
POS_WEIGHT = torch.tensor([3.0, 0.4, 1.7], dtype=torch.float64)
ENTRY_WEIGHT = torch.tensor(
    [[0.3, 1.0, 2.0], [1.5, 0.2, 0.9], [0.7, 0.1, 1.1], [2.2, 0.6, 0.8]], dtype=torch.float64
)


@dataclass(frozen=True)
class Loss:
    """A loss as function and as module, a maker of targets, and its n-th summand."""

    name: str
    function: Callable[[Tensor, Tensor], Tensor]
    module: Callable[[], nn.Module]
    target: Callable[[torch.Size], Tensor]
    summand: Callable[[Tensor, Tensor, int], Tensor]
    extra: tuple[int, ...] = ()  # axes of the output after [N, C]
    calls: int = 1  # of loss functions with curvature


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
        return total / sum(
            weight[int(label)] for label in y.flatten() if int(label) != ignore_index
        )
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


def counts(shape):
    return torch.poisson(torch.full(shape, 2.0, dtype=torch.float64))


class Called(nn.Module):
    """A function of output and target as a module; `transform` comes between the output and a loss module."""

    def __init__(self, function, transform=None):
        super().__init__()
        self.function, self.transform = function, transform

    def forward(self, output, y):
        return self.function(output if self.transform is None else self.transform(output), y)


def elementwise_summand(output, y, n, entry, reduction="mean"):
    """Σ of the sample's entries over the loss' normaliser."""
    normaliser = {"mean": output.numel(), "batchmean": len(output), "sum": 1}[reduction]
    return entry(output, y)[n].sum() / normaliser


def elementwise(
    name,
    function,
    module,
    entry,
    target=real,
    extra=(),
    transform=None,
    reduction="mean",
    **options,
):
    """A loss that is a sum over entries; `entry` writes one of them as a function of the network's output."""
    options["reduction"] = reduction
    return Loss(
        name,
        Called(partial(function, **options), transform),
        lambda: Called(module(**options), transform),
        target,
        partial(elementwise_summand, entry=entry, reduction=reduction),
        extra,
    )


def huber_entry(output, y, zone, slope):
    d = (output - y).abs()
    return slope * torch.where(d < zone, d**2 / (2 * zone), d - zone / 2)


def stirling(y):
    """Approximation of log y! for counts above one, as torch has it."""
    return torch.where(
        y > 1, y * torch.log(y) - y + torch.log(2 * math.pi * y) / 2, torch.zeros_like(y)
    ).nan_to_num()


def kl_entry(output, y, log_target=False):
    y = y.exp() if log_target else y
    return y * (y.log() - (output - output.exp().sum(1, keepdim=True).log()))


def bit_entry(output, y, weight=1.0):
    p = 1 / (1 + torch.exp(-output))
    return -weight * (y * torch.log(p) + (1 - y) * torch.log(1 - p))


def gaussian(name, var, extra=(), **options) -> Loss:
    """The variance is an argument of the call; the constant log(2π)/2 is part of the loss on request."""
    constant = math.log(2 * math.pi) if options.get("full") else 0.0
    return elementwise(
        name,
        lambda output, y, **kwargs: F.gaussian_nll_loss(output, y, var, **kwargs),
        lambda **kwargs: Called(lambda output, y: nn.GaussianNLLLoss(**kwargs)(output, y, var)),
        lambda output, y: (
            ((output - y) ** 2 / var + torch.log(torch.as_tensor(var, dtype=y.dtype)) + constant)
            / 2
        ),
        extra=extra,
        **options,
    )


kl = partial(
    elementwise,
    function=F.kl_div,
    module=nn.KLDivLoss,
    target=probabilities,
    transform=partial(F.log_softmax, dim=1),
)
bits = partial(
    elementwise,
    function=F.binary_cross_entropy,
    module=nn.BCELoss,
    target=soft_bits,
    transform=torch.sigmoid,
)
poisson = partial(elementwise, function=F.poisson_nll_loss, module=nn.PoissonNLLLoss, target=counts)
huber = partial(elementwise, function=F.huber_loss, module=nn.HuberLoss)
smooth_l1 = partial(elementwise, function=F.smooth_l1_loss, module=nn.SmoothL1Loss)


def reduced_by_hand(name, function, summand, target, extra=(), calls=1) -> Loss:
    """Reduction, weights, masks and sums in the user's own code."""
    return Loss(name, function, lambda: Called(function), target, summand, extra, calls)


def weighted(weights, loss_sum):
    """The n-th summand where sample n has a weight of its own."""
    return lambda output, y, n: weights[n] * loss_sum(output, y, n)


SAMPLE_WEIGHT = torch.tensor([0.5, 0.0, 2.0, 1.0], dtype=torch.float64)
MASK = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]], dtype=torch.float64)
ce_sum = partial(cross_entropy_summand, reduction="sum")


def mixup(output, y):
    return 0.3 * F.cross_entropy(output, y) + 0.7 * F.cross_entropy(output, y.flip(0))


def mixup_summand(output, y, n):
    return 0.3 * cross_entropy_summand(output, y, n) + 0.7 * cross_entropy_summand(
        output, y.flip(0), n
    )


def two_tasks(output, y):
    return 2 * F.mse_loss(output[:, :2], y[:, :2]) + F.binary_cross_entropy_with_logits(
        output[:, 2], y[:, 2]
    )


def two_tasks_summand(output, y, n):
    return 2 * mse_summand(output[:, :2], y[:, :2], n) + bce_summand(output[:, 2], y[:, 2], n)


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
        "ce_weight_ignore_smoothing",
        target=IGNORE_1,
        label_smoothing=0.2,
        weight=CLASS_WEIGHT,
        ignore_index=1,
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
    cross_entropy(
        "ce_probabilities_weight_smoothing",
        target=probabilities,
        weight=CLASS_WEIGHT,
        label_smoothing=0.2,
    ),
    cross_entropy("ce_sequence", extra=(2,)),
    cross_entropy("ce_image", extra=(2, 3)),
    cross_entropy("ce_image_sum", extra=(2, 3), reduction="sum"),
    cross_entropy(
        "ce_image_all",
        target=IGNORE_1,
        extra=(2, 2),
        weight=CLASS_WEIGHT,
        ignore_index=1,
        label_smoothing=0.1,
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
    poisson("poisson", entry=lambda f, y: f.exp() - y * f),
    poisson(
        "poisson_full_sum",
        entry=lambda f, y: f.exp() - y * f + stirling(y),
        full=True,
        reduction="sum",
    ),
    poisson(
        "poisson_rates",
        entry=lambda f, y: f.exp() - y * torch.log(f.exp() + 1e-8),
        transform=torch.exp,
        log_input=False,
        extra=(2,),
    ),
    gaussian("gaussian", ENTRY_WEIGHT),
    gaussian("gaussian_shared_sum", ENTRY_WEIGHT[:, :1], reduction="sum", full=True),
    gaussian("gaussian_float", 0.7, extra=(2, 2)),
    elementwise("l1", F.l1_loss, nn.L1Loss, lambda f, y: (f - y).abs()),
    smooth_l1("smooth_l1", entry=partial(huber_entry, zone=1.0, slope=1.0)),
    smooth_l1(
        "smooth_l1_beta",
        entry=partial(huber_entry, zone=1.5, slope=1.0),
        beta=1.5,
        extra=(2,),
        reduction="sum",
    ),
    huber("huber", entry=partial(huber_entry, zone=1.0, slope=1.0)),
    huber(
        "huber_delta",
        entry=partial(huber_entry, zone=1.5, slope=1.5),
        delta=1.5,
        extra=(2,),
        reduction="sum",
    ),
    kl("kl_batchmean", entry=kl_entry, reduction="batchmean"),
    kl("kl_mean", entry=kl_entry, extra=(2,)),
    kl(
        "kl_log_target",
        entry=partial(kl_entry, log_target=True),
        log_target=True,
        reduction="sum",
        target=lambda shape: real(shape).log_softmax(1),
    ),
    bits("bits", entry=bit_entry),
    bits("bits_sum", entry=bit_entry, reduction="sum", extra=(2,)),
    bits("bits_weight", entry=partial(bit_entry, weight=ENTRY_WEIGHT), weight=ENTRY_WEIGHT),
    reduced_by_hand(
        "ce_none_weights",
        lambda output, y: (SAMPLE_WEIGHT * F.cross_entropy(output, y, reduction="none")).mean(),
        weighted(SAMPLE_WEIGHT / 4, ce_sum),
        labels,
    ),
    reduced_by_hand(
        "ce_none_selected",
        lambda output, y: F.cross_entropy(output, y, reduction="none")[SAMPLE_WEIGHT > 0].mean(),
        weighted((SAMPLE_WEIGHT > 0).double() / 3, ce_sum),
        labels,
    ),
    reduced_by_hand(
        "ce_image_none_mask",
        lambda output, y: (F.cross_entropy(output, y, reduction="none") * MASK).sum() / MASK.sum(),
        lambda output, y, n: (
            sum(MASK[n, t] * ce_sum(output[:, :, t], y[:, t], n) for t in range(3)) / MASK.sum()
        ),
        labels,
        extra=(3,),
    ),
    reduced_by_hand(
        "mse_none_mask",
        lambda output, y: (F.mse_loss(output, y, reduction="none") * MASK).sum() / MASK.sum(),
        lambda output, y, n: (MASK[n] * (output[n] - y[n]) ** 2).sum() / MASK.sum(),
        real,
    ),
    reduced_by_hand(
        "mse_argument_weight",
        lambda output, y: F.mse_loss(output, y, weight=ENTRY_WEIGHT),
        lambda output, y, n: (ENTRY_WEIGHT[n] * (output[n] - y[n]) ** 2).sum() / ENTRY_WEIGHT.sum(),
        real,
    ),
    reduced_by_hand(
        "huber_argument_weight",
        lambda output, y: F.huber_loss(output, y, weight=ENTRY_WEIGHT),
        lambda output, y, n: (ENTRY_WEIGHT * huber_entry(output, y, 1.0, 1.0))[n].sum() / 12,
        real,
    ),
    reduced_by_hand(
        "kl_none_mask",
        lambda output, y: (F.kl_div(output.log_softmax(1), y, reduction="none") * MASK).sum(),
        lambda output, y, n: (MASK * kl_entry(output, y))[n].sum(),
        probabilities,
    ),
    reduced_by_hand(
        "bce_none_weights",
        lambda output, y: (
            SAMPLE_WEIGHT
            @ F.binary_cross_entropy_with_logits(output, y, reduction="none").sum(1)
            / SAMPLE_WEIGHT.sum()
        ),
        weighted(SAMPLE_WEIGHT / SAMPLE_WEIGHT.sum(), partial(bce_summand, reduction="sum")),
        soft_bits,
    ),
    reduced_by_hand("ce_mixup", mixup, mixup_summand, labels, calls=2),
    reduced_by_hand("two_tasks", two_tasks, two_tasks_summand, soft_bits),
    bce(
        "bce_image",
        extra=(2, 2),
        pos_weight=POS_WEIGHT.view(3, 1, 1),
        weight=ENTRY_WEIGHT.view(4, 3, 1, 1),
    ),
]
LOSS = {loss.name: loss for loss in LOSSES}
