"""Sources: which columns are backpropagated to make a parameter's Jacobian."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from lightning_curv.passes.passes import Column, Passes
from lightning_curv.second_derivatives import merged_columns
from lightning_curv.second_derivatives.parameter_curvature import (
    curved_parameters,
    differentiated_diagonals,
    own_curvature,
)
from lightning_curv.second_derivatives.residuals import residuals
from lightning_curv.terms.jacobian import Jacobian


@dataclass(frozen=True)
class LossGradient:
    """The gradient itself, taken from the user's backward pass where it reaches the ops.

    The single column of a parameter's Jacobian is the gradient of every sample, `[1, N, *p]`.

    Example:
        >>> from lightning_curv import BatchGrad
        >>> BatchGrad().source
        LossGradient()
    """

    def jacobians(self, passes: Passes) -> Iterator[dict[Tensor, Jacobian]]:
        """Yield nothing: the engine listens to the user's pass instead of making one.

        Args:
            passes: The graph of the loss.

        Yields:
            No Jacobian.
        """
        yield from ()


@dataclass(frozen=True)
class ExactGGN:
    r"""Columns whose outer products add up to the exact GGN: a square root of the loss Hessian.

    They are $J_n^\top \sqrt{s H_n}$, with the network's Jacobian $J_n$, the loss
    Hessian $H_n$ and the scale s of the loss.

    Attributes:
        complete: Whether to make one column per output entry of a sample, where fewer would do (for
            classes, one less).

    Example:
        >>> from lightning_curv import DiagGGNExact
        >>> DiagGGNExact().source
        ExactGGN(complete=False)
    """

    complete: bool = False

    def jacobians(self, passes: Passes) -> Iterator[dict[Tensor, Jacobian]]:
        """Yield the Jacobians of the columns; each column costs one backward pass.

        Args:
            passes: The graph of the loss.

        Yields:
            The Jacobians of one parameter or more, for as many columns as are held at once.
        """
        for part in passes.parts:
            every = self.complete or passes.ends_at(part.edges)  # where a column costs no pass
            yield from passes.jacobians(
                Column(part.edges, column) for column in part.columns(every)
            )


@dataclass(frozen=True)
class MonteCarloGGN:
    """Gradients for targets drawn from the model, divided by √M.

    Their outer products estimate the GGN: their expectation is G.

    Attributes:
        samples: M, the number of draws.

    Raises:
        ValueError: M is not positive.

    Example:
        >>> from lightning_curv import DiagGGNMC
        >>> DiagGGNMC(mc_samples=3).source
        MonteCarloGGN(samples=3)
    """

    samples: int = 1

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"`mc_samples` must be at least 1, found {self.samples}.")

    def jacobians(self, passes: Passes) -> Iterator[dict[Tensor, Jacobian]]:
        """Yield the Jacobians of the draws; each draw costs one backward pass.

        Args:
            passes: The graph of the loss, whose `Passes.generator` draws the targets.

        Yields:
            The Jacobians of one parameter or more, for as many draws as are held at once.
        """
        root = self.samples**-0.5
        for part in passes.parts:
            draws = (part.sample(passes.generator) for _ in range(self.samples))
            yield from passes.jacobians(
                Column(part.edges, [root * seed for seed in draw]) for draw in draws
            )


@dataclass(frozen=True)
class ExactHessian:
    """Columns with signs whose squares add up to the Hessian.

    They are those of the loss Hessian, of the second derivatives of the network (its residuals) and
    of the parameters' own ops.
    """

    def jacobians(self, passes: Passes) -> Iterator[dict[Tensor, Jacobian]]:
        """Yield the Jacobians; each column costs one backward pass.

        Piecewise linear networks have no residuals.
        """
        if any(call.beside for call in passes.tape.losses.values()):
            # The second derivatives between mean and variance are in no likelihood.
            passes = replace(passes, joint=True)
        curved = curved_parameters(passes)
        if any(parameter not in curved for parameter in passes.tape.all_parameters):
            for jacobians in self._by_columns(passes):
                yield {p: jacobian for p, jacobian in jacobians.items() if p not in curved}
        yield from differentiated_diagonals(passes, curved)

    def _by_columns(self, passes: Passes) -> Iterator[dict[Tensor, Jacobian]]:
        for part in passes.parts:
            yield from passes.jacobians(
                Column(part.edges, column, signs) for column, signs in part.signed_columns()
            )
        for residual in residuals(passes):
            yield from merged_columns.jacobians_of(passes, residual)
        yield from own_curvature(passes)


@dataclass(frozen=True)
class EmpiricalFisher:
    r"""The gradient for the labels of the data, as one column that takes a pass of its own.

    For a loss that is a mean over N samples, the outer products of the samples' gradients
    $g_n$ have the mean $\tfrac1N \sum_n g_n g_n^\top$: the empirical Fisher matrix.

    Attributes:
        fitted: Whether to divide the Fisher matrix by the loss $b$, if that is positive. The
            loss is then taken for a negative log-likelihood $\ell / b$ up to a scale
            $b$, whose best value is the mean of $\ell$ (of absolute errors: the
            Laplace distribution), and $b$ times the Fisher matrix of $\ell / b$ has
            the unit of a curvature.
    """

    fitted: bool = False

    def jacobians(self, passes: Passes) -> Iterator[dict[Tensor, Jacobian]]:
        """Yield the Jacobians of the one column.

        Args:
            passes: The graph of the loss.

        Yields:
            The Jacobian of every parameter.
        """
        # A loss that is a mean over N samples has per-sample gradients g / N, its Fisher matrix
        # columns g / √N.
        seed = passes.seed * math.sqrt(passes.samples.count)
        if self.fitted:
            loss = (passes.loss.detach() * passes.seed).sum()
            seed = seed / loss.where(loss > 0, 1.0).sqrt()
        yield from passes.jacobians([Column([get_gradient_edge(passes.loss)], [seed])])


class Chosen(ABC):
    """A source that is chosen when the loss is known."""

    @abstractmethod
    def on(self, passes: Passes) -> Source:
        """Choose the source for the graph of a loss."""


Source = LossGradient | ExactGGN | MonteCarloGGN | ExactHessian | EmpiricalFisher
