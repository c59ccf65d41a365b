"""Products with curvature matrices of all parameters at once, off-diagonal blocks included; matrix-free."""

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
    r""":math:`v \mapsto H v` of the loss for vectors with one tensor per parameter.

    Cost: a backward pass with a graph once, and one more backward pass per product (Pearlmutter,
        *Fast exact
    multiplication by the Hessian*, Neural Computation 1994).
    """
    with differentiable(fused([passes.loss])):
        found = torch.autograd.grad(
            passes.loss, params, passes.seed, create_graph=True, allow_unused=True
        )
    gradients = [(i, g) for i, g in enumerate(found) if g is not None and g.requires_grad]

    def product(vectors: Vectors) -> list[Tensor]:
        if not gradients:
            return [torch.zeros_like(p) for p in params]
        outputs, seeds = [g for _, g in gradients], [vectors[i] for i, _ in gradients]
        return _dense(
            params,
            torch.autograd.grad(outputs, params, seeds, retain_graph=True, allow_unused=True),
        )

    return product


def ggn_product(passes: Passes, params: Sequence[Tensor]) -> Product:
    r""":math:`v \mapsto \sum_n J_n^\top H_n J_n v`, the generalised Gauss-Newton matrix of the loss.

    Cost: a backward pass with a graph once, and two more backward passes per product (Schraudolph,
        *Fast curvature
    matrix-vector products for second-order gradient descent*, Neural Computation 2002).
    """
    parts = [(len(part.edges), part.multiplication()) for part in passes.parts]
    edges = [edge for part in passes.parts for edge in part.edges]
    dual = [
        torch.ones_like(like, requires_grad=True) for part in passes.parts for like in part.likes
    ]
    with differentiable(fused(edges)):
        found = torch.autograd.grad(edges, params, dual, create_graph=True, allow_unused=True)
    transposed = [(i, t) for i, t in enumerate(found) if t is not None]

    def product(vectors: Vectors) -> list[Tensor]:
        outputs, seeds = [t for _, t in transposed], [vectors[i] for i, _ in transposed]
        images = iter(
            _dense(
                dual,
                torch.autograd.grad(outputs, dual, seeds, retain_graph=True, allow_unused=True),
            )
        )
        out = [image for size, times in parts for image in times([*islice(images, size)])]
        return _dense(
            params, torch.autograd.grad(edges, params, out, retain_graph=True, allow_unused=True)
        )

    return product


def _dense(like: Sequence[Tensor], found: Sequence[Tensor | None]) -> list[Tensor]:
    return [
        torch.zeros_like(p) if x is None else x.detach() for p, x in zip(like, found, strict=True)
    ]
