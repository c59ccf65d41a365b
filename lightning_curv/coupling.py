"""Whether a loss treats the samples apart, told by its second derivative at the network's outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_curv.heads import Head
from lightning_curv.own_passes import unheard
from lightning_curv.owners import Owners

if TYPE_CHECKING:
    from lightning_curv.passes import Passes


class Undecided(Exception):
    """The loss has no second derivative in torch."""


def separable(passes: Passes, tops: Sequence[Head], outputs: Sequence[tuple[Head, Owners]]) -> bool:
    """Whether a part of a loss is a sum over samples of functions of their own rows of the network's outputs.

    The Hessian H of such a part maps a direction whose rows are weighted by their samples to the image with the same
    weights. It costs two differentiations of what lies above the outputs, and no pass through the network.

    Args:
        passes: The graph.
        tops: Where the part begins.
        outputs: The outputs that it is a function of, and who owns their rows.

    Raises:
        Undecided: There is no second derivative.
    """
    seeds = passes.gradients([head.edge for head in tops])
    reached = [(head.edge, seed) for head, seed in zip(tops, seeds, strict=True) if seed is not None]
    edges = [head.edge for head, _ in outputs]
    with torch.enable_grad(), unheard():
        try:
            gradients = torch.autograd.grad(
                [edge for edge, _ in reached], edges, [s for _, s in reached], create_graph=True, allow_unused=True
            )
            curved = [(i, g) for i, g in enumerate(gradients) if g is not None and g.requires_grad]
            if not curved:
                return True
            trial = [_trial(head.like) for head, _ in outputs]
            weights = [owners.weights(t) for t, (_, owners) in zip(trial, outputs, strict=True)]

            def image(vectors: Sequence[Tensor]) -> list[Tensor]:
                found = torch.autograd.grad(
                    [g for _, g in curved], edges, [vectors[i] for i, _ in curved], retain_graph=True, allow_unused=True
                )
                return [torch.zeros_like(t) if f is None else f for f, t in zip(found, trial, strict=True)]

            plain, weighted = image(trial), image([t * w for t, w in zip(trial, weights, strict=True)])
        except RuntimeError as error:
            raise Undecided(str(error)) from error
    scale = max((float(p.abs().max()) for p in plain if p.numel()), default=0.0)
    eps = max(passes.tape.eps, *(torch.finfo(p.dtype).eps for p in plain))
    return all(
        bool(((w * p - x).abs() <= 1e3 * eps * scale).all()) for p, x, w in zip(plain, weighted, weights, strict=True)
    )


def _trial(like: Tensor) -> Tensor:
    entries = torch.arange(1.0, like.numel() + 1, dtype=torch.float64)
    return torch.cos(entries * entries).to(like.device, like.dtype).reshape(like.shape)
