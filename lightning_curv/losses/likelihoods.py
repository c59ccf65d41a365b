r"""Likelihoods: the curvature of a loss at the network's output, and square roots of it.

A loss is the negative logarithm of a likelihood with the network's output `f` as parameter. The
curvature used by the GGN is the Fisher information
$H = \mathbb{E}_{y \sim p(y|f)} [\nabla_f \ell\, \nabla_f \ell^\top]$ (Kunstner, Balles &
Hennig, *Limitations of the empirical Fisher approximation*, NeurIPS 2019), which needs no
differentiation. Where the output holds natural parameters (logits, log-rates, means) H is the
Hessian $\nabla_f^2 \ell$. Where it holds something else (probabilities, log-probabilities,
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
    """The curvature of a loss at its input `f`, the weight of every entry or row included.

    Example:
        >>> likelihood = Gaussian(weight=torch.ones(2, 1))  # of (f - y)² for two samples
        >>> isinstance(likelihood, Likelihood)
        True
        >>> likelihood.product(torch.ones(2, 1))  # H v
        tensor([[2.],
                [2.]])
    """

    flat = False  # whether H is zero whatever the numbers are
    unsigned = False  # whether no weight is negative whatever the numbers are
    reach = 1.0  # nats per sample within which the curvature of a loss without a bound may be used
    weight: Tensor  # of every entry or row

    @property
    def nats(self) -> Tensor:
        """The change of the loss if the likelihood of every sample changes by one nat, ``[]``."""
        return self.weight.sum()

    def checked(self, weight: Tensor) -> Tensor:
        """Refuse negative weights, unless it is known that there are none.

        Args:
            weight: Weights, or numbers that are negative where these are.

        Returns:
            The same numbers.

        Raises:
            UnsupportedError: One of them is negative.
        """
        return weight if self.unsigned else nonnegative(weight)

    @abstractmethod
    def columns(self, owners: Owners) -> Iterator[Tensor]:
        """Factor H: yield columns S with Σ S[n] S[n]ᵀ = H_n for every sample n.

        Args:
            owners: Which sample owns each row of the input.

        Returns:
            The columns, each of the input's shape.
        """

    def fewest_columns(self, owners: Owners) -> Iterator[Tensor]:
        """Factor H with no more columns than its rank, where that is known.

        Args:
            owners: Which sample owns each row of the input.

        Returns:
            The columns of another square root, each of the input's shape.
        """
        yield from self.columns(owners)

    @abstractmethod
    def sample(self, generator: torch.Generator) -> Tensor:
        """Draw targets from the model and take the gradient of the loss at the input.

        Args:
            generator: The source of random numbers, on the device of the input.

        Returns:
            The gradient, of the input's shape; its expected outer product is H.
        """

    @abstractmethod
    def product(self, v: Tensor) -> Tensor:
        """Multiply H by a vector.

        Args:
            v: A tensor of the input's shape.

        Returns:
            H v, of the same shape.
        """

    @abstractmethod
    def hessian_columns(self, owners: Owners) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Factor the loss' own Hessian: yield columns whose signed squares add up to it.

        It differs from H where the input holds no natural parameters: see the head of this module.

        Args:
            owners: Which sample owns each row of the input.

        Returns:
            The columns, each of the input's shape, and their signs, `[N]`; `None`: all
            positive.
        """


def nonnegative(weight: Tensor) -> Tensor:
    """The weights, which are refused where one is negative."""
    if bool((weight < 0).any()):
        raise UnsupportedError(
            "The GGN needs a loss whose terms have weights ≥ 0, found a negative one; "
            "is the loss subtracted somewhere? Use Hessian quantities instead (`HMP`, "
            '`DiagHessian`), the gradients alone (`KFACOptimizer(curvature="empirical")`), or '
            "pass the outputs of the network as `output=`: terms of negative weight then have no "
            "curvature, the closest one that is not negative."
        )
    return weight


def drawable(distribution: Tensor, instead: float) -> Tensor:
    """A distribution that can be drawn from where a diverging network returns NaN or inf.

    There random number generators raise, and on a GPU end the process. The draw means nothing, and
    what is made of it is NaN again.

    Args:
        distribution: The parameters of the distribution.
        instead: A parameter to use where they are not finite.
    """
    return distribution.where(distribution.isfinite(), instead)


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Independent random signs of a tensor's shape."""
    bits = torch.empty_like(like).bernoulli_(0.5, generator=generator)
    return 2 * bits - 1


