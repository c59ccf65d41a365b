"""The gradient of the *sum* of the samples' losses, from the graph of their mean.

A cotangent that carries 1/N is rounded otherwise in a batch of N + 1 samples, and so are all that
follow from it: one sample changes what arrives at every other. The division by N is therefore left
out where it happens, at the nodes of means, of loss functions and of quotients: what arrives at the
rows of a sample is the same number whatever N is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.nn import functional as F

from lightning_curv.differentiation.internal_pass import internal_pass
from lightning_curv.errors import UnsupportedError
from lightning_curv.graph.heads import linear_inputs, saved_axis
from lightning_curv.graph.tape import Tape
from lightning_curv.losses.classification import label_weight
from lightning_curv.losses.reduction import reduction_of
from lightning_curv.passes.passes import Column, Passes
from lightning_curv.precision import wide
from lightning_curv.recording.records import LossCall

CLASSES = (F.cross_entropy, F.nll_loss)
ENTRYWISE = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)
BINARY = (F.binary_cross_entropy, F.binary_cross_entropy_with_logits)
EQUAL = 1e-6  # relative difference of sums of weights that rounding explains
HALF = 1e-4  # the rounding of the types that are coarser than float32 is larger

Seeds = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Division:
    """A node that divides by N.

    Attributes:
        output: Its output.
        input: Its input.
        seed: From the cotangent of the output to N times that of the input, without a division by
            N.
    """

    output: GradientEdge
    input: GradientEdge
    seed: Seeds


def unscaled(passes: Passes, mean: bool, loss_scale: float) -> Column:
    """Where to start a backward pass, and with what, for the sum of the samples' own losses.

    Args:
        passes: The graph.
        mean: Whether the loss is the mean over the samples, instead of their sum.
        loss_scale: Factor on the loss besides.

    Raises:
        UnsupportedError: Something was computed in half precision, and N is divided by in a way
            that is not known; or a mean over classes divides by weights of which one sample has
            more than another.
    """
    loss = passes.loss
    count = passes.samples.count
    root = GradientEdge(cast("Node", loss.grad_fn), loss.output_nr)
    seed = passes.seed if loss_scale == 1 else passes.seed / loss_scale
    if not mean or count < 1:
        return Column([root], [seed])
    weighing = {node for node, call in passes.tape.losses.items() if _weighs(call)}
    for node in weighing:
        _refuse_unequal_weights(passes, node)
    divisions = _divisions(passes.tape, root, count, loss_scale, weighing)
    if divisions is None:
        if count > 1:  # else there is nothing to divide by
            _refuse_half(passes, loss.dtype)
        return Column([root], [seed * count])
    outputs = [division.output for division in divisions]
    if outputs == [root]:
        arriving: tuple[Tensor | None, ...] = (seed,)
    else:
        arriving = passes.backward([loss], outputs, [seed])
    reached = [(d, g) for d, g in zip(divisions, arriving, strict=True) if g is not None]
    return Column([d.input for d, _ in reached], [d.seed(g) for d, g in reached])


def _weighs(call: LossCall) -> bool:
    """Whether a mean over classes is divided by the weights of the rows, not by their number."""
    arguments = call.arguments
    target = arguments.get("target")
    if call.function not in CLASSES or not isinstance(target, Tensor) or target.is_floating_point():
        return False
    legacy = arguments.get("size_average"), arguments.get("reduce")
    if reduction_of(arguments.get("reduction", "mean"), *legacy) != "mean":
        return False
    if arguments.get("weight") is not None:
        return True
    return bool((target == arguments.get("ignore_index", -100)).any())


def _refuse_unequal_weights(passes: Passes, node: Node) -> None:
    """Refuse a mean whose divisor is changed by a sample: its rows weigh more than another's."""
    call, owners = passes.tape.losses[node], passes.samples.losses.get(node)
    if owners is None:
        return
    arguments = call.arguments
    scores, target = arguments["input"], arguments["target"]
    ignored = arguments.get("ignore_index", -100)
    like = wide(scores.new_empty(0))
    weights = label_weight(like, target, arguments.get("weight"), ignored).flatten().to(like)
    # A row is one of the scores of all classes.
    owner = owners.owner(scores.shape).expand(scores.shape)
    owner = owner.select(1 if scores.ndim > 1 else 0, 0).flatten()
    owned = owner >= 0
    totals = weights.new_zeros(passes.samples.count).index_add_(0, owner[owned], weights[owned])
    totals = totals[owner[owned].unique()]  # of the samples that have rows here
    if len(totals) and bool(totals.max() - totals.min() > EQUAL * totals.max()):
        raise UnsupportedError(
            f"Private steps need samples that do not influence each other, found `{call.name}` "
            "whose mean is divided by the weights of all rows (those of classes, or none for "
            "ignored targets), of which one sample has more than another: it would change the "
            "gradients of all others. Make one loss of each sample, with `reduction='none'` and a "
            "quotient of its own rows, and return the mean of these."
        )


def _refuse_half(passes: Passes, dtype: torch.dtype) -> None:
    eps = max(passes.tape.eps, torch.finfo(dtype).eps)
    if eps > HALF:
        raise UnsupportedError(
            "Private steps in half precision need a loss that is a mean over the samples in a way "
            "that can be seen in its graph, found another one: the division by their number would "
            "take part in the rounding, so that one sample changes the gradients of all others. "
            "Return `losses.mean()`, `losses.sum() / len(losses)` or a loss function of torch with "
            "`reduction='mean'`; or let the loss be a sum (`loss_reduction='sum'`), or train in "
            "float32."
        )


