"""Sources: which columns are backpropagated to make a parameter's Jacobian."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lightning_curv.passes.passes import Column, Passes
from lightning_curv.second_derivatives.parameter_curvature import own_curvature
from lightning_curv.second_derivatives.residuals import residuals
from lightning_curv.terms.jacobian import Jacobian


@dataclass(frozen=True)
class Gradient:
    """The gradient itself, taken from the user's backward pass where it reaches the parameters' ops."""

    def jacobians(self, passes: Passes) -> Iterator[dict[Tensor, Jacobian]]:
        """Nothing: the engine listens to the user's pass instead of making one."""
        yield from ()


@dataclass(frozen=True)
class Exact:
    """A square root of the loss Hessian.

    Attributes:
        complete: One column per output entry of a sample, where fewer would do (for classes, one
            less).
    """

    complete: bool = False

    def jacobians(self, passes: Passes) -> Iterator[dict[Tensor, Jacobian]]:
        """One pass per column."""
        for part in passes.parts:
            every = self.complete or passes.ends_at(part.edges)  # where a column costs no pass
            yield from passes.jacobians(
                Column(part.edges, column) for column in part.columns(every)
            )


@dataclass(frozen=True)
class Sampled:
    """Gradients for targets drawn from the model, divided by √M.

    Attributes:
        samples: M, the number of draws.
    """

    samples: int = 1

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"`mc_samples` must be at least 1, found {self.samples}.")

    def jacobians(self, passes: Passes) -> Iterator[dict[Tensor, Jacobian]]:
        """One pass per draw."""
        root = self.samples**-0.5
        for part in passes.parts:
            draws = (part.sample(passes.generator) for _ in range(self.samples))
            yield from passes.jacobians(
                Column(part.edges, [root * seed for seed in draw]) for draw in draws
            )


@dataclass(frozen=True)
class Signed:
    """Columns with signs whose squares add up to the Hessian: the loss Hessian's and the network's residuals."""

    def jacobians(self, passes: Passes) -> Iterator[dict[Tensor, Jacobian]]:
        """One pass per column; none for the residuals of piecewise linear networks."""
        for part in passes.parts:
            columns = part.signed_columns(fewest=not passes.ends_at(part.edges))
            yield from passes.jacobians(
                Column(part.edges, column, signs) for column, signs in columns
            )
        yield from passes.jacobians(
            column for residual in residuals(passes) for column in residual.columns()
        )
        yield from own_curvature(passes)


class Chosen(Protocol):
    """A source that is chosen when the loss is known."""

    def on(self, passes: Passes) -> Source:
        """The source for some passes."""
        ...


Source = Gradient | Exact | Sampled | Signed
