"""A clip norm for every parameter group."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_curv.optimizers.privacy.clipping import AtMostOne
from lightning_curv.optimizers.settings import require_positive


class PerGroupClipping(AtMostOne):
    r"""Every parameter group on its own, by a norm of its own.

    The factor of sample i in group g is $c_{ig} = \min(1, C_g / \|g_{ig}\|)$. The
    contribution of a sample is then bounded by $C = \sqrt{\sum_g C_g^2}$, and the noise of
    all groups is σC. This is for parts of a network whose gradients differ in size, such as a head
    and a backbone. McMahan, Ramage, Talwar & Zhang, *Learning Differentially Private Recurrent
    Language Models*, ICLR 2018, section 3.

    Args:
        optimizer: Its parameter groups may have an entry `"clip_norm"`, $C_g$.
        clip_norm: $C_g$ of groups without one.

    Raises:
        ValueError: A norm is not positive.

    Example:
        >>> head, backbone = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        >>> groups = [
        ...     {"params": head.parameters(), "clip_norm": 3.0},
        ...     {"params": backbone.parameters()},
        ... ]
        >>> PerGroupClipping(torch.optim.SGD(groups), clip_norm=4.0).clip_norm
        5.0
    """

    def __init__(self, optimizer: Optimizer, clip_norm: float = 1.0) -> None:
        # The optimizer, not its list of groups, which is replaced when a checkpoint is loaded.
        self._optimizer = optimizer
        self._default = 1.0
        self.set_clip_norm(clip_norm)
        self._norms()

    def set_clip_norm(self, clip_norm: float) -> None:
        """Change the norm of groups without one of their own."""
        require_positive("clip_norm", clip_norm)
        self._default = float(clip_norm)

    def _norms(self) -> list[float]:
        norms = [
            float(group.get("clip_norm", self._default)) for group in self._optimizer.param_groups
        ]
        for norm in norms:
            require_positive("clip_norm", norm)
        return norms

    @property
    def clip_norm(self) -> float:  # type: ignore[override]
        """C, the bound over all groups together."""
        return math.hypot(*self._norms())

    def factors(self, norms: Tensor, parameters: int) -> Tensor:
        """Refuse: only `factors_of` knows which parameters are of which group.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "PerGroupClipping needs to know the parameters; call `factors_of`."
        )

    def factors_of(
        self, norms: Tensor, rows: Sequence[Tensor], parameters: Sequence[Tensor]
    ) -> Tensor:
        """Factors of the per-sample gradients, `[P, N]`.

        A sample with any norm that is not finite counts nowhere.
        """
        group_of_parameter = {
            parameter: number
            for number, group in enumerate(self._optimizer.param_groups)
            for parameter in group["params"]
        }
        group_of_row = torch.tensor(
            [group_of_parameter[parameter] for parameter in rows], device=norms.device
        )
        limits = norms.new_tensor(self._norms())
        # Over the parameters of a group together, not one by one.
        norms_of_groups = torch.stack(
            [norms[group_of_row == number].norm(dim=0) for number in range(len(limits))]
        )
        factors_of_groups = (limits[:, None] / norms_of_groups).clamp(max=1)
        factors = factors_of_groups[group_of_row]
        return factors.where(norms.isfinite().all(0), torch.zeros_like(factors))
