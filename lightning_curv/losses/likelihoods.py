r"""Likelihoods: the curvature of a loss at the network's output and a square root of it, exact or sampled.

A loss is the negative logarithm of a likelihood with the network's output ``f`` as parameter. The curvature used by the
GGN is the Fisher information :math:`H = \mathbb{E}_{y \sim p(y|f)} [\nabla_f \ell\, \nabla_f \ell^\top]` (Kunstner,
Balles & Hennig, *Limitations of the empirical Fisher approximation*, NeurIPS 2019), which needs no differentiation.
Where the output holds natural parameters (logits, log-rates, means) H is the Hessian :math:`\nabla_f^2 \ell`. Where it
holds something else (probabilities, log-probabilities, rates) H gives the same GGN as the loss of the natural
parameters would: sigmoid and `binary_cross_entropy` are `binary_cross_entropy_with_logits`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_curv.errors import UnsupportedError

BLOCK_BYTES = 2**22  # of columns that are made at once
SMALLEST = 1e-12  # variance of a bit that is divided by, as in torch


class Likelihood(ABC):
    """The curvature of a loss at its input ``f``, the weight of every entry or row included."""

    @abstractmethod
    def columns(self, samples: int, minor: bool = False) -> Iterator[Tensor]:
        """Columns S, each of the input's shape, with Σ S[n] S[n]ᵀ = H_n for every sample n.

        Args:
            samples: Number of samples N; the input's leading axis holds ``N·r`` rows.
            minor: Whether the sample is the inner index of the rows (``[T·N, ...]`` of sequence-first networks).
        """

    def fewest_columns(self, samples: int, minor: bool = False) -> Iterator[Tensor]:
        """Another square root of H, with no more columns than H has ranks where that is known."""
        yield from self.columns(samples, minor)

    @abstractmethod
    def sample(self, generator: torch.Generator) -> Tensor:
        """The gradient at the input for targets drawn from the model; its expected outer product is H."""

    @abstractmethod
    def product(self, v: Tensor) -> Tensor:
        """H v, for v of the input's shape."""

    @abstractmethod
    def hessian_columns(self, samples: int, minor: bool = False) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Columns with signs ``[N]`` (``None``: all positive); their signed squares add up to the loss' own Hessian.

        It differs from H where the input holds no natural parameters: see the head of this module.
        """


def _nonnegative(weight: Tensor) -> Tensor:
    if bool((weight < 0).any()):
        raise UnsupportedError(
            "The GGN needs a loss whose terms have weights ≥ 0, found a negative one; "
            "is the loss subtracted somewhere? Use Hessian quantities instead."
        )
    return weight


def _drawable(distribution: Tensor, instead: float) -> Tensor:
    """Random number generators raise, and on a GPU end the process, where a diverging network returns NaN or inf.

    The draw means nothing there, and what is made of it is NaN again.
    """
    return distribution.where(distribution.isfinite(), instead)


def _root(weight: Tensor) -> Tensor:
    return _nonnegative(weight).sqrt()


def per_sample(tensor: Tensor, samples: int, minor: bool, trailing: int = 0) -> Tensor:
    """``[N·r, *, *trailing]`` as ``[N, E, *trailing]``; ``minor``: from ``[r·N, *, *trailing]``."""
    if minor:
        tensor = tensor.unflatten(0, (-1, samples)).transpose(0, 1).flatten(0, 1)
    kept = tensor.shape[tensor.ndim - trailing :]
    entries = math.prod(tensor.shape[1 : tensor.ndim - trailing]) * (len(tensor) // samples if samples else 1)
    return tensor.reshape(samples, entries, *kept)


def joined(entries: Tensor, shape: torch.Size, samples: int, minor: bool) -> Tensor:
    """The inverse of `per_sample`."""
    if not minor:
        return entries.reshape(shape)
    rows = entries.reshape(samples, shape[0] // samples, *shape[1:])
    return rows.transpose(0, 1).reshape(shape)


def signs_of(weight: Tensor) -> Tensor | None:
    """Signs ``[N]`` of a column's weights; ``None``: all positive."""
    return weight.sign() if bool((weight < 0).any()) else None


