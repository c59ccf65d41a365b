"""Where the tensors between the recorded ops carry the samples: two passes, once per structure of a graph."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_curv.passes import Passes
from lightning_curv.places import Place, largest_entry, places_of

_KNOWN: OrderedDict[Hashable, list[Place | None]] = OrderedDict()  # structures seen lately
_KNOWN_SIZE = 256


def places_at(passes: Passes, edges: Sequence[GradientEdge]) -> dict[GradientEdge, Place | None]:
    """Where the tensors at ``edges`` carry the samples; ``None``: nothing arrives there from the losses.

    Raises:
        UnsupportedError: Samples mix.
    """
    if not edges:
        return {}
    key = _structure(passes, edges)
    if (known := _KNOWN.get(key)) is not None:
        return dict(zip(edges, known, strict=True))
    first, second = _probed(passes, edges)
    scale, eps, count = largest_entry(first), passes.tape.eps, passes.samples.count
    found = [
        None if a is None or b is None else places_of(a, b, scale, eps, count)
        for a, b in zip(first, second, strict=True)
    ]
    places = [None if choices is None else choices[0] for choices in found]
    conclusive = all(a is None or bool(a.isfinite().all()) for a in first)
    if conclusive and all(choices is None or len(choices) == 1 for choices in found):
        _KNOWN[key] = places
        while len(_KNOWN) > _KNOWN_SIZE:
            _KNOWN.popitem(last=False)
    return dict(zip(edges, places, strict=True))


def shape_at(edge: GradientEdge) -> torch.Size:
    """The shape of the tensor at an edge."""
    return torch.Size(edge.node._input_metadata[edge.output_nr].shape)


def _structure(passes: Passes, edges: Sequence[GradientEdge]) -> Hashable:
    tape = passes.tape
    return (
        passes.samples.count,
        tuple(tape.structure),
        tuple((use.shape, use.dtype, use.couples) for use in tape.uses.values()),
        tuple(call.arguments["input"].shape for call in tape.losses.values()),
        tuple((edge.node.name(), edge.output_nr, shape_at(edge)) for edge in edges),
    )


Cotangents = tuple[Tensor | None, ...]


def _probed(passes: Passes, edges: Sequence[GradientEdge]) -> tuple[Cotangents, Cotangents]:
    """Two cotangents per edge, the second with weighted samples: what `places_of` needs."""
    calls = [(call.input, call.arguments["input"], passes.samples.losses[n]) for n, call in passes.tape.losses.items()]
    ones = [torch.linspace(1, 2, v.numel(), device=v.device).to(v.dtype).reshape(v.shape) for _, v, _ in calls]
    count = passes.samples.count
    numbered = [one * place.weights(one, count) for one, (_, _, place) in zip(ones, calls, strict=True)]
    starts = [edge for edge, _, _ in calls]
    return passes.backward(starts, edges, ones), passes.backward(starts, edges, numbered)
