"""What an extension is: a name, a source of columns, and one function of a `Jacobian`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from lightning_curv.extensions.columns import Chosen, ExactGGN, LossGradient, MonteCarloGGN, Source
from lightning_curv.passes.passes import Passes
from lightning_curv.terms.jacobian import Jacobian

__all__ = ["ExactGGN", "Extension", "GraphExtension", "LossGradient", "MonteCarloGGN", "Source"]


class Extension(ABC):
    """A quantity that a backward pass leaves on every parameter.

    A subclass sets three attributes and writes one function of a `Jacobian`. Extensions with the
    same `source` share the backward pass.

    Attributes:
        savefield: Name of the parameter's attribute that receives the result.
        source: Which columns are backpropagated: `LossGradient`, `ExactGGN` or `MonteCarloGGN`.
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
    source: Source | Chosen = LossGradient()
    independent: bool = True
    needs_samples: bool = True
    totals: bool = True
    forms: bool = False
    batchwise = False
    keeps_graph = False

    @property
    def needs_likelihood(self) -> bool:
        """Whether it needs the curvature of the loss."""
        return not isinstance(self.source, LossGradient)

    def wants(self, parameter: Tensor) -> bool:
        """Say whether the quantity of a parameter is wanted, where the only column is the gradient.

        Ops whose parameters no extension wants are not listened to.

        Args:
            parameter: A parameter that the loss depends on.

        Returns:
            True, unless a subclass is for some parameters only.
        """
        return True

    @abstractmethod
    def evaluate(self, jacobian: Jacobian) -> Any:
        """Compute the quantity from some columns of the parameter's Jacobian.

        Args:
            jacobian: The Jacobian of one parameter, for columns of the source. It carries the scale
                of the loss.

        Returns:
            The quantity of these columns, which `merge` combines with that of others.
        """

    def accumulate(self, previous: Any, jacobian: Jacobian) -> Any:
        """Add further columns to the result so far; override it to change a large one in place.

        Args:
            previous: The result so far.
            jacobian: Columns that are not in it.

        Returns:
            The result of all of them: what `evaluate` and `merge` make, unless a subclass is
            faster.
        """
        return self.merge(previous, self.evaluate(jacobian), jacobian)

    def merge(self, previous: Any, new: Any, jacobian: Jacobian) -> Any:
        """Combine results of disjoint sets of columns; unless a subclass differs, they add up.

        Args:
            previous: The result so far.
            new: The result for the columns of `jacobian`.
            jacobian: What `new` was evaluated on.

        Returns:
            The result for all these columns.
        """
        return previous + new

    def __repr__(self) -> str:
        drawn = getattr(self.source, "samples", None)
        arguments = "" if drawn is None else f"mc_samples={drawn}"
        return f"{type(self).__name__}({arguments})"


class Differentiable(Extension):
    """A first-order quantity that has a graph after `loss.backward(create_graph=True)`.

    It is then as differentiable as `.grad`: for penalties on the variance of the gradient and the
    like. A subclass writes one more function, of the per-sample gradients.

    Example:
        The mean absolute per-sample gradient, as a quantity that can be a penalty:

        >>> import torch
        >>> from lightning_curv import curvature
        >>> from lightning_curv.extensions import Differentiable
        >>> class MeanAbsolute(Differentiable):
        ...     savefield = "mean_absolute"
        ...     def evaluate(self, jacobian):
        ...         return self.of_gradients(jacobian.per_sample()[0])
        ...     def of_gradients(self, gradients):
        ...         return gradients.abs().mean(0)
        >>> w = torch.nn.Parameter(torch.tensor([2.0]))
        >>> with curvature(MeanAbsolute()):  # the gradients of (w x)² are 2 w x²
        ...     (torch.tensor([[1.0], [3.0]]) * w).square().sum().backward(create_graph=True)
        >>> torch.autograd.grad(w.mean_absolute.sum(), w)  # the mean of 2 x²
        (tensor([10.]),)
    """

    @abstractmethod
    def of_gradients(self, gradients: Tensor) -> Tensor:
        """Compute the quantity by operations that autograd can differentiate.

        Args:
            gradients: The per-sample gradients, `[N, *p]`, with a graph. They carry the scale of
                the loss.

        Returns:
            The same value as `evaluate`, with a graph.
        """


class GraphExtension(ABC):
    """A quantity that is no function of backpropagated columns, and makes passes of its own.

    Attributes:
        savefield: Name of the parameter's attribute that receives the result.
        independent: Whether the quantity exists only where the samples of a batch do not influence
            each other.
        needs_samples: Whether it needs to know which sample owns each row.
        batchwise: Whether it takes the whole batch as one sample where samples influence each
            other.
        needs_likelihood: Whether it needs the curvature of the loss.
        keeps_graph: Whether the results need the graph after the backward pass.
        reads_root: Whether it reads the loss and nothing else of the graph: where nothing else is
            wanted, nothing is recorded.

    Example:
        How many ops use each parameter, read from the graph without any pass:

        >>> import torch
        >>> from lightning_curv import curvature
        >>> from lightning_curv.extensions import GraphExtension
        >>> class Uses(GraphExtension):
        ...     savefield = "uses"
        ...     needs_samples = needs_likelihood = False
        ...     def compute(self, passes):
        ...         used = [p for found in passes.tape.parameters.values() for p in found]
        ...         return {p: used.count(p) for p in passes.tape.all_parameters}
        >>> layer = torch.nn.Linear(2, 2, bias=False)
        >>> with curvature(Uses()):
        ...     layer(layer(torch.ones(3, 2))).sum().backward()
        >>> layer.weight.uses
        2
    """

    savefield: str
    independent: bool = True
    needs_samples: bool = True
    batchwise: bool = False
    needs_likelihood: bool = True
    keeps_graph: bool = False
    reads_root: bool = False

    @abstractmethod
    def compute(self, passes: Passes) -> dict[Tensor, Any]:
        """Compute the quantity of every parameter, before the user's own pass frees the graph.

        Args:
            passes: The graph of the loss, where its samples are, and passes through it.

        Returns:
            One result per parameter; parameters that are left out get none.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"
