"""The per-sample gradients, unevaluated or summed: for what needs them after the backward pass."""

from __future__ import annotations

from torch import Tensor

from lightning_curv.extensions.base import Extension
from lightning_curv.terms.jacobian import Jacobian


class GradientJacobian(Extension):
    r"""The per-sample gradients :math:`s\,g_n`, unevaluated, in ``jacobian_grad``.

    They are a `Jacobian` whose contractions are not carried out. ``p.jacobian_grad.dot(d)`` are the
    directional derivatives :math:`s\,g_n \cdot d` of every sample, ``[1, N]``, for a direction that
    is known only after the backward pass, such as the mean gradient. Cost: none until then, and one
    product per layer for each `dot`. Memory: inputs and cotangents of the ops until the attribute
    is deleted.

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
    totals = False

    def evaluate(self, jacobian: Jacobian) -> Jacobian:
        """Keep J, without the gradient, which the user may change in place."""
        return Jacobian(jacobian.parameter, jacobian.terms)

    def merge(self, previous: Jacobian, new: Jacobian, jacobian: Jacobian) -> Jacobian:
        """Fail: there is a single column."""
        raise AssertionError("the gradient is one column")


class GradientSum(Extension):
    r"""The sum of the per-sample gradients :math:`\sum_n s\,g_n`, in ``grad_sum``.

    It has the parameter's shape. Over all samples it is the gradient; over some of them it costs
    one more product per layer, with their rows.
    """

    savefield = "grad_sum"

    def evaluate(self, jacobian: Jacobian) -> Tensor:
        """Return a copy, which the user's changes of the gradient do not reach."""
        return jacobian.sum_of_gradients().clone()
