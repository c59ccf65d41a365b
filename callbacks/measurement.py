"""The statistics of one optimizer step, for some parameters, averaged over processes."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property

import numpy as np
import torch
from pytorch_lightning.strategies import Strategy
from torch import Tensor
from torch.nn import Parameter

from lightning_curv.callbacks.sketch import Numbers, pooled, shared_sketch
from lightning_curv.callbacks.window import Statistics, stacked, wide
from lightning_curv.metrics import unbiased_moments

EIGENVALUES = {"ggn_max_eigenvalue", "hessian_max_eigenvalue"}
Key = str | tuple[str, Parameter]


class Measurement:
    """What the formulas of `quantities` are functions of.

    Args:
        statistics: of this process' samples.
        grads: accumulated gradient of each parameter, synchronised over processes and without a scaler's factor.
        divisor: of the accumulated gradient, gives the gradient of the window.
        lr: learning rate.
        strategy: averages over processes.
        fields: savefields that the quantities need, the same in all processes.
        lost: those of them that could not be computed in this process.
        pool: whether the norms of all processes' samples are wanted.
    """

    def __init__(
        self,
        statistics: Statistics,
        grads: Mapping[Parameter, Tensor],
        divisor: float,
        lr: float,
        strategy: Strategy,
        fields: Collection[str],
        lost: Collection[str] = (),
        pool: bool = False,
    ) -> None:
        self.statistics, self.lr = statistics, lr
        self._divisor, self._params = divisor, grads
        self._grads = {p: grad.coalesce().values() if grad.is_sparse else grad for p, grad in grads.items()}
        self._world, self._rank = getattr(strategy, "world_size", 1), getattr(strategy, "global_rank", 0)
        self._fields, self._lost, self._pool = list(fields), set(lost), pool
        self._reduced: dict[Key, Tensor] = {}
        self.covered: set[Parameter] = set()

    def local_sums(self) -> dict[Key, Tensor]:
        """What the formulas need the average over processes of, in the same order and shapes in all of them.

        A parameter that this process did not use has zeros, what could not be computed has NaN.
        """
        zero = wide(next(iter(self._grads.values())).new_zeros(()))
        loss = self.statistics.loss
        sums: dict[Key, Tensor] = {"loss": zero * math.nan if loss is None else loss}
        if self._world > 1:
            sums["covered"] = zero.new_tensor([p in self.statistics.covered for p in self._params])
        for field in self._fields:
            found = self._of_field(field, zero)
            if field in self._lost:
                found = {key: torch.full_like(value, math.nan) for key, value in found.items()}
            sums |= found
        return sums

    def _of_field(self, field: str, zero: Tensor) -> dict[Key, Tensor]:
        s, available = self.statistics, field not in self._lost
        if field == "batch_l2":
            sums: dict[Key, Tensor] = {"second_moment": zero, "concentration": zero}
            if available:
                sums["second_moment"] = (s.weights @ s.sq_norms).to(zero)
                sums["concentration"] = (s.weights @ s.weights / self._world).to(zero)
            if self._pool and self._world > 1:
                norms = s.sq_norms.sqrt() if available else zero[None]
                sums["norms"] = shared_sketch(norms.to(zero), self._rank, self._world)
            return sums
        if field == "jacobian_grad":
            vectors = {p: self._params[p].to_dense() for p in s.covered} if available else {}
            dots = s.dots(vectors).to(zero) / self._divisor if vectors else zero[None]
            return {"dot_second": zero + s.weights @ dots.square() if vectors else zero}
        if field == "sum_grad_squared":
            return self._entries(field, s.second_moments() if available else {}, zero)
        curvatures = s.curvatures(field) if available else {}
        if field == "diag_ggn_mc":
            return self._entries(field, curvatures, zero)
        values = [c.to(zero) for c in curvatures.values()]
        if field in EIGENVALUES:  # the same on all parameters
            values = values[:1]
        return {field: torch.stack(values).sum() if values else zero}

    def _entries(self, field: str, found: Mapping[Parameter, Tensor], zero: Tensor) -> dict[Key, Tensor]:
        return {(field, p): found[p].to(zero) if p in found else zero.expand(p.shape) for p in self._params}

    def set_sums(self, sums: Mapping[Key, Tensor]) -> None:
        """Set the averages of `local_sums` over all processes."""
        self._reduced, self.covered = dict(sums), self.statistics.covered
        if self._world > 1:
            self.covered = {p for p, share in zip(self._params, sums["covered"].tolist(), strict=True) if share > 0}

    @property
    def unseen(self) -> bool:
        """Whether there should be statistics of samples, but no backward pass of the window was seen."""
        return bool({*self._fields} - self._lost) and not self.covered

    def on_device(self) -> Tensor:
        """What the formulas need as numbers, in one vector: sums, norms of the gradients and of the samples."""
        self._scalars = [key for key, value in self._reduced.items() if isinstance(key, str) and not value.ndim]
        grads = [g.float() if g.dtype.itemsize < 4 else g for g in self._grads.values()]
        parts = [
            torch.stack([self._reduced[key] for key in self._scalars]),
            wide(stacked(list(torch._foreach_norm(grads)))),
        ]
        if self._pool and self._world > 1:
            parts += pooled(self._reduced["norms"] * self._world)
        elif self._pool:
            parts.append(self.statistics.sq_norms.sqrt().sort().values)
        return torch.cat([part.to(parts[0]) for part in parts])

    def set_numbers(self, numbers: Numbers) -> None:
        """Set the vector of `on_device`."""
        sums, grads = len(self._scalars), len(self._grads)
        samples = numbers[sums + grads :]
        self._numbers = dict(zip(self._scalars, numbers[:sums], strict=True))
        self._grad_squares = (numbers[sums : sums + grads] / self._divisor) ** 2
        if self._world == 1:
            self.norms = samples, np.ones_like(samples)
        else:
            self.norms = samples[: len(samples) // 2], samples[len(samples) // 2 :]

    @property
    def second_moment(self) -> np.float64:
        r"""$\sum_n w_n \|g_n\|^2$."""
        return self._numbers["second_moment"]

    @property
    def concentration(self) -> np.float64:
        """Inverse of the effective number of samples."""
        return self._numbers["concentration"]

    @property
    def dot_second(self) -> np.float64:
        r"""$\sum_n w_n (g_n \cdot \bar g)^2$."""
        return self._numbers["dot_second"]

    @property
    def loss(self) -> np.float64:
        """The loss."""
        return self._numbers["loss"]

    def sum_of(self, savefield: str) -> np.float64:
        """A trace, added up over the parameters."""
        return self._numbers[savefield]

    any_of = sum_of

    def mean_of(self, savefield: str) -> dict[Parameter, Tensor]:
        """A curvature of the parameters' shapes."""
        return {p: self._reduced[savefield, p] for p in self._params if p in self.covered}

    def second_moments(self) -> dict[Parameter, Tensor]:
        """Second moments of the entries of the per-sample gradients."""
        return self.mean_of("sum_grad_squared")

    def entry_moments(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Mean and unbiased variance of the entries of the per-sample gradients, parameter by parameter."""
        for p, second in self.second_moments().items():
            mean = self._params[p].to_dense().to(second) / self._divisor
            yield mean, ((second - mean.square()) / (1 - self.concentration)).clamp(min=0)

    @property
    def grad_norm(self) -> np.float64:
        r"""$\|\bar g\|$ over all parameters."""
        return np.sqrt(self._grad_squares.sum())

    @cached_property
    def grad_sq_norm(self) -> np.float64:
        r"""$\|\bar g\|^2$ over the parameters whose samples were seen."""
        return self._grad_squares[[p in self.covered for p in self._params]].sum()

    @cached_property
    def _moments(self) -> tuple[float, float]:
        return unbiased_moments(self.second_moment, self.grad_sq_norm, self.concentration)

    @property
    def variance(self) -> float:
        """Trace of the covariance, unbiased."""
        return self._moments[0]

    @property
    def signal(self) -> float:
        """Squared norm of the gradient without its noise, unbiased."""
        return self._moments[1]
