"""Weight normalization with the right second derivative.

torch's own graph of `torch._weight_norm` takes the norm as given when it is differentiated twice,
so its Hessian is wrong (and not even symmetric). Under `record` the op leaves another node: values
and first derivatives are torch's, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class WeightNorm(torch.autograd.Function):
    """`g v / ‖v‖` with the norm over all axes but `dim`, the first or the last one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, g: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        return torch._weight_norm_interface(v, g, dim)

    @staticmethod
    def setup_context(
        ctx: Any,
        inputs: tuple[Tensor, Tensor, int],
        output: tuple[Tensor, Tensor],
    ) -> None:
        v, g, ctx.dim = inputs
        ctx.save_for_backward(v, g, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
        v, g, norms = ctx.saved_tensors
        if not torch.is_grad_enabled():
            first = torch.ops.aten._weight_norm_interface_backward(
                cotangent.contiguous(),
                v,
                g,
                norms,
                ctx.dim,
            )
            return (*first, None)
        axes = [axis for axis in range(v.ndim) if axis != ctx.dim]
        norms = torch.linalg.vector_norm(v, dim=axes, keepdim=True)
        along = (cotangent * v).sum(axes, keepdim=True) / norms
        return g / norms * (cotangent - v * along / norms), along, None


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """`torch._weight_norm`; by torch itself where that is made of ops with two derivatives."""
    if v.dtype in (torch.float16, torch.bfloat16) or dim not in (0, v.ndim - 1):
        return torch._weight_norm(v, g, dim)
    return WeightNorm.apply(v.contiguous(), g.contiguous(), dim)[0]
