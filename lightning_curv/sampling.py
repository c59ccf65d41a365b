"""The generator of Monte-Carlo targets."""

from __future__ import annotations

import torch

_generators: dict[torch.device, tuple[int, torch.Generator]] = {}


def default_generator(device: torch.device) -> torch.Generator:
    """A generator of our own, so that training is bit-identical with and without Monte-Carlo quantities.

    One per device; it restarts from ``torch.initial_seed()`` whenever that changes (``torch.manual_seed``), so that
    runs can be repeated. Nothing is ever drawn from torch's own generators.
    """
    seed = torch.initial_seed()
    if device not in _generators or _generators[device][0] != seed:
        _generators[device] = (seed, torch.Generator(device).manual_seed(seed))
    return _generators[device][1]
