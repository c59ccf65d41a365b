"""Products with curvature matrices of all parameters at once, off-diagonal blocks included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

import torch
from torch import Tensor

from lightning_curv.differentiation.twice import differentiable, fused
from lightning_curv.passes.passes import Passes

Vectors = Sequence[Tensor]
Product = Callable[[Vectors], list[Tensor]]


def all_parameters(passes: Passes) -> list[Tensor]:
    """The parameters that the loss depends on, each once."""
    return passes.tape.all_parameters


def hessian_product(passes: Passes, params: Sequence[Tensor]) -> Product:
    r"""$v \mapsto H v$ of the loss for vectors with one tensor per parameter.

    Cost: a backward pass with a graph once, and one more backward pass per product (Pearlmutter,
    *Fast exact multiplication by the Hessian*, Neural Computation 1994).
    """
    with differentiable(fused([passes.loss])):
        by_parameter = torch.autograd.grad(
            passes.loss,
            params,
            passes.seed,
            create_graph=True,
            allow_unused=True,
        )
    gradients = [(i, g) for i, g in enumerate(by_parameter) if g is not None and g.requires_grad]

    def product(vectors: Vectors) -> list[Tensor]:
        if not gradients:
            return [torch.zeros_like(p) for p in params]
        outputs = [gradient for _, gradient in gradients]
        seeds = [vectors[i] for i, _ in gradients]
        rows = torch.autograd.grad(outputs, params, seeds, retain_graph=True, allow_unused=True)
        return _dense(params, rows)

    return product


def ggn_product(passes: Passes, params: Sequence[Tensor]) -> Product:
    r"""$v \mapsto G v$ with the generalised Gauss-Newton matrix of the loss.

    It is $G v = \sum_n J_n^\top H_n J_n v$. Cost: a backward pass with a graph once, and two
    more backward passes per product (Schraudolph, *Fast curvature matrix-vector products for
    second-order gradient descent*, Neural Computation 2002).
    """
    parts = [(len(part.edges), part.multiplication()) for part in passes.parts]
    edges = [edge for part in passes.parts for edge in part.edges]
    likes = [like for part in passes.parts for like in part.likes]
    # Jᵀu is linear in u, whatever its value; its derivative by u is J.
    dual = [torch.ones_like(like, requires_grad=True) for like in likes]
    with differentiable(fused(edges)):
        by_parameter = torch.autograd.grad(
            edges, params, dual, create_graph=True, allow_unused=True
        )
    transposed = [(i, gradient) for i, gradient in enumerate(by_parameter) if gradient is not None]

    def product(vectors: Vectors) -> list[Tensor]:
        outputs = [gradient for _, gradient in transposed]
        seeds = [vectors[i] for i, _ in transposed]
        forward = torch.autograd.grad(outputs, dual, seeds, retain_graph=True, allow_unused=True)
        images = iter(_dense(dual, forward))
        curved = [image for size, times in parts for image in times([*islice(images, size)])]
        rows = torch.autograd.grad(edges, params, curved, retain_graph=True, allow_unused=True)
        return _dense(params, rows)

    return product


def _dense(like: Sequence[Tensor], found: Sequence[Tensor | None]) -> list[Tensor]:
    """Put zeros in the place of what was not reached."""
    return [
        torch.zeros_like(tensor) if row is None else row.detach()
        for tensor, row in zip(like, found, strict=True)
    ]