def signs_of(weight: Tensor) -> Tensor | None:
    """Signs `[N]` of a column's weights; `None`: all positive."""
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
    def _positive_diagonal(self) -> Tensor:
        """The diagonal, which is refused where it is negative."""
        return self.checked(self.diagonal)

    @property
    def hessian(self) -> Tensor:
        """The diagonal of the loss' own Hessian."""
        return self.diagonal

    def columns(self, owners: Owners) -> Iterator[Tensor]:
        """The columns √H_ee e_e for every output entry e of a sample."""
        for column, _ in _entries(self._positive_diagonal, owners):
            yield column

    def product(self, v: Tensor) -> Tensor:
        """The diagonal times v."""
        return self.diagonal * v

    def hessian_columns(
        self,
        owners: Owners,
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """One column per output entry of a sample, with the sign of the second derivative."""
        yield from _entries(self.hessian, owners)


def _entries(diagonal: Tensor, owners: Owners) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The columns √|h_e| e_e and the signs of h_e for every entry e of a sample.

    Entries without curvature have a column of zeros.
    """
    values = owners.split(diagonal)
    roots = values.abs().sqrt()
    for entry in range(values.shape[1]):
        column = torch.zeros_like(roots)
        column[:, entry] = roots[:, entry]
        yield owners.join(column, diagonal.shape), signs_of(values[:, entry])


@dataclass(frozen=True)
class Gaussian(_Independent):
    """Squared error w (f - y)²: a normal distribution with variance 1/2, H = 2 w.

    It also stands in for losses with second derivative 2 w and no likelihood (Huber): samples need
    no more than H.

    Args:
        weight: w, of the input's shape.
        terms: Weights of the terms of the loss, where w holds a variance beside them.

    Example:
        >>> likelihood = Gaussian(weight=torch.tensor([[0.5], [1.5]]))
        >>> likelihood.diagonal
        tensor([[1.],
                [3.]])
    """

    terms: Tensor | None = None

    @property
    def nats(self) -> Tensor:
        """The sum of the weights of the terms."""
        return (self.weight if self.terms is None else self.terms).sum()

    @property
    def diagonal(self) -> Tensor:
        """The second derivatives 2 w."""
        return 2 * self.weight

    def sample(self, generator: torch.Generator) -> Tensor:
        """The product √(2 w) ε with random signs ε.

        Targets at ± one deviation from the mean have the normal distribution's first three moments.
        Their squared gradient is the curvature itself, not only its expectation: normal targets
        that happen to lie near the mean would hide the curvature of a sample.
        """
        return self._positive_diagonal.sqrt() * _signs(self.weight, generator)


class PiecewiseLinear(Gaussian):
    """Absolute errors and their kind: H = 0 almost everywhere."""

    flat = True


class GaussianVariance(Gaussian):
    """The variance of a normal distribution: H is its Fisher information.

    A nat is a deviation e times as large, or a mean √2 deviations away: too far for the curvature
    where they start. Within 1/32 nat deviations change by a factor of 1.2, means by a quarter of
    a deviation.
    """

    reach = 1 / 32

    @property
    def hessian(self) -> Tensor:
        """Refused: the Hessian couples mean and variance."""
        raise UnsupportedError(
            "Hessian quantities need a `gaussian_nll_loss` whose `var` is no output of the "
            "network: mean and variance share a Hessian. Detach it, or return mean and variance in "
            "one tensor and pass it as `output=`."
        )


@dataclass(frozen=True)
class Bernoulli(_Independent):
    """Binary cross-entropy: H = w p (1 - p) for logits, w / (p (1 - p)) for probabilities.

    Example:
        >>> p = torch.tensor([[0.5, 0.2]])
        >>> Bernoulli(weight=torch.ones(1, 2), probabilities=p).diagonal  # of logits
        tensor([[0.2500, 0.1600]])

    Attributes:
        weight: w, of the input's shape.
        probabilities: p, of the input's shape.
        target: y, where the input holds probabilities; `None`: it holds logits.
    """

    probabilities: Tensor
    target: Tensor | None = None

    @property
    def variance(self) -> Tensor:
        """The variance p (1 - p), kept away from 0 where it divides, as torch's loss does."""
        variance = self.probabilities * (1 - self.probabilities)
        if self.target is None:
            return variance
        return variance.clamp(min=SMALLEST)

    @property
    def diagonal(self) -> Tensor:
        """The Fisher information of the logits or of the probabilities."""
        return self.weight * (self.variance if self.target is None else 1 / self.variance)

    @property
    def hessian(self) -> Tensor:
        """The loss' own second derivatives; of probabilities w (y / p² + (1 - y) / (1 - p)²)."""
        if self.target is None:
            return self.diagonal
        p_squared = self.probabilities.square().clamp(min=SMALLEST)
        q_squared = (1 - self.probabilities).square().clamp(min=SMALLEST)
        return self.weight * (self.target / p_squared + (1 - self.target) / q_squared)

    def sample(self, generator: torch.Generator) -> Tensor:
        """The gradient √w (p - y), over p (1 - p) for probabilities, with y from the model."""
        p = drawable(self.probabilities, 0.5)
        drawn = torch.empty_like(self.probabilities).bernoulli_(p, generator=generator)
        gradient = self.checked(self.weight).sqrt() * (self.probabilities - drawn)
        if self.target is None:
            return gradient
        return gradient / self.variance


@dataclass(frozen=True)
class Poisson(_Independent):
    """Poisson negative log-likelihood: H = w λ for log-rates, w / λ for rates.

    Example:
        >>> Poisson(weight=torch.ones(1, 2), rate=torch.tensor([[3.0, 4.0]])).diagonal
        tensor([[3., 4.]])

    Attributes:
        weight: w, of the input's shape.
        rate: λ, of the input's shape.
        target: y, where the input holds rates; `None`: it holds log-rates.
    """

    rate: Tensor
    target: Tensor | None = None

    @property
    def diagonal(self) -> Tensor:
        """The Fisher information of the log-rates or of the rates."""
        return self.weight * (self.rate if self.target is None else 1 / self.rate)

    @property
    def hessian(self) -> Tensor:
        """The loss' own second derivatives; of rates w y / λ²."""
        if self.target is None:
            return self.diagonal
        return self.weight * self.target / self.rate.square()

    def sample(self, generator: torch.Generator) -> Tensor:
        """The product √H ε with random signs ε: targets at ± one deviation from the rate.

        Drawn counts of small rates are mostly zero, and hide the curvature of rare ones.
        """
        return self._positive_diagonal.sqrt() * _signs(self.weight, generator)
