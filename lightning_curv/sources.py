"""Sources: which columns are backpropagated to make a parameter's Jacobian."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from lightning_curv.jacobian import Jacobian
from lightning_curv.passes import Column, Passes


@dataclass(frozen=True)
class Gradient:
    """The gradient itself, taken from the user's backward pass where it reaches the parameters' ops."""

    def jacobians(self, passes: Passes) -> Iterator[dict[Tensor, Jacobian]]:
        """Nothing: the engine listens to the user's pass instead of making one."""
        yield from ()


@dataclass(frozen=True)
class Exact:
    """A square root of the loss Hessian, one column per output entry of a sample."""

    def jacobians(self, passes: Passes) -> Iterator[dict[Tensor, Jacobian]]:
        """One pass per column."""
        for node, call in passes.tape.losses.items():
            columns = passes.likelihood(node).columns(passes.samples.count)
            yield from passes.jacobians(Column([call.input], [column]) for column in columns)


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
        for node, call in passes.tape.losses.items():
            likelihood, root = passes.likelihood(node), self.samples**-0.5
            draws = (root * likelihood.sample(passes.generator) for _ in range(self.samples))
            yield from passes.jacobians(Column([call.input], [draw]) for draw in draws)


Source = Gradient | Exact | Sampled
