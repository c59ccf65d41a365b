"""Brute force for Hessian quantities: plain double backward in float64, independent of the library."""

from __future__ import annotations

from unittest.mock import patch

import torch
from oracle import Values, gradient, trainable
from torch import Tensor


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """g v / ‖v‖ in ops that torch differentiates twice; the second derivative of its own op is wrong."""
    axes = [axis for axis in range(v.ndim) if axis != dim]  # -1: all of them
    return v * (g / v.square().sum(axes, keepdim=True).sqrt())


def hessian(problem) -> Values:
    """[N, P, P]: second derivative of the n-th summand, one parameter at a time."""
    params = trainable(problem.model)
    with patch.object(torch, "_weight_norm", weight_norm):
        output = problem.model(problem.X)
    blocks: dict[str, list[Tensor]] = {name: [] for name in params}
    for n in range(len(output)):
        summand = problem.loss.summand(output, problem.y, n)
        first = torch.autograd.grad(
            summand, list(params.values()), create_graph=True, allow_unused=True
        )
        for (name, p), g in zip(params.items(), first):
            if g is None or not g.requires_grad:
                blocks[name].append(torch.zeros(p.numel(), p.numel(), dtype=p.dtype))
            else:
                blocks[name].append(
                    torch.stack([gradient(entry, [p])[0].flatten() for entry in g.flatten()])
                )
    return {name: torch.stack(rows) for name, rows in blocks.items()}


def diag_hessian_batch(problem) -> Values:
    params = trainable(problem.model)
    return {
        name: torch.stack([block.diagonal().reshape(params[name].shape) for block in blocks])
        for name, blocks in hessian(problem).items()
    }


def diag_hessian(problem) -> Values:
    return {name: diagonal.sum(0) for name, diagonal in diag_hessian_batch(problem).items()}


def residual_part(
    summand, preactivations: list[Tensor], second: list, parameter: Tensor, modify
) -> Tensor:
    """Σ over nonlinearities of Jᵀ diag(modify(φ''(z) g)) J for one summand, every matrix written out.

    `preactivations`: z of this sample, each followed by a recorded output; `second`: φ''(z)·g per
        entry.
    """
    total = torch.zeros(parameter.numel(), parameter.numel(), dtype=parameter.dtype)
    for z, residual in zip(preactivations, second):
        J = torch.stack([gradient(entry, [parameter])[0].flatten() for entry in z.flatten()])
        total += J.T @ torch.diag(modify(residual.flatten())) @ J
    return total
