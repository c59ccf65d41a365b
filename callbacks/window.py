"""Per-sample statistics of the backward passes that make one optimizer step."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


@dataclass(frozen=True)
class BackwardPass:
    """What one backward pass left on the parameters.

    Args:
        fields: results by savefield and parameter.
        factor: of the loss: first-order results carry it, curvature does not.
        loss: as `training_step` returned it, [].
    """

    fields: dict[str, dict[Parameter, Any]] = field(default_factory=dict)
    factor: Tensor | float = 1.0
    loss: Tensor | None = None

    @property
    def covered(self) -> set[Parameter]:
        """The parameters that something was found for."""
        return {param for found in self.fields.values() for param in found}


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

    def __init__(self, passes: list[BackwardPass], params: Collection[Parameter], share: float) -> None:
        self._passes, self._share = passes, share
        self.covered = {p for backward in passes for p in backward.covered if p in params}

    @cached_property
    def loss(self) -> Tensor | None:
        r"""$\alpha \sum_m \ell_m$, []."""
        losses = [wide(backward.loss) for backward in self._passes if backward.loss is not None]
        return self._share * torch.stack(losses).sum() if losses else None

    @cached_property
    def sq_norms(self) -> Tensor:
        r"""$\|g_n\|^2$, [N]."""
        parts = [
            wide(stacked(found)).sum(0) * self._sample_factor(backward, len(found[0])) ** 2
            for backward, found in self._found("batch_l2")
        ]
        return _joined(parts) if parts else torch.zeros(0, dtype=torch.float64)

    @cached_property
    def weights(self) -> Tensor:
        """$w_n$, [N]; they add up to one."""
        sizes = [len(found[0]) for _, found in self._found("batch_l2")]
        parts = [self.sq_norms.new_full((size,), 1 / max(len(self._passes) * size, 1)) for size in sizes]
        return _joined(parts) if parts else self.sq_norms.new_zeros(0)

    def dots(self, vectors: Mapping[Parameter, Tensor]) -> Tensor:
        r"""$g_n \cdot v$, [N]: the op is applied to v; no per-sample gradient is formed."""
        parts = []
        for backward, found in self._found("jacobian_grad"):
            products = [wide(jacobian.dot(vectors[jacobian.parameter])[0]) for jacobian in found]
            parts.append(torch.stack(products).sum(0) * self._sample_factor(backward, len(products[0])))
        return _joined(parts)

    def second_moments(self) -> dict[Parameter, Tensor]:
        r"""$\sum_n w_n g_n^2$ entry by entry, of the parameters' shapes."""
        total: dict[Parameter, Tensor] = {}
        for backward in self._passes:
            if not backward.fields.get("sum_grad_squared"):
                continue
            size = self._size(backward)
            factor = self._sample_factor(backward, size) ** 2 / (len(self._passes) * size)
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

    def _sample_factor(self, backward: BackwardPass, size: int) -> Tensor | float:
        return self._share * len(self._passes) * size / backward.factor

    @staticmethod
    def _size(backward: BackwardPass) -> int:
        return len(next(iter(backward.fields["batch_l2"].values())))


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
        for param in params:
            for backward in self._passes:
                for found in backward.fields.values():
                    found.pop(param, None)
        self._passes = [backward for backward in self._passes if backward.covered]

    def statistics(self, params: Iterable[Parameter], share: float) -> Statistics:
        """Combine the passes; see `Statistics`."""
        params = set(params)
        passes = [backward for backward in self._passes if backward.covered & params]
        return Statistics(passes or self._passes, params, share)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def stacked(tensors: list[Tensor]) -> Tensor:
    """Of different precision, as one."""
    if len({tensor.dtype for tensor in tensors}) > 1:
        tensors = [wide(tensor) for tensor in tensors]
    return torch.stack(tensors)


def wide(tensor: Tensor) -> Tensor:
    """Float64 where the device has it: the variance is a difference of near-equal numbers."""
    return tensor.float() if tensor.device.type == "mps" else tensor.double()
