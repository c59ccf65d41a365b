"""What the parts of one search for samples share: what is known of the graph and the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.autograd.graph import Node

from lightning_curv.graph.heads import find_heads
from lightning_curv.graph.joins import Join
from lightning_curv.samples.batch import Batch, sample_axes
from lightning_curv.samples.meeting import reads_unknown
from lightning_curv.terms.owners import Owners

if TYPE_CHECKING:
    from lightning_curv.passes.passes import Passes


class Search:
    """One search for the samples of a graph.

    Args:
        passes: The recorded graph.
        batch: What is known of the batch.
        independent: Whether samples must not influence each other.
        most: Quantities are those of at most so many of the samples.
        strict: Whether samples must be apart to the last digits.

    Attributes:
        uses: The recorded ops that have parameters.
        axes: The axes of the output of each that may carry the samples, as its rule says.
        heads: Where the summands of the loss are still apart.
        blind: Whether some custom function may read the batch unseen.
        reason: Why the graph did not agree with the last number that was tried.
        conclusive: Whether every op was reached by the weights.
        told_of_all: Whether so were all samples at every op.
        silent: Where no weight arrives.
        anchors: Where ops have their samples for a number of them, as the rows that they read tell.
    """

    def __init__(
        self,
        passes: Passes,
        batch: Batch,
        independent: bool,
        most: int | None = None,
        strict: bool = False,
    ) -> None:
        self.passes = passes
        self.tape = passes.tape
        self.batch = batch
        self.independent = independent
        self.most = most
        self.strict = strict
        self.uses = {node: use for node, use in self.tape.uses.items() if use.operands}
        self.axes = {node: sample_axes(use) for node, use in self.uses.items()}
        self.heads = find_heads(self.tape, passes.loss)
        self.blind = any(reads_unknown(node, batch.holds) for node in self.tape.nodes)
        # What the verification of one assignment leaves for the next, and for messages.
        self.reason = ""
        self.conclusive = True
        self.told_of_all = True
        self.silent: set[Node | Join] = set()
        self.anchors: dict[tuple[Node | Join, int], Owners | None] = {}
