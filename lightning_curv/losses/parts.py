"""Parts of a loss: functions of the same outputs of the network, and their curvature."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_curv.losses.likelihoods import Likelihood
from lightning_curv.terms.owners import Owners

Signed = tuple[list[Tensor], Tensor | None]  # a column at every output, and its sign per sample
Multiplication = Callable[[Sequence[Tensor]], list[Tensor]]  # a matrix times vectors


class LossPart(ABC):
    """A part of a loss as a function of outputs of the network.

    Every list of tensors has one entry per output.

    Attributes:
        edges: Where the outputs are in the graph.
        likes: Tensors of their shapes, types and devices.
        owners: Which sample owns each row of them.
    """

    edges: Sequence[GradientEdge]
    likes: Sequence[Tensor]
    owners: Sequence[Owners]

    @property
    @abstractmethod
    def flat(self) -> bool:
        """Whether the part is piecewise linear, so that all of its curvature is zero."""

    @abstractmethod
    def columns(self, complete: bool) -> Iterator[list[Tensor]]:
        """Columns whose squares add up to the curvature that the GGN takes.

        Args:
            complete: One column per output entry of a sample, where fewer would do.
        """

    @abstractmethod
    def sample(self, generator: torch.Generator) -> list[Tensor]:
        """A random column whose expected square is that curvature."""

    @abstractmethod
    def multiplication(self) -> Multiplication:
        """That curvature as a function of a vector, which does not need the graph."""

    @abstractmethod
    def signed_columns(self) -> Iterator[Signed]:
        """Columns whose signed squares add up to the Hessian, less those that are zero."""


@dataclass
class KnownPart(LossPart):
    """A known loss function of one output.

    Attributes:
        edge: Where the output is in the graph.
        like: A tensor of its shape, type and device.
        owner: Which sample owns each row of it.
        function: The loss function, or the key that describes it.
        make: Makes the likelihood.
    """

    edge: GradientEdge
    like: Tensor
    owner: Owners
    function: Callable[..., object]
    make: Callable[[], Likelihood]

    def __post_init__(self) -> None:
        self.edges = [self.edge]
        self.likes = [self.like]
        self.owners = [self.owner]

    @cached_property
    def likelihood(self) -> Likelihood:
        """The likelihood of the targets, scaled as in the final loss."""
        return self.make()

    @property
    def flat(self) -> bool:
        return self.likelihood.flat

    def columns(self, complete: bool) -> Iterator[list[Tensor]]:
        if complete:
            root = self.likelihood.columns
        else:
            root = self.likelihood.fewest_columns
        return ([column] for column in root(self.owner))

    def sample(self, generator: torch.Generator) -> list[Tensor]:
        return [self.likelihood.sample(generator)]

    def multiplication(self) -> Multiplication:
        self.likelihood.checked(self.likelihood.weight)
        return partial(_times, self.likelihood)

    def signed_columns(self) -> Iterator[Signed]:
        columns = self.likelihood.hessian_columns(self.owner)
        return (([column], signs) for column, signs in columns)


def _times(likelihood: Likelihood, vectors: Sequence[Tensor]) -> list[Tensor]:
    """The curvature of a likelihood times the vector at its only output."""
    (vector,) = vectors
    return [likelihood.product(vector)]
