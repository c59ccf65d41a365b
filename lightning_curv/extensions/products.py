r"""Products with blocks of curvature matrices, one block per parameter.

``p.hmp(V)`` and its siblings are functions: ``[V, *p] -> [V, *p]`` and ``[*p] -> [*p]``. They keep the graph of the
loss, see the parameters as they were at the backward pass, and free both when the attribute is deleted or
overwritten.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_curv.extensions.base import GraphExtension
from lightning_curv.local_curvature import Residual
from lightning_curv.losses import Likelihood
from lightning_curv.own_passes import unheard
from lightning_curv.passes import Passes, parameters
from lightning_curv.residuals import residuals
from lightning_curv.snapshot import Snapshot


class _Product(GraphExtension):
    """A product per parameter."""

    keeps_graph = True

    def __init__(self, savefield: str) -> None:
        self.savefield = savefield

    def compute(self, passes: Passes) -> dict[Tensor, Any]:
        """One function per parameter."""
        found = list(dict.fromkeys(p for use in passes.tape.uses.values() for p in parameters(use)))
        snapshot, curvature = Snapshot(found), self._prepare(passes)
        return {p: partial(_rows, p, snapshot, partial(self._product, curvature, p)) for p in found}

    @abstractmethod
    def _prepare(self, passes: Passes) -> Any:
        """What all parameters share."""

    @abstractmethod
    def _product(self, curvature: Any, parameter: Tensor, vectors: Tensor) -> list[Tensor]:
        """The block times every vector."""


def _rows(parameter: Tensor, snapshot: Snapshot, product: Any, vectors: Tensor) -> Tensor:
    """Apply a product to one vector of the parameter's shape or to several."""
    single = vectors.shape == parameter.shape
    if not single and vectors.shape[1:] != parameter.shape:
        shape = ", ".join(map(str, parameter.shape))
        raise ValueError(f"Expected vectors of shape [{shape}] or [V, {shape}], found {list(vectors.shape)}.")
    with torch.enable_grad(), snapshot.restored(), unheard():
        rows = product(vectors.detach()[None] if single else vectors.detach())
    result = torch.stack(rows) if rows else torch.zeros_like(vectors)
    return result[0] if single else result


class HMP(_Product):
    """Products with the parameter's block of the Hessian of the loss, exact for any differentiable network and loss.

    Cost of a call: a backward pass with a graph, and one more backward pass per vector (Pearlmutter, *Fast exact
    multiplication by the Hessian*, Neural Computation 1994).

    Args:
        savefield: Name of the parameter's attribute.

    Example:
        >>> import torch
        >>> from lightning_curv import HMP, curvature
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> with curvature(HMP()):
        ...     loss = torch.nn.functional.mse_loss(layer(torch.tensor([[1.0, 2.0]])), torch.zeros(1, 1))
        ...     loss.backward()
        >>> layer.weight.hmp(torch.tensor([[1.0, 0.0]]))
        tensor([[2., 4.]])
    """

    independent = False
    needs_likelihood = False

    def __init__(self, savefield: str = "hmp") -> None:
        super().__init__(savefield)

    def _prepare(self, passes: Passes) -> tuple[Tensor, Tensor]:
        return passes.loss, passes.seed

    def _product(self, curvature: tuple[Tensor, Tensor], parameter: Tensor, vectors: Tensor) -> list[Tensor]:
        loss, seed = curvature
        (gradient,) = torch.autograd.grad(loss, parameter, seed, create_graph=True)
        if not gradient.requires_grad:
            return [torch.zeros_like(parameter) for _ in vectors]
        rows = [torch.autograd.grad(gradient, parameter, v, retain_graph=True, allow_unused=True)[0] for v in vectors]
        return [torch.zeros_like(parameter) if row is None else row for row in rows]


class GGNMP(_Product):
    """Products with the parameter's block of the generalised Gauss-Newton matrix.

    Cost of a call: three backward passes per vector (Schraudolph, *Fast curvature matrix-vector products for
    second-order gradient descent*, Neural Computation 2002). No Jacobian is formed.

    Args:
        savefield: Name of the parameter's attribute.
    """

    def __init__(self, savefield: str = "ggnmp") -> None:
        super().__init__(savefield)

    def _prepare(self, passes: Passes) -> _Curvatures:
        return _Curvatures(passes, [])

    def _product(self, curvature: _Curvatures, parameter: Tensor, vectors: Tensor) -> list[Tensor]:
        return [curvature.product(parameter, v) for v in vectors]


class PCHMP(GGNMP):
    r"""Products with the parameter's block of the positive-curvature Hessian.

    The Hessian's residual of each nonlinearity, :math:`\varphi''(z)\,g` where it is elementwise, else the eigenvalues
    of its per-sample residual matrix, is made non-negative (Chen et al., *Positive curvature Hessian*; Dangel,
    Harmeling & Hennig, AISTATS 2020, section 4).

    Args:
        savefield: Name of the parameter's attribute.
        modify: ``"clip"`` sets negative residuals to zero, ``"abs"`` takes their absolute value.
    """

    def __init__(self, savefield: str = "pchmp", modify: Literal["clip", "abs"] = "clip") -> None:
        super().__init__(savefield)
        if modify not in ("clip", "abs"):
            raise ValueError(f"`modify` must be 'clip' or 'abs', found {modify!r}.")
        self.modify = modify

    def _prepare(self, passes: Passes) -> _Curvatures:
        return _Curvatures(passes, [r.positive(self.modify) for r in residuals(passes)])


class _Curvatures:
    """Curvature matrices at places of the graph: the losses', and residuals of nonlinear nodes."""

    def __init__(self, passes: Passes, found: Sequence[Residual]) -> None:
        self._loss = passes.loss  # keeps the graph
        self._losses: list[tuple[GradientEdge, Likelihood]] = [
            (call.input, passes.likelihood(node)) for node, call in passes.tape.losses.items()
        ]
        self._inputs = [call.arguments["input"] for call in passes.tape.losses.values()]
        self._residuals = found

    def product(self, parameter: Tensor, vector: Tensor) -> Tensor:
        """Σ Jᵀ C J v over all places."""
        edges = [edge for edge, _ in self._losses] + [edge for r in self._residuals for edge in r.edges]
        shapes = [v.shape for v in self._inputs] + [shape for r in self._residuals for shape in r.shapes]
        dual = [vector.new_zeros(shape, requires_grad=True) for shape in shapes]
        (transposed,) = torch.autograd.grad(edges, parameter, dual, create_graph=True, allow_unused=True)
        if transposed is None:
            return torch.zeros_like(parameter)
        forward = torch.autograd.grad(transposed, dual, vector, allow_unused=True)
        images = [torch.zeros_like(d) if u is None else u for u, d in zip(forward, dual, strict=True)]
        out = [likelihood.product(u) for (_, likelihood), u in zip(self._losses, images, strict=False)]
        rest = images[len(out) :]
        for residual in self._residuals:
            out += residual.product(rest[: len(residual.edges)])
            rest = rest[len(residual.edges) :]
        return torch.autograd.grad(edges, parameter, out, retain_graph=True)[0]
