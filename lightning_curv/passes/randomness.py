"""The generator of Monte-Carlo targets, and random subsets of the samples."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_generators: dict[torch.device, tuple[int, torch.Generator]] = {}


def default_generator(device: torch.device) -> torch.Generator:
    """A generator of our own: training is the same with and without Monte-Carlo quantities.

    One per device; it restarts from `torch.initial_seed()` whenever that changes
    (`torch.manual_seed`), so that runs can be repeated. Nothing is ever drawn from torch's own
    generators.
    """
    seed = torch.initial_seed()
    if device not in _generators or _generators[device][0] != seed:
        _generators[device] = (seed, torch.Generator(device).manual_seed(seed))
    return _generators[device][1]


@dataclass(frozen=True)
class Cap:
    """At most S samples of a batch for some extensions: their results are those of a random subset.

    Attributes:
        size: S.
        extensions: Those that are content with it.
        generator: Draws the subset.
    """

    size: int
    extensions: Collection[Any]
    generator: torch.Generator

    def choose(self, count: int) -> Tensor | None:
        """The chosen ones of `count` samples; `None`: all of them."""
        if count > self.size:
            return random_subset(count, self.size, self.generator)
        return None


def random_subset(count: int, size: int, generator: torch.Generator) -> Tensor:
    """`size` of the numbers below `count`, ascending; all subsets are equally likely."""
    order = torch.randperm(count, generator=generator, device=generator.device)
    return order[:size].sort().values
