r"""Products with blocks of curvature matrices, one block per parameter.

`p.hmp(V)` and its siblings are functions: `[V, *p] -> [V, *p]` and `[*p] -> [*p]`. They keep
the graph of the loss, see the parameters as they were at the backward pass, and free both when the
attribute is deleted or overwritten. A graph cannot be saved: in a model that was saved and loaded
they say that they are gone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_curv.differentiation.internal_pass import internal_pass
from lightning_curv.differentiation.twice import differentiable, fused
from lightning_curv.errors import UnsupportedError, differentiating_twice
from lightning_curv.extensions.base import GraphExtension
from lightning_curv.kernels.onednn import fast_products
from lightning_curv.passes.passes import Passes
from lightning_curv.recording.records import edge_of
from lightning_curv.second_derivatives.local_curvature import Residual
from lightning_curv.second_derivatives.residuals import residuals
from lightning_curv.second_derivatives.single_use import SingleUse, single_uses
from lightning_curv.second_derivatives.snapshot import Snapshot


class _Product(GraphExtension):
    """One product per parameter, as a function that is left on it."""

    keeps_graph = True
    needs_samples = False
    batchwise = True

    def __init__(self, savefield: str) -> None:
        self.savefield = savefield

    def compute(self, passes: Passes) -> dict[Tensor, Any]:
        """Make one function per parameter."""
        parameters = passes.tape.all_parameters
        uses = single_uses(passes)
        # Products come after an optimizer's step, perhaps: values that they read are kept.
        needed = [p for p in parameters if p not in uses or uses[p].needs_value]
        snapshot = Snapshot(needed)
        matrix = self._prepare(passes, uses)
        return {p: _Block(p, snapshot, matrix, self) for p in parameters}

    @abstractmethod
    def _prepare(self, passes: Passes, uses: Mapping[Tensor, SingleUse]) -> _Matrix:
        """Make what all parameters share."""


class _Matrix(ABC):
    """The blocks of a curvature matrix; what depends on no vector is found at the first product.

    Args:
        passes: The graph.
        uses: The parameters that are used once, and where.
    """

    def __init__(self, passes: Passes, uses: Mapping[Tensor, SingleUse]) -> None:
        self._uses = uses
        self._multiplies = passes.multiplies

    def _grad(
        self,
        outputs: Any,
        inputs: Any,
        seeds: Any,
        create_graph: bool = False,
    ) -> Sequence[Tensor | None]:
        again: Sequence[Node] = ()
        if create_graph:
            again = fused(outputs if isinstance(outputs, list) else [outputs])
        with fast_products(self._multiplies), differentiable(again):
            return torch.autograd.grad(
                outputs,
                inputs,
                seeds,
                retain_graph=True,
                create_graph=create_graph,
                allow_unused=True,
            )

    @abstractmethod
    def products(self, parameter: Tensor, vectors: Tensor) -> list[Tensor]:
        """Multiply the parameter's block by every vector."""

    @abstractmethod
    def _backpropagated(self, edges: Sequence[GradientEdge]) -> Sequence[Tensor | None]:
        """Make the cotangents that are differentiated, at `edges`, with a graph."""

    @cached_property
    def _cotangents(self) -> dict[GradientEdge, Tensor | None]:
        edges = list(dict.fromkeys(use.edge for use in self._uses.values()))
        if edges:
            return dict(zip(edges, self._backpropagated(edges), strict=True))
        return {}

    def _gradient(self, parameter: Tensor) -> tuple[SingleUse | None, Tensor | None]:
        """Find what is differentiated for the parameter's block.

        It is the cotangent at the parameter's only use, if that can be applied to vectors; else the
        gradient by the parameter itself.
        """
        use = self._uses.get(parameter)
        if use is None:
            (gradient,) = self._backpropagated([edge_of(parameter)])
            return None, gradient
        cotangent = self._cotangents[use.edge]
        if use.linear or cotangent is None:
            return use, cotangent
        (gradient,) = self._grad(use.edge, parameter, cotangent, create_graph=True)
        return None, gradient


class _Block:
    """One parameter's block as a function of vectors, as in `p.hmp(V)`.

    It pickles and copies to a `_Gone`.
    """

    def __init__(
        self,
        parameter: Tensor,
        snapshot: Snapshot,
        matrix: _Matrix,
        extension: _Product,
    ) -> None:
        self._parameter = parameter
        self._snapshot = snapshot
        self._matrix = matrix
        self._name = repr(extension)
        self._savefield = extension.savefield

    def __call__(self, vectors: Tensor) -> Tensor:
        """Apply the block to one vector of the parameter's shape or to several."""
        shape = self._parameter.shape
        single = vectors.shape == shape
        if not single and vectors.shape[1:] != shape:
            sizes = ", ".join(map(str, shape))
            raise ValueError(
                f"Expected vectors of shape [{sizes}] or [V, {sizes}], found {list(vectors.shape)}."
            )
        with (
            torch.enable_grad(),
            self._snapshot.restored(),
            internal_pass(),
            differentiating_twice(),
        ):
            if single:
                several = vectors.detach()[None]
            else:
                several = vectors.detach()
            rows = self._matrix.products(self._parameter, several)
        if single:
            return rows[0]
        if not rows:
            return torch.zeros_like(vectors)
        return rows[0][None] if len(rows) == 1 else torch.stack(rows)  # one row needs no copy

    def __reduce__(self) -> tuple[type[_Gone], tuple[str, str]]:
        return _Gone, (self._name, self._savefield)


