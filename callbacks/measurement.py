"""The statistics of one optimizer step, for some parameters, averaged over processes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import cached_property

import torch
from pytorch_lightning.strategies import Strategy
from torch import Tensor
from torch.nn import Parameter

from lightning_curv.callbacks.window import CURVATURE, Statistics, stacked, wide
from lightning_curv.metrics import unbiased_moments


class Measurement:
    """What the formulas of `quantities` are functions of.

    Args:
        statistics: of this process' samples.
        grads: accumulated gradient of each parameter, synchronised over processes and without a scaler's factor.
        divisor: of the accumulated gradient, gives the gradient of the window.
        lr: learning rate.
        strategy: averages over processes.
        fields: savefields that were computed.
    """

    def __init__(
        self,
        statistics: Statistics,
        grads: Mapping[Parameter, Tensor],
        divisor: float,
        lr: float,
        strategy: Strategy,
        fields: Collection[str],
    ) -> None:
        self.statistics, self.lr = statistics, lr
        self._divisor, self._strategy = divisor, strategy
        self._grads = {p: grad.coalesce().values() if grad.is_sparse else grad for p, grad in grads.items()}
        self._dense = {p: grad for p, grad in grads.items() if p in statistics.covered}
        self._fields = set(fields)
        self._reduced: dict[str, Tensor] = {}

    def local_sums(self) -> dict[str, Tensor]:
        """Numbers of this process whose average over processes the formulas need; all []."""
        sums = {}
        s = self.statistics
        if s.loss is not None:
            sums["loss"] = s.loss
        if "batch_l2" in self._fields and s.covered:
            sums["second_moment"] = s.weights @ s.sq_norms
            sums["concentration"] = s.weights @ s.weights / getattr(self._strategy, "world_size", 1)
        if "jacobian_grad" in self._fields and s.covered:
            dots = s.dots({p: self._dense[p].to_dense() for p in s.covered}) / self._divisor
            sums["dot_second"] = s.weights @ dots.square()
        for savefield in CURVATURE & self._fields:
            found = list(s.curvatures(savefield).values())
            if found and found[0].ndim == 0:
                sums[savefield] = torch.stack(found).sum()
        for savefield in self._fields & {"ggn_max_eigenvalue", "hessian_max_eigenvalue"}:
            if found := list(s.curvatures(savefield).values()):
                sums[savefield] = found[0]
        return sums

    def set_sums(self, sums: Mapping[str, Tensor]) -> None:
        """Set the averages of `local_sums` over all processes."""
        self._reduced = dict(sums)

    @property
    def second_moment(self) -> Tensor:
        r"""$\sum_n w_n \|g_n\|^2$, []."""
        return self._reduced["second_moment"]

    @property
    def concentration(self) -> Tensor:
        """Inverse of the effective number of samples, []."""
        return self._reduced["concentration"]

    @property
    def dot_second(self) -> Tensor:
        r"""$\sum_n w_n (g_n \cdot \bar g)^2$, []."""
        return self._reduced["dot_second"]

    @property
    def loss(self) -> Tensor:
        """The loss, []."""
        return self._reduced["loss"]

    def sum_of(self, savefield: str) -> Tensor:
        """A trace, added up over the parameters, []."""
        return self._reduced[savefield]

    any_of = sum_of

    def mean_of(self, savefield: str) -> dict[Parameter, Tensor]:
        """A curvature of the parameters' shapes."""
        found = self.statistics.curvatures(savefield)
        return {p: self._strategy.reduce(found[p], reduce_op="mean") for p in self._grads if p in found}

    def second_moments(self) -> dict[Parameter, Tensor]:
        """Second moments of the entries of the per-sample gradients."""
        found = self.statistics.second_moments()
        return {p: self._strategy.reduce(found[p], reduce_op="mean") for p in self._grads if p in found}

    def entry_moments(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Mean and unbiased variance of the entries of the per-sample gradients, parameter by parameter."""
        for p, second in self.second_moments().items():
            mean = self._dense[p].to_dense().to(second) / self._divisor
            yield mean, ((second - mean.square()) / (1 - self.concentration)).clamp(min=0)

    @cached_property
    def _sq_norms(self) -> dict[Parameter, Tensor]:
        grads = [g.float() if g.dtype.itemsize < 4 else g for g in self._grads.values()]
        norms = wide(stacked(list(torch._foreach_norm(grads))))
        return dict(zip(self._grads, (norms / self._divisor).square().unbind()))

    @cached_property
    def grad_norm(self) -> Tensor:
        r"""$\|\bar g\|$ over all parameters, []."""
        return torch.stack(list(self._sq_norms.values())).sum().sqrt()

    @cached_property
    def grad_sq_norm(self) -> Tensor:
        r"""$\|\bar g\|^2$ over the parameters whose samples were seen, []."""
        return torch.stack([square for p, square in self._sq_norms.items() if p in self.statistics.covered]).sum()

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        return unbiased_moments(self.second_moment, self.grad_sq_norm, self.concentration)

    @property
    def variance(self) -> Tensor:
        """Trace of the covariance, unbiased, []."""
        return self._moments[0]

    @property
    def signal(self) -> Tensor:
        """Squared norm of the gradient without its noise, unbiased, []."""
        return self._moments[1]