def _divisions(
    tape: Tape,
    root: GradientEdge,
    count: int,
    loss_scale: float,
    weighing: Container[Node],
) -> list[_Division] | None:
    """The first node that divides by N on every way down from the loss.

    `None` if there is a way without one. The calls of `weighing` divide by something else.
    """
    divisions: list[_Division] = []
    stack = [root[:2]]
    seen = set[tuple[Node, int]]()
    while stack:
        node, number = stack.pop()
        if (node, number) in seen:
            continue
        seen.add((node, number))
        accumulates = (
            loss_scale != 1 and (node, number) == root[:2] and _quotient(node) == 1 / loss_scale
        )
        if accumulates:
            division = None
        else:
            division = _division(tape, node, number, count, node in weighing)
        if division is not None:
            divisions.append(division)
        elif node in tape.uses and tape.uses[node].operands:
            return None
        elif inputs := linear_inputs(node):
            stack += inputs
        else:
            return None
    return divisions


def _division(tape: Tape, node: Node, number: int, count: int, weighing: bool) -> _Division | None:
    output = GradientEdge(node, number)
    name = node.name()
    if name in ("MeanBackward0", "MeanBackward1"):
        return _mean(node, output, count)
    call = tape.losses.get(node)
    if call is not None and not weighing:
        division = _loss(call, output, count)
        if division is not None:
            return division
    divisor = _quotient(node)
    if divisor and divisor % count == 0:
        return _Division(output, _below(node), lambda g: g * (count / divisor))
    return None


def _below(node: Node) -> GradientEdge:
    return next(
        GradientEdge(after, index) for after, index in node.next_functions if after is not None
    )


def _quotient(node: Node) -> float | None:
    """The number that a node divides by: in a quotient, or a product with its inverse."""
    saved: Any = getattr(node, "_saved_other", None)
    inputs = [after for after, _ in node.next_functions if after is not None]
    if not isinstance(saved, Tensor) or saved.ndim or len(inputs) != 1:
        return None
    value = float(saved)
    if node.name() == "DivBackward0":
        return value
    if (
        node.name() == "MulBackward0"
        and value
        and math.isclose(1 / value, round(1 / value), rel_tol=1e-7)
    ):
        return float(round(1 / value))
    return None


def _mean(node: Any, output: GradientEdge, count: int) -> _Division | None:
    shape = torch.Size(node._saved_self_sym_sizes)
    axes = sorted(saved_axis(dim, len(shape)) for dim in getattr(node, "_saved_dim", None) or ())
    axes = axes or list(range(len(shape)))
    keeps = getattr(node, "_saved_keepdim", False)
    entries = math.prod(shape[axis] for axis in axes)
    if not entries or entries % count:
        return None

    def seed(g: Tensor) -> Tensor:
        for axis in () if keeps else axes:
            g = g.unsqueeze(axis)
        return (g * (count / entries)).expand(shape)

    return _Division(output, _below(node), seed)


def _loss(call: LossCall, output: GradientEdge, count: int) -> _Division | None:
    """A loss function that takes the mean: differentiated once more, without it."""
    arguments = call.arguments
    target = call.arguments.get("target")
    legacy = arguments.get("size_average") is not None or arguments.get("reduce") is not None
    if call.shape or call.beside or legacy or arguments.get("reduction", "mean") != "mean":
        return None
    if call.function not in CLASSES + ENTRYWISE + BINARY or not isinstance(target, Tensor):
        return None
    if call.function not in BINARY and arguments.get("weight") is not None:
        return None  # divided by the sum of the weights
    logarithms = _log_probabilities(call, output.node)
    if logarithms is not None:
        return _Division(output, call.input, partial(_of_classes, logarithms, target, count))

    def seed(g: Tensor) -> Tensor:
        inputs = arguments["input"]
        dtype = torch.promote_types(inputs.dtype, torch.float32)  # as under autocast
        own = {name: _cast(value, dtype) for name, value in arguments.items()}
        with torch.enable_grad(), internal_pass():
            own["input"] = own["input"].detach().requires_grad_()
            rows = call.function(**{**own, "reduction": "none"})
            weights = (g * (count / rows.numel())).to(rows.dtype).expand_as(rows)
            (gradient,) = torch.autograd.grad(rows, own["input"], weights)
        return gradient.to(inputs.dtype)

    return _Division(output, call.input, seed)


def _log_probabilities(call: LossCall, node: Any) -> Tensor | None:
    """What cross entropy of classes has left in the graph, if that is of its input's type."""
    if call.function is not F.cross_entropy or node.name() != "NllLossBackward0":
        return None
    logarithms: Tensor = node._saved_self
    # Half precision is differentiated in float32, as under autocast.
    return logarithms if logarithms.dtype == call.arguments["input"].dtype else None


def _of_classes(logarithms: Tensor, target: Tensor, count: int, g: Tensor) -> Tensor:
    """The gradient of cross entropy: the probabilities minus one at the target.

    The most usual loss, so without a graph of its own, which takes several times as long.
    """
    gradient = logarithms.exp()
    gradient.scatter_(-1, target.unsqueeze(-1), -1.0, reduce="add")
    return gradient.mul_(g * (count / target.numel()))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    return value
