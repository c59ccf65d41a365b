"""Per-sample statistics of the backward passes that make one optimizer step."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter


@dataclass(frozen=True)
class BackwardPass:
    """What one backward pass left on the parameters, for the loss as `training_step` returned it.

    Args:
        sq_norms: squared norm of each sample's share of the gradient, per parameter, [N].
        ggn_traces: trace of each parameter's block of the generalized Gauss-Newton matrix, [].
    """

    sq_norms: dict[Parameter, Tensor]
    ggn_traces: dict[Parameter, Tensor]


@dataclass(frozen=True)
class Statistics:
    r"""Statistics of the samples of a window.

    Args:
        sample_norms: norms of the per-sample gradients $g_n$, [N].
        second_moment: $\sum_n w_n \|g_n\|^2$ with the weights for which $\sum_n w_n g_n$ is the window's gradient, [].
        concentration: $\sum_n w_n^2$, [].
        ggn_trace: trace of the generalized Gauss-Newton matrix, []; None if it was not measured.
        covered: the parameters that contributed.
    """

    sample_norms: Tensor
    second_moment: Tensor
    concentration: Tensor
    ggn_trace: Tensor | None
    covered: Collection[Parameter]


class Window:
    """The backward passes since the gradients were last set to zero."""

    def __init__(self) -> None:
        self._passes: list[BackwardPass] = []

    def __len__(self) -> int:
        return len(self._passes)

    def __contains__(self, param: Parameter) -> bool:
        return any(param in backward.sq_norms for backward in self._passes)

    def add(self, backward: BackwardPass) -> None:
        self._passes.append(backward)

    def forget(self, params: Iterable[Parameter]) -> None:
        """Drop parameters whose gradient was set to zero, and passes that then have nothing left."""
        for param in params:
            for backward in self._passes:
                backward.sq_norms.pop(param, None)
                backward.ggn_traces.pop(param, None)
        self._passes = [backward for backward in self._passes if backward.sq_norms]

    def statistics(self, params: Iterable[Parameter], share: float) -> Statistics | None:
        r"""Combine the passes.

        The gradient of the window is $\bar g = \alpha \sum_{mn} u_{mn}$ with the shares $u_{mn}$ that pass $m$ of $M$
        found for its $N_m$ samples. A sample's gradient is $g_{mn} = \alpha M N_m u_{mn}$ and its weight
        $w_{mn} = 1 / (M N_m)$, so that $\bar g$ is the weighted mean.

        Args:
            params: restrict the statistics to these.
            share: $\alpha$, 1/M if the window's loss is the mean over the passes, 1 if it is their sum.

        Returns:
            None if no parameter was seen.
        """
        params = set(params)
        seen = [[p for p in backward.sq_norms if p in params] for backward in self._passes]
        passes = [(backward, covered) for backward, covered in zip(self._passes, seen) if covered]
        if not passes:
            return None
        sq_norms, weights = [], []
        for backward, covered in passes:
            shares = torch.stack([_wide(backward.sq_norms[p]) for p in covered]).sum(0)
            size = len(passes) * len(shares)
            sq_norms.append(shares * (share * size) ** 2)
            weights.append(torch.full_like(shares, 1 / max(size, 1)))
        sq_norm, weight = torch.cat(sq_norms), torch.cat(weights)
        traces = [_wide(t) for backward, _ in passes for p, t in backward.ggn_traces.items() if p in params]
        return Statistics(
            sample_norms=sq_norm.sqrt(),
            second_moment=weight @ sq_norm,
            concentration=weight @ weight,
            ggn_trace=share * torch.stack(traces).sum() if traces else None,
            covered={p for _, covered in passes for p in covered},
        )


def _wide(tensor: Tensor) -> Tensor:
    """Float64 where the device has it: the variance is a difference of near-equal numbers."""
    return tensor.float() if tensor.device.type == "mps" else tensor.double()
