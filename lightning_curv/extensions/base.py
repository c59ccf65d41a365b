"""What an extension is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from lightning_curv.jacobian import Jacobian


@dataclass(frozen=True)
class Gradient:
    """Columns of the Jacobian: the gradient itself, taken from the user's backward pass."""


@dataclass(frozen=True)
class Exact:
    """Columns of the Jacobian: a square root of the loss Hessian, one column per output entry of a sample."""


@dataclass(frozen=True)
class Sampled:
    """Columns of the Jacobian: gradients for targets drawn from the model, divided by √M.

    Attributes:
        samples: M, the number of draws.
    """

    samples: int = 1

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"`mc_samples` must be at least 1, found {self.samples}.")


Source = Gradient | Exact | Sampled


class Extension(ABC):
    """A quantity that a backward pass leaves on every parameter.

    A subclass sets three attributes and writes one function of a `Jacobian`. Extensions with the same ``source`` share
    the backward pass.

    Attributes:
        savefield: Name of the parameter's attribute that receives the result.
        source: Which columns are backpropagated: `Gradient`, `Exact` or `Sampled`.
        independent: Whether the quantity exists only where the samples of a batch do not influence each other.

    Example:
        The largest absolute per-sample gradient entry, a quantity of one's own:

        >>> import torch
        >>> from lightning_curv import Extension, curvature
        >>> class MaxGrad(Extension):
        ...     savefield = "max_grad"
        ...     def evaluate(self, jacobian):
        ...         return max(j.abs().max() for j in jacobian.chunks())
        >>> layer = torch.nn.Linear(2, 1)
        >>> with curvature(MaxGrad()):
        ...     layer(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
        >>> layer.weight.max_grad
        tensor(4.)
    """

    savefield: str
    source: Source = Gradient()
    independent: bool = True

    @abstractmethod
    def evaluate(self, jacobian: Jacobian) -> Any:
        """The quantity, for some columns of the parameter's Jacobian."""

    def merge(self, previous: Any, new: Any, jacobian: Jacobian) -> Any:
        """Combine the results of disjoint sets of columns; they add up unless a subclass says otherwise.

        Args:
            previous: The result so far.
            new: The result for the columns of ``jacobian``.
            jacobian: What ``new`` was evaluated on.
        """
        return previous + new

    def __repr__(self) -> str:
        arguments = f"mc_samples={self.source.samples}" if isinstance(self.source, Sampled) else ""
        return f"{type(self).__name__}({arguments})"
