"""Ops that quantities must refuse."""

import torch


class Once(torch.autograd.Function):
    """The sum of squares, without a second derivative."""

    @staticmethod
    def forward(ctx, f):
        ctx.save_for_backward(f)
        return f.square().sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]
