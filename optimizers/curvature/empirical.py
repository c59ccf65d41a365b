"""The columns of the empirical Fisher matrix: the per-sample gradients themselves.

They are taken where they are asked for, and where the loss gives no other columns.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from lightning_curv.errors import NoSecondDerivativeError, UnsupportedError
from lightning_curv.extensions import Extension, JacobianMC
from lightning_curv.extensions.columns import Exact, Sampled, Source
from lightning_curv.optimizers.warn import warn
from lightning_curv.passes.passes import Column, Passes
from lightning_curv.terms.jacobian import Jacobian


@dataclass(frozen=True)
class Labels:
    r"""The gradient for the labels of the data, as one column.

    Attributes:
        fitted: Divide the Fisher matrix by the loss $b$, if that is positive. The loss is then
            taken for a negative log-likelihood $\ell / b$ up to a scale $b$, whose best value is
            the mean of $\ell$ (of absolute errors: the Laplace distribution), and $b$ times the
            Fisher matrix of $\ell / b$ has the unit of a curvature.
    """

    fitted: bool = False

    def jacobians(self, passes: Passes) -> Iterator[dict[Tensor, Jacobian]]:
        """The Jacobian of the one column, by one pass."""
        # A loss that is a mean over N samples has per-sample gradients g / N, its Fisher matrix
        # columns g / √N.
        seed = passes.seed * math.sqrt(passes.samples.count)
        if self.fitted:
            loss = (passes.loss.detach() * passes.seed).sum()
            seed = seed / loss.where(loss > 0, 1.0).sqrt()
        yield from passes.jacobians([Column([get_gradient_edge(passes.loss)], [seed])])


class Curved:
    """The columns of a source, or fitted `Labels` where the loss gives it none.

    A warning says so the first time. That is where a loss that torch has no function for has no
    second derivative, and where it is piecewise linear, so that all of its curvature is zero.

    Args:
        source: What is to be taken as long as there is curvature.
        told: Warnings that were given.
    """

    def __init__(self, source: Exact | Sampled, told: set[str]) -> None:
        self.source = source
        self._told = told

    def on(self, passes: Passes) -> Source:
        """The source for some passes."""
        try:
            is_flat = all(part.flat for part in passes.parts)
        except NoSecondDerivativeError:
            reason = "the loss has no second derivative"
        except UnsupportedError:
            # It is raised again, with its own message, by the source that needs what is missing.
            return self.source
        else:
            if not is_flat:
                return self.source
            reason = "the curvature of the loss is zero"
        if reason not in self._told:
            warn(
                "takes the empirical Fisher matrix (the gradients of the samples) as curvature: "
                f"{reason}."
            )
            self._told.add(reason)
        return Labels(fitted=True)  # type: ignore[return-value]


def curved(*extensions: Extension) -> None:
    """Make the columns of extensions of one optimizer `Curved`."""
    told: set[str] = set()
    for extension in extensions:
        extension.source = Curved(extension.source, told)  # type: ignore[assignment, arg-type]


class JacobianEmpirical(JacobianMC):
    r"""The per-sample gradients times $\sqrt N$, unevaluated, in `jacobian_empirical`.

    It is meant for losses that are means over the samples. F. Kunstner, L. Balles, P. Hennig,
    *Limitations of the Empirical Fisher Approximation for Natural Gradient Descent*, NeurIPS 2019,
    on why it is no substitute near an optimum.
    """

    savefield = "jacobian_empirical"

    def __init__(self) -> None:
        self.source = Labels()  # type: ignore[assignment]
