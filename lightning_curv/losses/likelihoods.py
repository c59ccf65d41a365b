r"""Likelihoods: the curvature of a loss at the network's output and a square root of it, exact or sampled.

A loss is the negative logarithm of a likelihood with the network's output ``f`` as parameter. The
curvature used by the GGN is the Fisher information
:math:`H = \mathbb{E}_{y \sim p(y|f)} [\nabla_f \ell\, \nabla_f \ell^\top]` (Kunstner, Balles &
Hennig, *Limitations of the empirical Fisher approximation*, NeurIPS 2019), which needs no
differentiation. Where the output holds natural parameters (logits, log-rates, means) H is the
Hessian :math:`\nabla_f^2 \ell`. Where it holds something else (probabilities, log-probabilities,
rates) H gives the same GGN as the loss of the natural parameters would: sigmoid and
`binary_cross_entropy` are `binary_cross_entropy_with_logits`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_curv.errors import UnsupportedError
from lightning_curv.terms.owners import Owners

SMALLEST = 1e-12  # variance of a bit that is divided by, as in torch


class Likelihood(ABC):
    """The curvature of a loss at its input ``f``, the weight of every entry or row included."""

    flat = False  # whether H is zero whatever the numbers are

    @abstractmethod
    def columns(self, owners: Owners) -> Iterator[Tensor]:
        """Columns S, each of the input's shape, with Σ S[n] S[n]ᵀ = H_n for every sample n.

        Args:
            owners: Which sample owns each row of the input.
        """

    def fewest_columns(self, owners: Owners) -> Iterator[Tensor]:
        """Another square root of H, with no more columns than H has ranks where that is known."""
        yield from self.columns(owners)

    @abstractmethod
    def sample(self, generator: torch.Generator) -> Tensor:
        """The gradient at the input for targets drawn from the model; its expected outer product is H."""

    @abstractmethod
    def product(self, v: Tensor) -> Tensor:
        """H v, for v of the input's shape."""

    @abstractmethod
    def hessian_columns(
        self, owners: Owners, fewest: bool = True
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Columns with signs ``[N]`` (``None``: all positive); their signed squares add up to the loss' own Hessian.

        It differs from H where the input holds no natural parameters: see the head of this module.
        ``fewest``: as few as there are; otherwise those that are made the fastest.
        """


def nonnegative(weight: Tensor) -> Tensor:
    """The weights, which are refused where one is negative."""
    if bool((weight < 0).any()):
        raise UnsupportedError(
            "The GGN needs a loss whose terms have weights ≥ 0, found a negative one; "
            "is the loss subtracted somewhere? Use Hessian quantities instead."
        )
    return weight


def drawable(distribution: Tensor, instead: float) -> Tensor:
    """Random number generators raise, and on a GPU end the process, where a diverging network returns NaN or inf.

    The draw means nothing there, and what is made of it is NaN again.
    """
    return distribution.where(distribution.isfinite(), instead)


def root_of(weight: Tensor) -> Tensor:
    """The square roots of the weights."""
    return nonnegative(weight).sqrt()


def signs_of(weight: Tensor) -> Tensor | None:
    """Signs ``[N]`` of a column's weights; ``None``: all positive."""
    return weight.sign() if bool((weight < 0).any()) else None


@dataclass(frozen=True)
class _Independent(Likelihood):
    """Likelihoods with independent entries: a diagonal H.

    Attributes:
        weight: w, of the input's shape.
    """

    weight: Tensor

    @property
    @abstractmethod
    def diagonal(self) -> Tensor:
        """The diagonal of H, of the input's shape."""

    @property
    def hessian(self) -> Tensor:
        """The diagonal of the loss' own Hessian."""
        return self.diagonal

    def columns(self, owners: Owners) -> Iterator[Tensor]:
        """√H_ee e_e for every output entry e of a sample."""
        for column, _ in _entries(nonnegative(self.diagonal), owners):
            yield column

    def product(self, v: Tensor) -> Tensor:
        """The diagonal times v."""
        return self.diagonal * v

    def hessian_columns(
        self, owners: Owners, fewest: bool = True
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """One column per output entry of a sample, with the sign of the second derivative."""
        yield from _entries(self.hessian, owners)


def _entries(diagonal: Tensor, owners: Owners) -> Iterator[tuple[Tensor, Tensor | None]]:
    """√|h_e| e_e and the sign of h_e for every entry e of a sample; entries without curvature too."""
    values = owners.split(diagonal)
    roots = values.abs().sqrt()
    for e in range(values.shape[1]):
        column = torch.zeros_like(roots)
        column[:, e] = roots[:, e]
        yield owners.join(column, diagonal.shape), signs_of(values[:, e])


@dataclass(frozen=True)
class Gaussian(_Independent):
    """Squared error w (f - y)²: a normal distribution with variance 1/2, H = 2 w.

    It also stands in for losses with second derivative 2 w and no likelihood (Huber): samples need
    no more than H.
    """

    @property
    def diagonal(self) -> Tensor:
        """2 w."""
        return 2 * self.weight

    def sample(self, generator: torch.Generator) -> Tensor:
        """√(2 w) ε with standard normal ε."""
        return root_of(self.diagonal) * torch.empty_like(self.weight).normal_(generator=generator)


class PiecewiseLinear(Gaussian):
    """Absolute errors and their kind: H = 0 almost everywhere."""

    flat = True


class Variance(Gaussian):
    """The variance of a normal distribution: H is its Fisher information. Samples as in `Gaussian`."""

    @property
    def hessian(self) -> Tensor:
        """Refused: the Hessian couples mean and variance."""
        raise UnsupportedError(
            "Hessian quantities need a `gaussian_nll_loss` whose `var` is no output of the network: mean and variance "
            "share a Hessian. Detach it, or return mean and variance in one tensor and pass it as `output=`."
        )


@dataclass(frozen=True)
class Bernoulli(_Independent):
    """Binary cross-entropy: H = w p (1 - p) for logits, w / (p (1 - p)) for probabilities.

    Attributes:
        probabilities: p, of the input's shape.
        target: y, where the input holds probabilities; ``None``: it holds logits.
    """

    probabilities: Tensor
    target: Tensor | None = None

    @property
    def variance(self) -> Tensor:
        """P (1 - p), kept away from 0 where it divides, as `binary_cross_entropy` does."""
        variance = self.probabilities * (1 - self.probabilities)
        return variance if self.target is None else variance.clamp(min=SMALLEST)

    @property
    def diagonal(self) -> Tensor:
        """The Fisher information of the logits or of the probabilities."""
        return self.weight * (self.variance if self.target is None else 1 / self.variance)

    @property
    def hessian(self) -> Tensor:
        """For probabilities w (y / p² + (1 - y) / (1 - p)²)."""
        if self.target is None:
            return self.diagonal
        p, q = (
            part.square().clamp(min=SMALLEST)
            for part in (self.probabilities, 1 - self.probabilities)
        )
        return self.weight * (self.target / p + (1 - self.target) / q)

    def sample(self, generator: torch.Generator) -> Tensor:
        """√w (p - y), divided by p (1 - p) for probabilities, with y drawn from the model."""
        drawn = torch.empty_like(self.probabilities).bernoulli_(
            drawable(self.probabilities, 0.5), generator=generator
        )
        gradient = root_of(self.weight) * (self.probabilities - drawn)
        return gradient if self.target is None else gradient / self.variance


@dataclass(frozen=True)
class Poisson(_Independent):
    """Poisson negative log-likelihood: H = w λ for log-rates, w / λ for rates.

    Attributes:
        rate: λ, of the input's shape.
        target: y, where the input holds rates; ``None``: it holds log-rates.
    """

    rate: Tensor
    target: Tensor | None = None

    @property
    def diagonal(self) -> Tensor:
        """The Fisher information of the log-rates or of the rates."""
        return self.weight * (self.rate if self.target is None else 1 / self.rate)

    @property
    def hessian(self) -> Tensor:
        """For rates w y / λ²."""
        return (
            self.diagonal if self.target is None else self.weight * self.target / self.rate.square()
        )

    def sample(self, generator: torch.Generator) -> Tensor:
        """√w (λ - y), divided by λ for rates, with y drawn from the model."""
        gradient = root_of(self.weight) * (
            self.rate - torch.poisson(drawable(self.rate, 0.0), generator=generator)
        )
        return gradient if self.target is None else gradient / self.rate
