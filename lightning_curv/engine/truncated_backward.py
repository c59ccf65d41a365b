"""The user's backward pass, ended at the recorded ops: no gradient by their parameters is made."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_curv.distributed.shards import Shard, end_pass, gathered
from lightning_curv.errors import UnsupportedError
from lightning_curv.extensions.receiver import GradientReceiver
from lightning_curv.passes.passes import Passes
from lightning_curv.passes.unscaled import unscaled
from lightning_curv.terms.jacobian import Jacobian
from lightning_curv.terms.term import Term


def run(
    passes: Passes,
    receivers: Sequence[GradientReceiver],
    shared: bool,
    shards: Mapping[Tensor, Shard],
    **options: Any,
) -> None:
    """Give the per-sample Jacobians of the loss to the receivers, and other leaves their gradients.

    Args:
        passes: The graph.
        receivers: Stand in for the gradients of the parameters that they receive.
        shared: Whether somebody else needs the whole pass: it then runs too, the gradients
            included.
        shards: The parameters under FSDP2, by the leaves of the graph.
        options: Arguments of `Tensor.backward`.

    Raises:
        UnsupportedError: `inputs` or `create_graph` are asked for.
    """
    if options.get("create_graph") or options.get("inputs") is not None:
        raise UnsupportedError(
            "A backward pass whose gradients are clipped sample by sample takes neither "
            "`create_graph` nor `inputs`; leave them out. Parameters that the optimizer does not "
            "have get ordinary gradients."
        )
    parameters_of_uses = passes.tape.parameters
    leaves = dict.fromkeys(
        [*passes.tape.leaves, *(p for group in parameters_of_uses.values() for p in group)]
    )
    others = [leaf for leaf in leaves if not any(r.receives(leaf) for r in receivers)]
    kept = shared or bool(others) or bool(options.get("retain_graph"))
    groups = _by_scale(receivers)
    with gathered(shards.values()):
        for i, group in enumerate(groups):
            _receive(passes, group, parameters_of_uses, kept or i + 1 < len(groups))
    if shared or others:
        Tensor.backward(passes.loss, **{**options, "inputs": None if shared else others})
    else:
        end_pass(shards.values())


def _by_scale(receivers: Sequence[GradientReceiver]) -> list[list[GradientReceiver]]:
    """Receivers that one pass can serve."""
    groups: dict[tuple[bool, float], list[GradientReceiver]] = {}
    for receiver in receivers:
        groups.setdefault((receiver.mean, receiver.loss_scale), []).append(receiver)
    return list(groups.values())


@torch.no_grad()
def _receive(
    passes: Passes,
    receivers: Sequence[GradientReceiver],
    parameters_of_uses: dict[Any, list[Tensor]],
    keep_graph: bool,
) -> None:
    for receiver in receivers:
        receiver.begin(passes.samples.count)
    column = unscaled(passes, receivers[0].mean, receivers[0].loss_scale)
    left = Counter(p for group in parameters_of_uses.values() for p in group)
    terms: dict[Tensor, list[Term]] = defaultdict(list)
    cotangents = list(passes.backward(column.edges, passes.use_edges, column.seeds, keep_graph))
    for i, (node, use) in enumerate(passes.tape.uses.items()):
        g, cotangents[i] = cotangents[i], None
        if g is not None:
            for parameter, term in passes.terms(node, use, g[None]):
                terms[parameter].append(term)
        for parameter in parameters_of_uses[node]:
            left[parameter] -= 1
            if not left[parameter] and parameter in terms:  # its inputs are still in the cache
                jacobian = Jacobian(parameter, terms.pop(parameter))
                for receiver in receivers:
                    if receiver.receives(parameter):
                        receiver.receive(jacobian)
    for receiver in receivers:
        receiver.end()
