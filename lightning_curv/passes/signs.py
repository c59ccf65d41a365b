"""Signs of the weights of a loss that are known whatever the numbers are, without a look at any."""

from __future__ import annotations

from collections.abc import Container
from typing import cast

from torch import Tensor
from torch.autograd.graph import Node
from torch.nn import functional as F

from lightning_curv.graph.heads import name_of
from lightning_curv.recording.records import LossCall

# Nodes whose output rises with every input.
_RISING = """
    Alias Clone Expand Mean Permute Reshape ReshapeAlias Select Slice Squeeze Stack Sum ToCopy
    Transpose UnsafeView Unsqueeze View
"""
RISING = frozenset(_RISING.split())
# Loss functions whose terms weigh 1 where no weights are given.
UNWEIGHTED = {
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.cross_entropy,
    F.huber_loss,
    F.mse_loss,
    F.smooth_l1_loss,
}


def weighs_nothing_negative(call: LossCall) -> bool:
    """Whether the terms of a loss call have weights ≥ 0 in the call, as its settings say."""
    arguments = call.arguments
    if call.function not in UNWEIGHTED:
        return False
    if arguments.get("weight") is not None or arguments.get("pos_weight") is not None:
        return False
    if call.function is F.cross_entropy:
        smoothing = arguments.get("label_smoothing", 0.0)
        return not arguments["target"].is_floating_point() and 0 <= smoothing <= 1
    return True


def rises_with(loss: Tensor, ends: Container[Node]) -> bool:
    """Whether a loss rises, or stays, with all that it is made of, as far as some nodes.

    Args:
        loss: The root of a graph that was not freed.
        ends: The nodes that nothing is asked of the graph below.

    Returns:
        Whether the graph says so; False also where only numbers on a device could say it.
    """
    seen: set[Node] = set()
    stack = [cast("Node", loss.grad_fn)]
    while stack:
        node = stack.pop()
        if node in seen or node in ends:
            continue
        seen.add(node)
        if not _rises(node):
            return False
        stack += [after for after, _ in node.next_functions if after is not None]
    return True


def _rises(node: Node) -> bool:
    """Whether a node's output rises with all of its inputs."""
    name = name_of(node)
    if name == "Add":
        return bool(node._saved_alpha >= 0)  # type: ignore[attr-defined]
    if name in ("Mul", "Div"):
        # Of a number, which a node keeps as a tensor of the processor.
        inputs = [after for after, _ in node.next_functions if after is not None]
        factor = node._saved_other  # type: ignore[attr-defined]
        is_number = isinstance(factor, Tensor) and factor.device.type == "cpu" and not factor.ndim
        return len(inputs) == 1 and is_number and bool(factor >= 0)
    return name in RISING
