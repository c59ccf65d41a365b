"""Jacobians that are kept, unevaluated or summed: for what needs them after the backward pass.

A kept Jacobian is a `lightning_curv.terms.jacobian.Jacobian` whose contractions are not carried
out. `p.jacobian_mc.dot(d)` are the directional derivatives of every column and sample along d,
`[V, N]`, for a direction that is known only after the backward pass.
"""

from __future__ import annotations

from torch import Tensor

from lightning_curv.extensions.base import ExactGGN, Extension, LossGradient, MonteCarloGGN
from lightning_curv.extensions.columns import EmpiricalFisher
from lightning_curv.terms.jacobian import Jacobian


class KeptJacobian(Extension):
    """The Jacobian of the columns of a source, unevaluated; subclasses name source and field.

    Memory: the inputs and cotangents of the parameter's ops until the attribute is deleted or
    overwritten.
    """

    # Batch statistics are taken as given, as for Kronecker factors.
    independent = False
    totals = False

    def evaluate(self, jacobian: Jacobian) -> Jacobian:
        """Keep J, without what other quantities have formed of it.

        The gradient does not belong to it either: the user may change that in place.
        """
        return Jacobian(jacobian.parameter, jacobian.terms, jacobian.signs)

    def merge(self, previous: Jacobian, new: Jacobian, jacobian: Jacobian) -> Jacobian:
        """Stack the columns."""
        return previous.stacked(new)


class GradientJacobian(KeptJacobian):
    r"""The per-sample gradients $s\,g_n$, unevaluated, in `jacobian_grad`.

    `p.jacobian_grad.dot(d)` are the directional derivatives $s\,g_n \cdot d$ of every
    sample, `[1, N]`, along a direction such as the mean gradient. Cost: none until then, and one
    product per layer for each `dot`.

    Example:
        >>> import torch
        >>> from lightning_curv import curvature
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> with curvature(GradientJacobian()):
        ...     layer(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).mean().backward()
        >>> layer.weight.jacobian_grad.dot(layer.weight.grad)
        tensor([[4., 9.]])
    """

    savefield = "jacobian_grad"
    source = LossGradient()
    independent = True


class JacobianMC(KeptJacobian):
    """The Jacobian of the Monte-Carlo columns, unevaluated, in `jacobian_mc`.

    It is a `lightning_curv.terms.jacobian.Jacobian`: `p.jacobian_mc.dot(d)` are the directional
    derivatives along d, `[M, N]`, and `(Σ_p p.jacobian_mc.dot(d_p)).square().sum()` is dᵀGd for
    a direction over all parameters, without another backward pass. Memory: the op's inputs and
    cotangents until the attribute is deleted or overwritten. Batch statistics are taken as given,
    as for Kronecker factors: with BatchNorm in training mode dᵀGd is an approximation.

    Args:
        mc_samples: M, the number of target draws; each costs one backward pass.

    Example:
        >>> import torch
        >>> from lightning_curv import curvature
        >>> from lightning_curv.extensions import JacobianMC
        >>> layer = torch.nn.Linear(2, 1)
        >>> with curvature(JacobianMC(mc_samples=3)):
        ...     torch.nn.functional.mse_loss(layer(torch.ones(5, 2)), torch.zeros(5, 1)).backward()
        >>> layer.weight.jacobian_mc.dot(layer.weight.grad).shape
        torch.Size([3, 5])
    """

    savefield = "jacobian_mc"

    def __init__(self, mc_samples: int = 1) -> None:
        self.source = MonteCarloGGN(mc_samples)


class JacobianExact(KeptJacobian):
    """The Jacobian of the exact GGN columns, unevaluated, in `jacobian_exact`; see `JacobianMC`.

    Cost: as many backward passes as a sample has output entries.

    Example:
        >>> import torch
        >>> from lightning_curv import curvature
        >>> from lightning_curv.extensions import JacobianExact
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> with curvature(JacobianExact()):
        ...     output = layer(torch.tensor([[1.0, 2.0]]))
        ...     torch.nn.functional.mse_loss(output, torch.zeros(1, 1)).backward()
        >>> along = layer.weight.jacobian_exact.dot(torch.tensor([[1.0, 1.0]]))
        >>> along.square().sum().round(decimals=4)  # dᵀGd, with G = 2 x xᵀ
        tensor(18.)
    """

    savefield = "jacobian_exact"
    source = ExactGGN()


class JacobianEmpirical(KeptJacobian):
    r"""The per-sample gradients times $\sqrt N$, unevaluated, in `jacobian_empirical`.

    It is meant for losses that are means over the samples. F. Kunstner, L. Balles, P. Hennig,
    *Limitations of the Empirical Fisher Approximation for Natural Gradient Descent*, NeurIPS 2019,
    on why it is no substitute near an optimum.
    """

    savefield = "jacobian_empirical"
    source = EmpiricalFisher()


class GradientSum(Extension):
    r"""The sum of the per-sample gradients $\sum_n s\,g_n$, in `grad_sum`.

    It has the parameter's shape. Over all samples it is the gradient; over some of them it costs
    one more product per layer, with their rows.
    """

    savefield = "grad_sum"

    def evaluate(self, jacobian: Jacobian) -> Tensor:
        """Return a copy, which the user's changes of the gradient do not reach."""
        return jacobian.sum_of_gradients().clone()
