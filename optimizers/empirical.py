"""The columns of the empirical Fisher matrix: the per-sample gradients themselves."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from lightning_curv.extensions import JacobianMC
from lightning_curv.jacobian import Jacobian
from lightning_curv.passes import Column, Passes


@dataclass(frozen=True)
class Labels:
    """The gradient for the labels of the data, as one column."""

    def jacobians(self, passes: Passes) -> Iterator[dict[Tensor, Jacobian]]:
        """One pass."""
        # A loss that is a mean over N samples has per-sample gradients g / N, its Fisher matrix columns g / √N.
        seed = passes.seed * math.sqrt(passes.samples.count)
        yield from passes.jacobians([Column([get_gradient_edge(passes.loss)], [seed])])


class JacobianEmpirical(JacobianMC):
    r"""The per-sample gradients times $\sqrt N$, unevaluated, in `jacobian_empirical`; for losses that are means.

    F. Kunstner, L. Balles, P. Hennig, *Limitations of the Empirical Fisher Approximation for Natural Gradient Descent*,
    NeurIPS 2019, on why it is no substitute near an optimum.
    """

    savefield = "jacobian_empirical"

    def __init__(self) -> None:
        self.source = Labels()  # type: ignore[assignment]
