"""Per-sample statistics of the backward passes that make one optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_curv.callbacks.monitoring.parts import PARTS
from lightning_curv.callbacks.monitoring.quantiles import Numbers
from lightning_curv.devices import on_one_device
from lightning_curv.precision import wide, widest


@dataclass(frozen=True)
class BackwardPass:
    """What one backward pass left on the parameters.

    Args:
        fields: results by savefield and parameter.
        factor: of the loss: first-order results carry it, curvature does not.
        loss: with the factor, [].
        samples: N, their number.
        counts: by savefield, the number S of samples that results are of, where these are a random
            subset of the N.
        size: the number of samples in the batch, which may be known where their rows are not.
    """

    fields: dict[str, dict[Parameter, Any]] = field(default_factory=dict)
    factor: Tensor | float = 1.0
    loss: Tensor | None = None
    samples: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)
    size: int | None = None

    def count(self, savefield: str) -> int:
        """How many samples the results of an extension are of."""
        return self.counts.get(savefield, self.samples)

    @cached_property
    def covered(self) -> frozenset[Parameter]:
        """The parameters that something was found for."""
        return frozenset().union(*self.fields.values())

    def without(self, params: Collection[Parameter]) -> BackwardPass:
        """The same for the other parameters."""
        if not params:
            return self
        fields = {
            name: {p: result for p, result in found.items() if p not in params}
            for name, found in self.fields.items()
        }
        return replace(self, fields=fields)


class Statistics:
    r"""Statistics of the samples of a window, for some parameters.

    The gradient of the window is $\bar g = \alpha \sum_{mn} u_{mn}$ with the shares $u_{mn}$ that
    pass $m$ of $M$ found for its $N_m$ samples. A sample's gradient is
    $g_{mn} = \alpha M N_m u_{mn}$ and its weight $w_{mn} = 1 / (M N_m)$, so that $\bar g$ is the
    weighted mean.

    Where a pass has results of $S_m < N_m$ samples, drawn uniformly without replacement, each of
    these stands for $N_m / S_m$ samples: sums over samples with weights $1 / (M S_m)$, and
    curvatures times $N_m / S_m$, have the value of all samples as their expectation (Horvitz &
    Thompson, *A generalization of sampling without replacement from a finite universe*, JASA 1952).

    Args:
        passes: those of the window that saw any of the parameters.
        params: restrict the statistics to these, in this order: sums over them then do not depend
            on the backward pass.
        share: $\alpha$, 1/M if the window's loss is the mean over the passes, 1 if it is their sum.
    """

    def __init__(
        self, passes: list[BackwardPass], params: Sequence[Parameter], share: float
    ) -> None:
        self._passes, self._params, self._share = passes, params, share
        self.covered = frozenset().union(
            *(backward.covered.intersection(params) for backward in passes)
        )

    @property
    def loss(self) -> Tensor | None:
        r"""$\alpha \sum_m \ell_m$, []."""
        losses = [
            wide(backward.loss) / backward.factor
            for backward in self._passes
            if backward.loss is not None
        ]
        return self._share * torch.stack(on_one_device(losses)).sum() if losses else None

    @cached_property
    def sq_norms(self) -> Tensor:
        r"""$\|g_n\|^2$, [N], or of those that were chosen."""
        return _joined(
            [_total(found) * self._sample_factor(backward) ** 2 for backward, found in self._norms]
        )

    @cached_property
    def _norms(self) -> list[tuple[BackwardPass, list[Tensor]]]:
        return self._found("batch_l2")

    @cached_property
    def _sizes(self) -> list[int]:
        return [found[0].numel() for _, found in self._norms]

    @property
    def samples(self) -> int:
        """N of the window."""
        return sum(backward.samples for backward, _ in self._norms)

    @property
    def partial(self) -> bool:
        """Whether a pass has the norms of some of its samples only."""
        return any(backward.count("batch_l2") < backward.samples for backward, _ in self._norms)

    @property
    def concentration(self) -> float:
        r"""$\sum_n w_n^2$ over all samples."""
        counts = [backward.samples for backward, _ in self._norms]
        # Per pass, N_m times the square of 1 / (M N_m).
        return sum(1 / count for count in counts if count) / max(len(self._passes), 1) ** 2

    def mean(self, values: Tensor | Numbers) -> Any:
        r"""$\sum_n w_n v_n$, [], for v of the samples whose norms are known."""
        stops = accumulate(self._sizes)
        means = [
            values[stop - size : stop].sum() / size
            for size, stop in zip(self._sizes, stops)
            if size
        ]
        # Passes weigh the same, whatever their sizes: Lightning averages their losses.
        return sum(means) / max(len(self._passes), 1)

    def dots(self, vectors: Mapping[Parameter, Tensor]) -> Tensor:
        r"""$g_n \cdot v$, as `sq_norms`: the op is applied to v, no per-sample gradient formed."""
        parts = []
        for backward, found in self._found("jacobian_grad"):
            known = backward.fields["jacobian_grad"]
            along = [vectors[p] for p in self._params if p in known]
            products = [jacobian.dot(v)[0] for jacobian, v in zip(found, along, strict=True)]
            parts.append(_total(products) * self._sample_factor(backward))
        return _joined(parts)

    def second_moments(self) -> dict[Parameter, Tensor]:
        r"""$\sum_n w_n g_n^2$ entry by entry, of the parameters' shapes."""
        return self._means("sum_grad_squared", power=2)

    def mean_gradients(self) -> dict[Parameter, Tensor]:
        r"""$\sum_n w_n g_n$, of the parameters' shapes.

        $\bar g$ if all samples are known, else an estimate of it.
        """
        return self._means("grad_sum", power=1)

    @property
    def parts(self) -> tuple[Tensor | float, float, float]:
        r"""$\sum_k v_k \|G_k\|^2$, $\sum_k v_k / n_k$ and the number of parts.

        Parts are the passes, of mean gradients $G_k$. NaN where a pass is no part of the mean, or
        its number of samples is not known.
        """
        squares = [_total(found) / backward.factor**2 for backward, found in self._found(PARTS)]
        sizes = [backward.size for backward in self._passes]
        shared = self._share * len(self._passes) == 1 and len(squares) == len(sizes)
        if not squares or not shared or not all(sizes):
            return math.nan, math.nan, 1.0
        return (
            torch.stack(on_one_device(map(wide, squares))).mean(),
            _mean([1 / n for n in sizes if n]),
            len(sizes),
        )

    def unit(self, savefield: str) -> float:
        """Gradients of samples over those of a pass, and its chosen samples, as all of the loss.

        NaN where passes are different shares of it.
        """
        shares = {
            backward.samples / backward.count(savefield)
            for backward, _ in self._found(savefield)
            if backward.samples
        }
        return self._share * len(self._passes) * shares.pop() if len(shares) == 1 else math.nan

    def total(self, savefield: str) -> Tensor | None:
        """Counts, added up over parameters and passes."""
        found = [count for _, counts in self._found(savefield) for count in counts]
        return torch.stack(on_one_device(found)).sum(0) if found else None

    def curvatures(self, savefield: str) -> dict[Parameter, Tensor]:
        r"""A curvature of the window's loss, $\alpha \sum_m C_m$.

        For eigenvalues an upper bound of that.
        """
        return self._summed(
            savefield, lambda backward: self._share * (backward.samples / backward.count(savefield))
        )

    def _means(self, savefield: str, power: int) -> dict[Parameter, Tensor]:
        """Weighted means over the samples, from sums over them.

        Args:
            savefield: of the sums.
            power: of the gradients in what is summed.
        """

        def factor(backward: BackwardPass) -> Tensor | float:
            return self._sample_factor(backward) ** power / (
                len(self._passes) * backward.count(savefield)
            )

        return self._summed(savefield, factor)

    def _summed(
        self, savefield: str, factor: Callable[[BackwardPass], Tensor | float]
    ) -> dict[Parameter, Tensor]:
        """Results times a factor, summed over the passes."""
        total: dict[Parameter, Tensor] = {}
        for backward, scale in [
            (backward, factor(backward)) for backward in self._passes if backward.samples
        ]:
            for param, found in backward.fields.get(savefield, {}).items():
                if param in self.covered:
                    total[param] = total.get(param, 0) + scale * wide(found)
        return total

    def _found(self, savefield: str) -> list[tuple[BackwardPass, list[Any]]]:
        fields = [(backward, backward.fields.get(savefield, {})) for backward in self._passes]
        pairs = [
            (backward, [found[p] for p in self._params if p in found]) for backward, found in fields
        ]
        return [(backward, found) for backward, found in pairs if found]

    def _sample_factor(self, backward: BackwardPass) -> Tensor | float:
        return self._share * len(self._passes) * backward.samples / backward.factor


