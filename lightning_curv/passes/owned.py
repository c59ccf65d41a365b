"""What passes know of the samples: how many there are, and which rows each owns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.autograd.graph import Node

from lightning_curv.graph.joins import Join
from lightning_curv.terms.owners import Owners


# One is made in every step: a frozen one takes five times as long.
@dataclass(slots=True)
class Samples:
    """N, and the owners of the rows of every use's output and every loss call's input.

    Nobody changes it.
    """

    count: int
    uses: Mapping[Node | Join, Owners]
    losses: Mapping[Node, Owners]
    partial: bool = False  # some samples of a larger batch

    def only(self, chosen: Tensor) -> Samples:
        """Some of the samples, `chosen [S]` in ascending order."""
        uses = {node: owners.only(chosen) for node, owners in self.uses.items()}
        losses = {node: owners.only(chosen) for node, owners in self.losses.items()}
        return Samples(len(chosen), uses, losses, partial=True)