@dataclass(frozen=True)
class Categorical(Likelihood):
    r"""Softmax cross-entropy: H = w (diag(p) - p pᵀ) per row.

    Attributes:
        probabilities: p, with classes on axis ``axis``.
        weight: w, of p's shape with one entry on the axis of the classes.
        axis: The axis of the classes.
        normalized: Whether the input holds log-probabilities instead of logits: H is then w diag(p), the log-softmax
            below turns it into w (diag(p) - p pᵀ), and the loss, linear in its input, has no Hessian of its own.
    """

    probabilities: Tensor
    weight: Tensor
    axis: int
    normalized: bool = False

    def columns(self, samples: int, minor: bool = False) -> Iterator[Tensor]:
        """√(w p_c) (e_c - p) for every class c and every row of a sample."""
        p = self.probabilities.movedim(self.axis, -1)
        roots = per_sample((_nonnegative(self.weight).movedim(self.axis, -1) * p).sqrt(), samples, minor, trailing=1)
        for row in range(roots.shape[1]):
            for block in _one_class_each(roots, row):
                entries = torch.stack([joined(column, p.shape, samples, minor) for column in block]) if minor else block
                yield from self._centred(entries.reshape(len(block), *p.shape).movedim(-1, self.axis + 1))

    def fewest_columns(self, samples: int, minor: bool = False) -> Iterator[Tensor]:
        r"""The Cholesky factor of H, one column less than classes.

        Column c is :math:`\sqrt{w\, p_c\, q_c / (p_c + q_c)}\, (e_c - \sum_{i>c} (p_i / q_c)\, e_i)` with the tail
        :math:`q_c = \sum_{i>c} p_i`: nothing cancels. Tanabe & Sagae, *An exact Cholesky decomposition and the
        generalized inverse of the variance-covariance matrix of the multinomial distribution, with applications*,
        J. R. Stat. Soc. B, 1992.
        """
        if self.normalized or self.probabilities.shape[self.axis] == 1:
            yield from self.columns(samples, minor)
            return
        for column, signs in self._cholesky(samples, minor):
            if signs is not None:
                _nonnegative(self.weight)
            yield column

    def sample(self, generator: torch.Generator) -> Tensor:
        """√w (e_y - p) with y drawn from p."""
        root, p = _root(self.weight), self.probabilities
        drawn = _classes(_drawable(p.movedim(self.axis, -1), 1.0), generator).movedim(-1, self.axis)
        result = torch.zeros_like(p) if self.normalized else -root * p
        return result.scatter_add_(self.axis, drawn, root.to(p.dtype))

    def product(self, v: Tensor) -> Tensor:
        """W (p ⊙ v - p pᵀv)."""
        return self.weight * self._centred(self.probabilities * v)

    def hessian_columns(self, samples: int, minor: bool = False) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The Cholesky factor with the signs of the weights; none for log-probabilities."""
        if not self.normalized:
            yield from self._cholesky(samples, minor)

    def _cholesky(self, samples: int, minor: bool) -> Iterator[tuple[Tensor, Tensor | None]]:
        p, w = self.probabilities.movedim(self.axis, -1), self.weight.movedim(self.axis, -1)
        weights, entries = per_sample(w, samples, minor), per_sample(p, samples, minor, trailing=1)
        for row in range(entries.shape[1]):
            signs, scale = signs_of(weights[:, row]), weights[:, row, None].abs().sqrt()
            for block in _multinomial_roots(entries[:, row], scale, entries.shape[1]):
                columns = block.unsqueeze(2)
                if entries.shape[1] > 1:
                    columns = block.new_zeros(len(block), *entries.shape)
                    columns[:, :, row] = block
                if minor:
                    columns = torch.stack([joined(column, p.shape, samples, minor) for column in columns])
                for column in columns.reshape(len(block), *p.shape).movedim(-1, self.axis + 1).unbind():
                    yield column, signs

    def _centred(self, columns: Tensor) -> Tensor:
        """``columns - p Σ columns`` over the classes, for any number of leading axes."""
        axis = self.axis - self.probabilities.ndim
        return columns if self.normalized else columns - self.probabilities * columns.sum(axis, keepdim=True)


def _classes(p: Tensor, generator: torch.Generator) -> Tensor:
    """One class drawn from every row of ``p [*, C]``, ``[*, 1]``."""
    if p.device.type != "cpu":
        return torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=generator).reshape(*p.shape[:-1], 1)
    # a tenth of the time of `multinomial`, which draws a number for every class
    below = p.cumsum(-1, dtype=torch.promote_types(p.dtype, torch.float32))
    level = torch.rand(*p.shape[:-1], 1, generator=generator, dtype=below.dtype) * below[..., -1:]
    return torch.searchsorted(below, level, right=True).clamp_(max=p.shape[-1] - 1)


def _multinomial_roots(p: Tensor, scale: Tensor, rows: int) -> Iterator[Tensor]:
    """Columns c < C - 1 of the Cholesky factors of diag(p) - p pᵀ for ``p [N, C]``: ``[c, N, C]``, in pieces.

    They are multiplied by ``scale [N, 1]``.
    """
    smallest = torch.finfo(p.dtype).tiny
    tails = p.flip(1).cumsum(1).flip(1)  # Σ_{i>=c} p_i
    rest = tails[:, 1:].clamp(min=smallest)
    roots = scale * (p[:, :-1] * (tails[:, 1:] / tails[:, :-1].clamp(min=smallest))).sqrt()
    size = max(1, BLOCK_BYTES // max(1, p.numel() * rows * p.element_size()))
    for start in range(0, p.shape[1] - 1, size):
        ratios = -(roots[:, start : start + size] / rest[:, start : start + size]).mT
        above = torch.ones(len(ratios), p.shape[1], dtype=p.dtype, device=p.device).triu_(start + 1)
        block = (above.unsqueeze(1) * p).mul_(ratios.unsqueeze(-1))
        block.diagonal(start, 0, 2).copy_(roots[:, start : start + size])
        yield block


def _one_class_each(roots: Tensor, row: int) -> Iterator[Tensor]:
    """The entries of one row of ``[N, r, C]``, each class in a column of its own: ``[c, N, r, C]``, in pieces."""
    size = max(1, BLOCK_BYTES // max(1, roots.numel() * roots.element_size()))
    for start in range(0, roots.shape[2], size):
        own = roots[:, row, start : start + size]
        block = roots.new_zeros(own.shape[1], *roots.shape)
        block[:, :, row, start : start + size].diagonal(dim1=0, dim2=2).copy_(own)
        yield block


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

    def columns(self, samples: int, minor: bool = False) -> Iterator[Tensor]:
        """√H_ee e_e for every output entry e of a sample."""
        for column, _ in _entries(_nonnegative(self.diagonal), samples, minor):
            yield column

    def product(self, v: Tensor) -> Tensor:
        """The diagonal times v."""
        return self.diagonal * v

    def hessian_columns(self, samples: int, minor: bool = False) -> Iterator[tuple[Tensor, Tensor | None]]:
        """One column per output entry of a sample, with the sign of the second derivative."""
        yield from _entries(self.hessian, samples, minor)


def _entries(diagonal: Tensor, samples: int, minor: bool) -> Iterator[tuple[Tensor, Tensor | None]]:
    """√|h_e| e_e and the sign of h_e for every entry e of a sample; entries without curvature too."""
    values = per_sample(diagonal if diagonal.ndim else diagonal[None], samples, minor)
    roots = values.abs().sqrt()
    for e in range(values.shape[1]):
        column = torch.zeros_like(roots)
        column[:, e] = roots[:, e]
        yield joined(column, diagonal.shape, samples, minor), signs_of(values[:, e])


@dataclass(frozen=True)
class Gaussian(_Independent):
    """Squared error w (f - y)²: a normal distribution with variance 1/2, H = 2 w.

    It also stands in for losses with second derivative 2 w and no likelihood (Huber): samples need no more than H.
    """

    @property
    def diagonal(self) -> Tensor:
        """2 w."""
        return 2 * self.weight

    def sample(self, generator: torch.Generator) -> Tensor:
        """√(2 w) ε with standard normal ε."""
        return _root(self.diagonal) * torch.empty_like(self.weight).normal_(generator=generator)


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
        p, q = (part.square().clamp(min=SMALLEST) for part in (self.probabilities, 1 - self.probabilities))
        return self.weight * (self.target / p + (1 - self.target) / q)

    def sample(self, generator: torch.Generator) -> Tensor:
        """√w (p - y), divided by p (1 - p) for probabilities, with y drawn from the model."""
        drawn = torch.empty_like(self.probabilities).bernoulli_(_drawable(self.probabilities, 0.5), generator=generator)
        gradient = _root(self.weight) * (self.probabilities - drawn)
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
        return self.diagonal if self.target is None else self.weight * self.target / self.rate.square()

    def sample(self, generator: torch.Generator) -> Tensor:
        """√w (λ - y), divided by λ for rates, with y drawn from the model."""
        gradient = _root(self.weight) * (self.rate - torch.poisson(_drawable(self.rate, 0.0), generator=generator))
        return gradient if self.target is None else gradient / self.rate
