"""The Jacobian of a part of the batch, for the curvature along directions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from lightning_curv.extensions.columns import ExactGGN, MonteCarloGGN, Source
from lightning_curv.extensions.unevaluated import KeptJacobian
from lightning_curv.passes.passes import Passes
from lightning_curv.passes.randomness import random_subset
from lightning_curv.terms.jacobian import Jacobian


@dataclass(frozen=True)
class PartOf:
    """The columns of a source for some of the samples, as if the batch were as many of these.

    Their outer products then estimate the GGN of the whole batch.

    Attributes:
        source: What makes the columns.
        most: How many samples, drawn at random; smaller batches are taken as they are.
    """

    source: ExactGGN | MonteCarloGGN
    most: int

    def jacobians(self, passes: Passes) -> Iterator[dict[Tensor, Jacobian]]:
        """The Jacobians of the columns, each of which costs one backward pass.

        Args:
            passes: Of all samples.

        Yields:
            The Jacobians of one parameter or more.
        """
        count = passes.samples.count
        if count > self.most:
            chosen = random_subset(count, self.most, passes.generator)
            # Curvature is linear in the gradient at the root, which is the weight of the loss.
            weight = passes.seed * (count / self.most)
            passes = replace(passes.only(chosen), gradient=weight)
        yield from self.source.jacobians(passes)


class JacobianPart(KeptJacobian):
    """The Jacobian of `PartOf` a source, unevaluated, in `jacobian_part`.

    Args:
        source: What makes the columns.
        most: How many samples.
    """

    savefield = "jacobian_part"

    def __init__(self, source: ExactGGN | MonteCarloGGN, most: int) -> None:
        self.source: Source = PartOf(source, most)  # type: ignore[assignment]