class _Gone:
    """What a `_Block` is once it was saved or copied: the graph stays behind."""

    def __init__(self, name: str, savefield: str) -> None:
        self._name = name
        self._savefield = savefield

    def __call__(self, vectors: Tensor) -> Tensor:
        raise RuntimeError(
            f"`{self._savefield}` needs the graph of a loss, found one that was saved or copied, "
            f"which graphs are not. Run `loss.backward()` inside `curvature({self._name})` again, "
            "or delete the attribute."
        )


class HMP(_Product):
    """Products with the parameter's block of the Hessian of the loss, in `hmp`.

    `p.hmp(V)` takes vectors `[V, *p]` or `[*p]` and returns as many; the scale of the loss is
    included. Exact for any differentiable network and loss. Cost: a backward pass with a graph at
    the first call, and two passes per vector between the parameter's op and the loss (Pearlmutter,
    *Fast exact multiplication by the Hessian*, Neural Computation 1994); one more to the parameter
    per call where it is used several times.

    Args:
        savefield: Name of the parameter's attribute.

    Example:
        >>> import torch
        >>> from lightning_curv import HMP, curvature
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> with curvature(HMP()):
        ...     output = layer(torch.tensor([[1.0, 2.0]]))
        ...     torch.nn.functional.mse_loss(output, torch.zeros(1, 1)).backward()
        >>> layer.weight.hmp(torch.tensor([[1.0, 0.0]]))
        tensor([[2., 4.]])
    """

    independent = False
    needs_likelihood = False

    def __init__(self, savefield: str = "hmp") -> None:
        super().__init__(savefield)

    def _prepare(self, passes: Passes, uses: Mapping[Tensor, SingleUse]) -> _Matrix:
        return _Hessian(passes, uses)


class _Hessian(_Matrix):
    """The Hessian, as the derivative of the gradient."""

    def __init__(self, passes: Passes, uses: Mapping[Tensor, SingleUse]) -> None:
        super().__init__(passes, uses)
        self._loss = passes.loss
        self._seed = passes.seed

    def _backpropagated(self, edges: Sequence[GradientEdge]) -> Sequence[Tensor | None]:
        return self._grad(self._loss, edges, self._seed, create_graph=True)

    def products(self, parameter: Tensor, vectors: Tensor) -> list[Tensor]:
        use, gradient = self._gradient(parameter)
        if gradient is None or not gradient.requires_grad:
            return [torch.zeros_like(parameter) for _ in vectors]
        by = edge_of(parameter) if use is None else use.edge
        rows = []
        for vector in vectors:
            (row,) = self._grad(gradient, by, vector if use is None else use.forward(vector))
            if row is None:
                rows.append(torch.zeros_like(parameter))
            else:
                rows.append(row if use is None else use.transposed(row))
        return rows


class GGNMP(_Product):
    """Products with the parameter's block of the generalised Gauss-Newton matrix, in `ggnmp`.

    `p.ggnmp(V)` takes vectors `[V, *p]` or `[*p]` and returns as many; the scale of the loss
    is included. Cost: a backward pass with a graph at the first call, and two passes per vector
    between the parameter's op and the loss (Schraudolph, *Fast curvature matrix-vector products for
    second-order gradient descent*, Neural Computation 2002); one more to the parameter per call
    where it is used several times. No Jacobian is formed.

    Args:
        savefield: Name of the parameter's attribute.

    Raises:
        UnsupportedError: In `backward`: a known loss function has a negative weight, so that the
            matrix would have negative eigenvalues.

    Example:
        >>> import torch
        >>> from lightning_curv import GGNMP, curvature
        >>> w = torch.nn.Parameter(torch.tensor([2.0]))
        >>> with curvature(GGNMP()):
        ...     output = (torch.tensor([[1.0]]) * w).square()
        ...     torch.nn.functional.mse_loss(output, torch.ones(1, 1)).backward()
        >>> w.ggnmp(torch.tensor([1.0]))  # 2 (2 w)², without the second derivative of the square
        tensor([32.])
    """

    def __init__(self, savefield: str = "ggnmp") -> None:
        super().__init__(savefield)

    def _prepare(self, passes: Passes, uses: Mapping[Tensor, SingleUse]) -> _Matrix:
        return _Curvatures(passes, uses, [])


