r"""Likelihoods: the Hessian of a loss at the network's output and a square root of it, exact or sampled.

A loss is the negative logarithm of a likelihood whose natural parameters are the network's output ``f``. Its Hessian
:math:`H = \nabla_f^2 \ell` then equals the covariance of the sampled gradients (Kunstner, Balles & Hennig,
*Limitations of the empirical Fisher approximation*, NeurIPS 2019), and the square root and the samples below need no
differentiation.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_curv.errors import UnsupportedError


class Likelihood(ABC):
    """The curvature of a loss at its input ``f``, the weight of every entry or row included."""

    @abstractmethod
    def columns(self, samples: int) -> Iterator[Tensor]:
        """Columns S, each of the input's shape, with Σ S[n] S[n]ᵀ = H_n for every sample n.

        Args:
            samples: Number of samples N; the input's leading axis holds ``N·r`` rows.
        """

    @abstractmethod
    def sample(self, generator: torch.Generator) -> Tensor:
        """The gradient at the input for targets drawn from the model; its expected outer product is H."""


def _root(weight: Tensor) -> Tensor:
    if bool((weight < 0).any()):
        raise UnsupportedError(
            "The GGN needs a loss whose terms have weights ≥ 0, found a negative one; "
            "is the loss subtracted somewhere? Use Hessian quantities instead."
        )
    return weight.sqrt()


def _per_sample(tensor: Tensor, samples: int, trailing: int = 0) -> Tensor:
    """``[N·r, *, *trailing]`` as ``[N, E, *trailing]``."""
    kept = tensor.shape[tensor.ndim - trailing :]
    entries = math.prod(tensor.shape[1 : tensor.ndim - trailing]) * (len(tensor) // samples if samples else 1)
    return tensor.reshape(samples, entries, *kept)


@dataclass(frozen=True)
class Categorical(Likelihood):
    r"""Softmax cross-entropy: H = w (diag(p) - p pᵀ) per row.

    Attributes:
        probabilities: p, with classes on axis ``axis``.
        weight: w, of p's shape with one entry on the axis of the classes.
        axis: The axis of the classes.
        normalized: Whether the input holds log-probabilities instead of logits; centring is then the log-softmax's
        part.
    """

    probabilities: Tensor
    weight: Tensor
    axis: int
    normalized: bool = False

    def columns(self, samples: int) -> Iterator[Tensor]:
        """√(w p_c) (e_c - p) for every class c and every row of a sample."""
        p = self.probabilities
        root = (_root(self.weight) * p.sqrt()).movedim(self.axis, -1)
        classes = root.shape[-1]
        rows = _per_sample(root, samples, trailing=1)
        for row in range(rows.shape[1]):
            for c in range(classes):
                column = torch.zeros_like(rows)
                column[:, row, c] = rows[:, row, c]
                column = column.reshape(root.shape).movedim(-1, self.axis)
                yield self._centred(column)

    def sample(self, generator: torch.Generator) -> Tensor:
        """√w (e_y - p) with y drawn from p."""
        p = self.probabilities.movedim(self.axis, -1)
        drawn = torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=generator).reshape(p.shape[:-1])
        onehot = torch.nn.functional.one_hot(drawn, p.shape[-1]).to(p.dtype).movedim(-1, self.axis)
        return self._centred(_root(self.weight) * onehot)

    def _centred(self, column: Tensor) -> Tensor:
        return column if self.normalized else column - self.probabilities * column.sum(self.axis, keepdim=True)


class _Independent(Likelihood):
    """Likelihoods with independent entries: a diagonal H."""

    @property
    @abstractmethod
    def diagonal(self) -> Tensor:
        """The diagonal of H, of the input's shape."""

    def columns(self, samples: int) -> Iterator[Tensor]:
        """√H_ee e_e for every output entry e of a sample."""
        root = _root(self.diagonal)
        entries = _per_sample(root, samples)
        for e in range(entries.shape[1]):
            column = torch.zeros_like(entries)
            column[:, e] = entries[:, e]
            yield column.reshape(root.shape)


@dataclass(frozen=True)
class Gaussian(_Independent):
    """Squared error w (f - y)²: a normal distribution with variance 1/2, H = 2 w."""

    weight: Tensor  # of the input's shape

    @property
    def diagonal(self) -> Tensor:
        """2 w."""
        return 2 * self.weight

    def sample(self, generator: torch.Generator) -> Tensor:
        """√(2 w) ε with standard normal ε."""
        noise = torch.empty_like(self.weight).normal_(generator=generator)
        return _root(self.diagonal) * noise


@dataclass(frozen=True)
class Bernoulli(_Independent):
    """Binary cross-entropy with logits: H = w p (1 - p)."""

    probabilities: Tensor  # p, of the input's shape
    weight: Tensor  # w, of the input's shape

    @property
    def diagonal(self) -> Tensor:
        """W p (1 - p)."""
        return self.weight * self.probabilities * (1 - self.probabilities)

    def sample(self, generator: torch.Generator) -> Tensor:
        """√w (p - y) with y drawn from the model."""
        drawn = torch.empty_like(self.probabilities).bernoulli_(self.probabilities, generator=generator)
        return _root(self.weight) * (self.probabilities - drawn)
