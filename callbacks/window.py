"""Per-sample statistics of the backward passes that make one optimizer step."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_curv.callbacks.sketch import Numbers


@dataclass(frozen=True)
class BackwardPass:
    """What one backward pass left on the parameters.

    Args:
        fields: results by savefield and parameter.
        factor: of the loss: first-order results carry it, curvature does not.
        loss: with the factor, [].
    """

    fields: dict[str, dict[Parameter, Any]] = field(default_factory=dict)
    factor: Tensor | float = 1.0
    loss: Tensor | None = None

    @cached_property
    def covered(self) -> frozenset[Parameter]:
        """The parameters that something was found for."""
        return frozenset().union(*self.fields.values())

    def without(self, params: Collection[Parameter]) -> BackwardPass:
        """The same for the other parameters."""
        if not params:
            return self
        fields = {
            name: {p: result for p, result in found.items() if p not in params} for name, found in self.fields.items()
        }
        return replace(self, fields=fields)


class Statistics:
    r"""Statistics of the samples of a window, for some parameters.

    The gradient of the window is $\bar g = \alpha \sum_{mn} u_{mn}$ with the shares $u_{mn}$ that pass $m$ of $M$
    found for its $N_m$ samples. A sample's gradient is $g_{mn} = \alpha M N_m u_{mn}$ and its weight
    $w_{mn} = 1 / (M N_m)$, so that $\bar g$ is the weighted mean.

    Args:
        passes: those of the window that saw any of the parameters.
        params: restrict the statistics to these.
        share: $\alpha$, 1/M if the window's loss is the mean over the passes, 1 if it is their sum.
    """

    def __init__(self, passes: list[BackwardPass], params: frozenset[Parameter], share: float) -> None:
        self._passes, self._share = passes, share
        self.covered = frozenset().union(*(backward.covered & params for backward in passes))

    @property
    def loss(self) -> Tensor | None:
        r"""$\alpha \sum_m \ell_m$, []."""
        losses = [wide(backward.loss) / backward.factor for backward in self._passes if backward.loss is not None]
        return self._share * torch.stack(losses).sum() if losses else None

    @cached_property
    def sq_norms(self) -> Tensor:
        r"""$\|g_n\|^2$, [N]."""
        return _joined([_total(found) * self._sample_factor(backward, found) ** 2 for backward, found in self._norms])

    @cached_property
    def _norms(self) -> list[tuple[BackwardPass, list[Tensor]]]:
        return self._found("batch_l2")

    @cached_property
    def _sizes(self) -> list[int]:
        return [found[0].numel() for _, found in self._norms]

    @property
    def concentration(self) -> float:
        r"""$\sum_n w_n^2$."""
        return sum(1 / size for size in self._sizes if size) / max(len(self._passes), 1) ** 2

    def mean(self, values: Tensor | Numbers) -> Any:
        r"""$\sum_n w_n v_n$, [], for v of shape [N]."""
        stops = accumulate(self._sizes)
        means = [values[stop - size : stop].sum() / size for size, stop in zip(self._sizes, stops) if size]
        return sum(means) / max(len(self._passes), 1)

    def dots(self, vectors: Mapping[Parameter, Tensor]) -> Tensor:
        r"""$g_n \cdot v$, [N]: the op is applied to v; no per-sample gradient is formed."""
        parts = []
        for backward, found in self._found("jacobian_grad"):
            products = [jacobian.dot(vectors[jacobian.parameter])[0] for jacobian in found]
            parts.append(_total(products) * self._sample_factor(backward, products))
        return _joined(parts)

    def second_moments(self) -> dict[Parameter, Tensor]:
        r"""$\sum_n w_n g_n^2$ entry by entry, of the parameters' shapes."""
        total: dict[Parameter, Tensor] = {}
        for backward in self._passes:
            if not backward.fields.get("sum_grad_squared"):
                continue
            norms = [*backward.fields["batch_l2"].values()]
            factor = self._sample_factor(backward, norms) ** 2 / (len(self._passes) * norms[0].numel())
            for param, found in backward.fields.get("sum_grad_squared", {}).items():
                if param in self.covered:
                    total[param] = total.get(param, 0) + wide(found) * factor
        return total

    def curvatures(self, savefield: str) -> dict[Parameter, Tensor]:
        r"""A curvature of the window's loss, $\alpha \sum_m C_m$; for eigenvalues an upper bound of that."""
        total: dict[Parameter, Tensor] = {}
        for backward in self._passes:
            for param, found in backward.fields.get(savefield, {}).items():
                if param in self.covered:
                    total[param] = total.get(param, 0) + self._share * wide(found)
        return total

    def _found(self, savefield: str) -> list[tuple[BackwardPass, list[Any]]]:
        pairs = [
            (backward, [x for p, x in backward.fields.get(savefield, {}).items() if p in self.covered])
            for backward in self._passes
        ]
        return [(backward, found) for backward, found in pairs if found]

    def _sample_factor(self, backward: BackwardPass, samples: Sequence[Tensor]) -> Tensor | float:
        return self._share * len(self._passes) * samples[0].numel() / backward.factor


class Window:
    """The backward passes since the gradients were last set to zero."""

    def __init__(self) -> None:
        self._passes: list[BackwardPass] = []

    def __len__(self) -> int:
        return len(self._passes)

    def __contains__(self, param: Parameter) -> bool:
        return any(param in backward.covered for backward in self._passes)

    def add(self, backward: BackwardPass) -> None:
        self._passes.append(backward)

    def forget(self, params: Iterable[Parameter]) -> None:
        """Drop parameters whose gradient was set to zero, and passes that then have nothing left."""
        params = frozenset(params)
        self._passes = [backward.without(params) for backward in self._passes if not backward.covered <= params]

    def statistics(self, params: Iterable[Parameter], share: float) -> Statistics:
        """Combine the passes; see `Statistics`."""
        params = frozenset(params)
        passes = [backward for backward in self._passes if not backward.covered.isdisjoint(params)]
        return Statistics(passes or self._passes, params, share)


def _joined(parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def _total(vectors: list[Tensor]) -> Tensor:
    """Sum of [N], in the widest type."""
    stack = torch.stack(vectors)
    return stack.sum(0, dtype=torch.float32 if stack.device.type == "mps" else torch.float64)


def wide(tensor: Tensor) -> Tensor:
    """Float64 where the device has it: the variance is a difference of near-equal numbers."""
    return tensor.float() if tensor.device.type == "mps" else tensor.double()