class Window:
    """The backward passes since the gradients were last set to zero: `passes`."""

    def __init__(self) -> None:
        self.passes: list[BackwardPass] = []

    def __len__(self) -> int:
        return len(self.passes)

    def __contains__(self, param: Parameter) -> bool:
        return any(param in backward.covered for backward in self.passes)

    def add(self, backward: BackwardPass) -> None:
        self.passes.append(backward)

    def forget(self, params: Iterable[Parameter]) -> None:
        """Drop parameters whose gradient was set to zero, and passes with nothing left then."""
        params = frozenset(params)
        self.passes = [
            backward.without(params) for backward in self.passes if not backward.covered <= params
        ]

    def statistics(self, params: Iterable[Parameter], share: float) -> Statistics:
        """Combine the passes; see `Statistics`."""
        params = list(params)
        passes = [backward for backward in self.passes if not backward.covered.isdisjoint(params)]
        # Parameters that no pass saw: loss and number of samples are known all the same.
        return Statistics(passes or self.passes, params, share)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _joined(parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    return torch.cat(on_one_device(parts)) if parts else torch.zeros(0, dtype=torch.float64)


def _total(vectors: list[Tensor]) -> Tensor:
    """Sum of [N], in the widest type."""
    stack = torch.stack(on_one_device(vectors))
    return stack.sum(0, dtype=widest(stack.device))
