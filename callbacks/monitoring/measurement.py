"""The statistics of one optimizer step, for some parameters, averaged over processes."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_curv.callbacks.monitoring.entries import (
    COLUMNS,
    Entries,
    entry_rows,
    pooled_entries,
    stored,
)
from lightning_curv.callbacks.monitoring.histograms import COARSE, FINE, ONE, TWO, limits
from lightning_curv.callbacks.monitoring.parts import PARTS
from lightning_curv.callbacks.monitoring.quantiles import Numbers, pooled, shared_sketch
from lightning_curv.callbacks.monitoring.window import Statistics
from lightning_curv.devices import on_one_device
from lightning_curv.metrics.functional import (
    entry_moments,
    unbiased_moments,
    unbiased_moments_of_parts,
)
from lightning_curv.precision import wide

if TYPE_CHECKING:
    from pytorch_lightning.strategies import Strategy

EIGENVALUES = {"ggn_max_eigenvalue", "hessian_max_eigenvalue"}
Key = str | tuple[str, Parameter]


class Measurement:
    """What the formulas of `quantities` are functions of.

    Args:
        statistics: of this process' samples.
        grads: accumulated gradient of each parameter, synchronised over processes and without a
            scaler's factor.
        divisor: of the accumulated gradient, gives the gradient of the window.
        lr: learning rate.
        strategy: averages over processes.
        fields: savefields that the quantities need, the same in all processes.
        lost: those of them that could not be computed in this process.
        pool: whether the norms of the samples are wanted, those of all processes.
        with_loss: whether the loss is wanted.
        with_entries: whether mean, spread and zeros of the gradients' entries are wanted.
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
        with_loss: bool = False,
        with_entries: bool = False,
    ) -> None:
        self.statistics, self.lr = statistics, lr
        self._divisor, self._params = divisor, grads
        self._world, self._rank = (
            getattr(strategy, "world_size", 1),
            getattr(strategy, "global_rank", 0),
        )
        self._fields, self._lost, self._pool, self._with_loss = (
            list(fields),
            set(lost),
            pool,
            with_loss,
        )
        self._with_entries = with_entries
        self._stored: list[int] = []  # entries of the gradients
        self._sums: dict[Key, Tensor | float] = {}
        self.covered: frozenset[Parameter] = frozenset()
        self.failures: list[
            tuple[set[str], Exception]
        ] = []  # savefields that could not be summed up
        self.norms: Numbers  # of the samples, ascending
        self.norm_weights: Numbers | None  # how many samples each stands for, if not one

    def local_sums(self) -> dict[Key, Tensor | float]:
        """What the formulas need the average over processes of.

        In the same order and shapes in all of them: a parameter that this process did not use has
        zeros, what could not be computed has NaN.
        """
        sums: dict[Key, Tensor | float] = {}
        if self._with_loss:
            loss = self.statistics.loss
            sums["loss"] = math.nan if loss is None else loss
        if self._world > 1:
            # A parameter that only some processes used is covered in all of them.
            sums["covered"] = torch.tensor([p in self.statistics.covered for p in self._params])
        for field in self._fields:
            if field not in self._lost:
                try:
                    sums |= self._of_field(field)
                    continue
                except Exception as error:  # the other processes wait for the same keys
                    self.failures.append(({field}, error))
            sums |= {
                key: math.nan * value
                for key, value in self._of_field(field, available=False).items()
            }
        return sums

    def _of_field(self, field: str, available: bool = True) -> Mapping[Key, Tensor | float]:
        s = self.statistics
        if field == "batch_l2":
            sums: dict[Key, Tensor | float] = {"concentration": 0.0, "second_moment": 0.0}
            if available:
                sums = {
                    # Of W processes, weights are 1 / W of the local ones and Σ w² adds up: mean
                    # over W.
                    "concentration": s.concentration / self._world
                }  # the rest on the host, if in one process
            if available and self._world > 1:
                sums["second_moment"] = s.mean(s.sq_norms)
            if self._world > 1 and self._pool:
                norms = s.sq_norms.sqrt() if available else torch.zeros(1)
                sums["norms"] = shared_sketch(norms, self._rank, self._world)
            return sums
        if field == PARTS:
            second, inverse, parts = s.parts if available else (math.nan, math.nan, 1.0)
            return {
                "part_second": second,
                "part_inverse": inverse,
                # Σ v² / n, with weights v of one over the parts of all processes.
                "whole_inverse": inverse / (parts * self._world),
            }
        if field == "jacobian_grad":
            vectors = {p: self._params[p].to_dense() for p in s.covered} if available else {}
            return {
                "dot_second": s.mean((s.dots(vectors) / self._divisor).square()) if vectors else 0.0
            }
        if field in (ONE, TWO):
            # Known without data, so that a process without counts reduces as many zeros.
            bins = (len(limits(FINE if field == ONE else COARSE)) + 1) ** (1 if field == ONE else 2)
            counts = s.total(field) if available else None
            return {field: torch.zeros(bins) if counts is None else counts}
        if field == "grad_sum":
            return self._of_estimate(s.mean_gradients() if available else {})
        if field == "sum_grad_squared":
            return self._entries(field, s.second_moments() if available else {})
        curvatures = s.curvatures(field) if available else {}
        if field == "diag_ggn_mc":
            return self._entries(field, curvatures)
        values = [*curvatures.values()]
        if field in EIGENVALUES:  # the same on all parameters
            values = values[:1]
        return {field: torch.stack(on_one_device(values)).sum() if values else 0.0}

    def _of_estimate(self, means: Mapping[Parameter, Tensor]) -> Mapping[Key, Tensor | float]:
        r"""What a mean gradient $\hat g$ of some samples has in common with that of all."""
        products = [(mean * self._params[p].to_dense()).sum() for p, mean in means.items()]
        first = torch.stack(on_one_device(products)).sum() / self._divisor if products else 0.0
        sums: dict[Key, Tensor | float] = {
            "partial": float(self.statistics.partial),
            "dot_first": first,
        }
        return (
            # As large as the model: only where variances of single entries need it.
            sums | self._entries("grad_sum", means) if "sum_grad_squared" in self._fields else sums
        )

    def _entries(self, field: str, found: Mapping[Parameter, Tensor]) -> dict[Key, Tensor | float]:
        return {
            # Expanded: one zero in memory, whatever the shape.
            (field, p): found[p] if p in found else wide(grad.new_zeros(())).expand(p.shape)
            for p, grad in self._params.items()
        }

    def set_sums(self, sums: Mapping[Key, Tensor | float]) -> None:
        """Set the averages of `local_sums` over all processes."""
        self._sums, self.covered = dict(sums), self.statistics.covered
        if self._world > 1:
            shares = cast("Tensor", sums["covered"]).tolist()
            self.covered = frozenset(
                p for p, share in zip(self._params, shares, strict=True) if share > 0
            )

    @property
    def unseen(self) -> bool:
        """Whether statistics of samples are due, but no backward pass of the window was seen."""
        return not self.covered and not self._lost.issuperset(self._fields)

    def on_device(self) -> list[Tensor]:
        """Vectors for the host: sums and norms of gradients, norms of samples."""
        tensors = {key: value for key, value in self._sums.items() if isinstance(value, Tensor)}
        self._scalars = [key for key, value in tensors.items() if not value.ndim]
        grads = [
            grad.coalesce().values() if grad.is_sparse else grad for grad in self._params.values()
        ]
        # A few kernels for all parameters, not one for each.
        norms = torch._foreach_norm(
            [grad.float() if grad.dtype.itemsize < 4 else grad for grad in grads]
        )
        scalars = [tensors[key].reshape(1) for key in self._scalars]
        parts = [*scalars, torch.stack(on_one_device(norms))]
        if self._with_entries:
            values = [stored(grad) for grad in self._params.values()]
            self._stored = [tensor.numel() for tensor in values]
            parts.append(entry_rows(values).flatten().to(norms[0].device))
        if self._world == 1:
            parts.append(self.statistics.sq_norms.to(norms[0].device))
        elif self._pool:
            # The mean over processes of rows that are zero in all but one, times W, has the row of
            # each.
            parts += pooled(tensors["norms"] * self._world)
        return parts

    def set_numbers(self, numbers: Numbers) -> None:
        """Set the vectors of `on_device`, joined."""
        sums, grads = len(self._scalars), len(self._params)
        self._sums.update(zip(self._scalars, numbers[:sums], strict=True))
        norms = [norm / self._divisor for norm in numbers[sums : sums + grads].tolist()]
        self._grad_squares = [norm * norm for norm in norms]
        start = sums + grads
        if self._with_entries:
            stop = start + grads * COLUMNS
            self._entry_rows = numbers[start:stop].reshape(grads, COLUMNS)
            start = stop
        samples = numbers[start:]
        if self._world == 1:
            # From numbers that the host has anyway.
            self._sums.setdefault("second_moment", self.statistics.mean(samples))
            self.norms, self.norm_weights = np.sqrt(samples), None
            self.norms.sort()
        else:
            self.norms, self.norm_weights = np.split(samples, 2)

    @property
    def second_moment(self) -> np.float64:
        r"""$\sum_n w_n \|g_n\|^2$, as far as the measured samples tell it.

        Of some samples $\|\bar g\|^2 + \sum_n w_n \|g_n - \bar g\|^2$. In all samples the two are
        equal, and the second is unbiased for every subset size: it is the estimate by
        $\|g_n\|^2 - 2\,g_n \cdot \bar g$ of a sum whose part $g_n \cdot \bar g$ is known. It varies
        less, and makes no variance negative. Cochran, *Sampling techniques*, 3rd edition, 1977,
        theorem 7.1.
        """
        return np.float64(self._sums["second_moment"]) - 2 * self._excess

    @property
    def _partial(self) -> bool:
        """Whether some process has some of its samples only."""
        return bool(self._sums.get("partial", 0) > 0)

    @property
    def _excess(self) -> np.float64:
        r"""$\sum_n w_n\,g_n \cdot \bar g - \|\bar g\|^2$ of some samples; 0 for all."""
        return (
            np.float64(self._sums["dot_first"]) - self.grad_sq_norm
            if self._partial
            else np.float64(0)
        )

    @property
    def concentration(self) -> np.float64:
        """Inverse of the effective number of samples."""
        return np.float64(self._sums["concentration"])

    @property
    def dot_second(self) -> np.float64:
        r"""$\sum_n w_n (g_n \cdot \bar g)^2$, from some samples in the way of `second_moment`."""
        return np.float64(self._sums["dot_second"]) - 2 * self.grad_sq_norm * self._excess

    @property
    def loss(self) -> np.float64:
        """The loss."""
        return np.float64(self._sums["loss"])

    def sum_of(self, savefield: str) -> np.float64:
        """A trace, added up over the parameters."""
        return np.float64(self._sums[savefield])

    # An eigenvalue is kept once, not per parameter, so that the sum over them is the value itself.
    any_of = sum_of

    def counts(self, savefield: str) -> Numbers:
        """A histogram over all processes."""
        counts = cast("Tensor", self._sums[savefield]) * self._world
        # A mean times the number of processes is whole but for rounding.
        return np.rint(counts.cpu().double().numpy())

    def first_of(self, *savefields: str) -> np.float64:
        """The first of several estimates of a trace that exists."""
        found = [self.sum_of(field) for field in savefields if field in self._sums]
        return next((value for value in found if np.isfinite(value)), np.float64(np.nan))

    def mean_of(self, savefield: str) -> dict[Parameter, Tensor]:
        """A curvature of the parameters' shapes."""
        return {
            p: cast("Tensor", self._sums[savefield, p]) for p in self._params if p in self.covered
        }

    def second_moments(self) -> dict[Parameter, Tensor]:
        """Second moments of the entries of the per-sample gradients."""
        return self.mean_of("sum_grad_squared")

    def entry_moments(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Squared mean and unbiased variance of the per-sample gradients' entries, by parameter."""
        estimates = self.mean_of("grad_sum") if self._partial else {}
        for p, second in self.second_moments().items():
            mean = self._params[p].to_dense().to(second) / self._divisor
            if p in estimates:
                # What `_excess` is to the sum over all entries, entry by entry.
                second = second - 2 * mean * (estimates[p] - mean)
            yield entry_moments(mean, second, float(self.concentration))

    @property
    def grad_norm(self) -> np.float64:
        r"""$\|\bar g\|$ over all parameters."""
        # Unlike `grad_sq_norm`: parameters whose samples were not seen have a gradient, too.
        return np.sqrt(np.float64(sum(self._grad_squares)))

    @cached_property
    def entries(self) -> Entries:
        """Of the gradient, over all parameters."""
        sizes = [(2 if grad.is_complex() else 1) * grad.numel() for grad in self._params.values()]
        found = pooled_entries(self._entry_rows, self._stored, sizes)
        # The mean keeps its sign; deviation and magnitude have none.
        scale = abs(self._divisor)
        return Entries(
            found.mean / self._divisor, found.std / scale, found.largest / scale, found.zeros
        )

    @cached_property
    def grad_sq_norm(self) -> np.float64:
        r"""$\|\bar g\|^2$ over the parameters whose samples were seen."""
        return np.float64(
            sum(
                [
                    s
                    for p, s in zip(self._params, self._grad_squares, strict=True)
                    if p in self.covered
                ]
            )
        )

    @cached_property
    def moments(self) -> tuple[np.float64, np.float64, np.float64]:
        r"""$\sum_n w_n \|g_n\|^2$, $\|\bar g\|^2$ and the concentration of the weights."""
        return self.second_moment, self.grad_sq_norm, self.concentration

    @cached_property
    def _unbiased(self) -> tuple[float, float]:
        """Of the samples, or else of the backward passes."""
        found = unbiased_moments(*self.moments)
        if math.isfinite(found[0]) or "part_second" not in self._sums:
            return found
        inverses = [np.float64(self._sums[key]) for key in ("part_inverse", "whole_inverse")]
        return unbiased_moments_of_parts(
            np.float64(self._sums["part_second"]), self.grad_sq_norm, *inverses
        )

    @property
    def variance(self) -> float:
        """Trace of the covariance, unbiased."""
        return self._unbiased[0]

    @property
    def signal(self) -> float:
        """Squared norm of the gradient without its noise, unbiased."""
        return self._unbiased[1]