class PCHMP(GGNMP):
    r"""Products with the parameter's block of the positive-curvature Hessian, in `pchmp`.

    `p.pchmp(V)` takes vectors `[V, *p]` or `[*p]` and returns as many. The Hessian's residual
    of each nonlinearity, $\varphi''(z)\,g$ where it is elementwise, else the eigenvalues of
    its per-sample residual matrix, is made non-negative (Chen et al., *Positive curvature Hessian*;
    Dangel, Harmeling & Hennig, AISTATS 2020, section 4). The nonlinearities are the nodes of the
    graph: a fused attention kernel is one, attention written out is several, and their matrices
    differ. At the network's output it has the curvature of the loss that the GGN has: of known loss
    functions, whose weights must not be negative, their own, of others the positive part.

    Args:
        savefield: Name of the parameter's attribute.
        modify: `"clip"` sets negative residuals to zero, `"abs"` takes their absolute value.

    Raises:
        ValueError: `modify` is neither.
        UnsupportedError: In `backward`: a known loss function has a negative weight.

    Example:
        >>> import torch
        >>> from lightning_curv import PCHMP, curvature
        >>> w = torch.nn.Parameter(torch.tensor([2.0]))
        >>> with curvature(PCHMP()):
        ...     output = (torch.tensor([[1.0]]) * w).square()
        ...     torch.nn.functional.mse_loss(output, 5 * torch.ones(1, 1)).backward()
        >>> w.pchmp(torch.tensor([1.0]))  # the residual 2 · 2 (w² - 5) is negative: the GGN is left
        tensor([32.])
    """

    needs_samples = True

    def __init__(self, savefield: str = "pchmp", modify: Literal["clip", "abs"] = "clip") -> None:
        super().__init__(savefield)
        if modify not in ("clip", "abs"):
            raise ValueError(f"`modify` must be 'clip' or 'abs', found {modify!r}.")
        self.modify = modify

    def _prepare(self, passes: Passes, uses: Mapping[Tensor, SingleUse]) -> _Matrix:
        return _Curvatures(passes, uses, [r.positive(self.modify) for r in residuals(passes)])


@dataclass(frozen=True)
class _Part:
    """A curvature matrix C at some places of the graph."""

    edges: Sequence[GradientEdge]
    shapes: Sequence[torch.Size]
    product: Callable[[Sequence[Tensor]], list[Tensor]]


class _Curvatures(_Matrix):
    """Σ Jᵀ C J over places of the graph: losses, and nonlinear nodes with their residuals."""

    def __init__(
        self,
        passes: Passes,
        uses: Mapping[Tensor, SingleUse],
        found: Sequence[Residual],
    ) -> None:
        super().__init__(passes, uses)
        self._loss = passes.loss  # keeps the graph
        self._parts = [
            _Part(part.edges, [like.shape for like in part.likes], part.multiplication())
            for part in passes.parts
        ]
        self._parts += [
            _Part(residual.edges, residual.shapes, residual.product) for residual in found
        ]
        self._edges = [edge for part in self._parts for edge in part.edges]

    @cached_property
    def _dual(self) -> list[Tensor]:
        """Make what the backpropagated cotangents are linear in, and are differentiated by.

        Its values do not matter, but where all are zero no lost graph is noticed.
        """
        one = self._loss.detach().new_ones(())
        return [one.expand(shape).requires_grad_() for part in self._parts for shape in part.shapes]

    def _backpropagated(self, edges: Sequence[GradientEdge]) -> Sequence[Tensor | None]:
        return self._grad(self._edges, edges, self._dual, create_graph=True)

    def products(self, parameter: Tensor, vectors: Tensor) -> list[Tensor]:
        use, transposed = self._gradient(parameter)
        if transposed is not None and not transposed.requires_grad and bool(transposed.any()):
            raise UnsupportedError(
                "Products with the GGN differentiate a backward pass by its seed, found an op "
                "whose backward pass leaves no graph (a custom `Function`, or a sparse op). Use "
                "`DiagGGNExact` or `KFLR`, which need none."
            )
        if transposed is None or not transposed.requires_grad:
            return [torch.zeros_like(parameter) for _ in vectors]
        by = edge_of(parameter) if use is None else use.edge
        rows = []
        for vector in vectors:
            seed = vector if use is None else use.forward(vector)
            row = self._pulled(self._grad(transposed, self._dual, seed), by)
            del seed  # before more is allocated
            rows.append(row if use is None else use.transposed(row))
        return rows

    def _pulled(self, images: Sequence[Tensor | None], by: GradientEdge) -> Tensor:
        """Make Jᵀ C u, for u = J v at all places; u is `None` at those that v does not reach."""
        edges: list[GradientEdge] = []
        seeds: list[Tensor] = []
        remaining = iter(images)
        for part in self._parts:
            own = list(islice(remaining, len(part.edges)))
            reached = next((image for image in own if image is not None), None)
            if reached is None:
                continue
            full = [
                reached.new_zeros(shape) if image is None else image
                for image, shape in zip(own, part.shapes, strict=True)
            ]
            edges += part.edges
            seeds += part.product(full)
        (row,) = self._grad(edges, by, seeds)
        assert row is not None
        return row
