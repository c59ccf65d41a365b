"""What an extension is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from lightning_curv.extensions.columns import Exact, Gradient, Sampled, Source
from lightning_curv.passes.passes import Passes
from lightning_curv.terms.jacobian import Jacobian

__all__ = ["Exact", "Extension", "Gradient", "GraphExtension", "Sampled", "Source"]


class Extension(ABC):
    """A quantity that a backward pass leaves on every parameter.

    A subclass sets three attributes and writes one function of a `Jacobian`. Extensions with the
    same ``source`` share the backward pass.

    Attributes:
        savefield: Name of the parameter's attribute that receives the result.
        source: Which columns are backpropagated: `Gradient`, `Exact` or `Sampled`.
        independent: Whether the quantity exists only where the samples of a batch do not influence
            each other.
        needs_samples: Whether it needs to know which sample owns each row.
        totals: Whether it needs `Jacobian.total`: the gradient, if that is the source, is then
            waited for.
        forms: Whether all of J is formed in memory: it is evaluated first, so that others find J
            there.

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
    needs_samples: bool = True
    totals: bool = True
    forms: bool = False
    batchwise = False
    keeps_graph = False

    @property
    def needs_likelihood(self) -> bool:
        """Whether it needs the curvature of the loss."""
        return not isinstance(self.source, Gradient)

    @abstractmethod
    def evaluate(self, jacobian: Jacobian) -> Any:
        """The quantity, for some columns of the parameter's Jacobian."""

    def accumulate(self, previous: Any, jacobian: Jacobian) -> Any:
        """The result so far with further columns: `evaluate` and `merge`, unless it can be changed in place."""
        return self.merge(previous, self.evaluate(jacobian), jacobian)

    def merge(self, previous: Any, new: Any, jacobian: Jacobian) -> Any:
        """Combine the results of disjoint sets of columns; they add up unless a subclass says otherwise.

        Args:
            previous: The result so far.
            new: The result for the columns of ``jacobian``.
            jacobian: What ``new`` was evaluated on.
        """
        return previous + new

    def __repr__(self) -> str:
        drawn = getattr(self.source, "samples", None)
        arguments = "" if drawn is None else f"mc_samples={drawn}"
        return f"{type(self).__name__}({arguments})"


class Differentiable(Extension):
    """A first-order quantity that is differentiable where the gradient is: ``loss.backward(create_graph=True)``."""

    @abstractmethod
    def of_gradients(self, gradients: Tensor) -> Tensor:
        """The quantity by operations that autograd can differentiate.

        Args:
            gradients: The per-sample gradients, ``[N, *p]``.
        """


class GraphExtension(ABC):
    """A quantity that is no function of backpropagated columns, and makes its own passes through the graph.

    Attributes:
        savefield: Name of the parameter's attribute that receives the result.
        independent: Whether the quantity exists only where the samples of a batch do not influence
            each other.
        needs_samples: Whether it needs to know which sample owns each row.
        batchwise: Whether it takes the whole batch as one sample where samples influence each
            other.
        needs_likelihood: Whether it needs the curvature of the loss.
        keeps_graph: Whether the results need the graph after the backward pass.
    """

    savefield: str
    independent: bool = True
    needs_samples: bool = True
    batchwise: bool = False
    needs_likelihood: bool = True
    keeps_graph: bool = False

    @abstractmethod
    def compute(self, passes: Passes) -> dict[Tensor, Any]:
        """The quantity of every parameter."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"
