"""The second derivative of one node of the graph, found by differentiating it twice."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_curv.differentiation.internal_pass import internal_pass, nothing_below
from lightning_curv.differentiation.twice import differentiable
from lightning_curv.errors import UnsupportedError, differentiating_twice
from lightning_curv.kernels.symmetric import eigh
from lightning_curv.passes.passes import Column
from lightning_curv.terms.owners import Owners


def trial_vectors(likes: Sequence[Tensor]) -> list[Tensor]:
    """Vectors that no structure annihilates: no two entries are alike, also of different tensors.

    A function of differences takes no notice of what is added to all of its arguments.
    """
    vectors, start = [], 1
    for like in likes:
        stop = start + like.numel()
        numbers = torch.arange(start, stop, dtype=torch.float64)
        vectors.append(torch.cos(numbers).to(like).reshape(like.shape))
        start = stop
    return vectors


class Residual(ABC):
    """The residual of one node.

    Attributes:
        edges: The node's data inputs.
    """

    edges: Sequence[GradientEdge]

    @property
    @abstractmethod
    def shapes(self) -> Sequence[torch.Size]:
        """The shapes of the data inputs."""

    @abstractmethod
    def positive(self, modify: str) -> Residual:
        """Set the negative eigenvalues to zero (`"clip"`), or make them positive (`"abs"`)."""

    @abstractmethod
    def product(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The residual times one vector per input."""

    @abstractmethod
    def columns(self) -> Iterator[Column]:
        """Columns whose signed squares add up to the residual; zero ones are left out."""


def _positive(values: Tensor, modify: str) -> Tensor:
    return values.clamp(min=0) if modify == "clip" else values.abs()


@dataclass(frozen=True)
class DiagonalResidual(Residual):
    """The residual of an elementwise node of one input.

    Attributes:
        edges: The input.
        values: The diagonal, of the input's shape.
        owners: Which sample owns each row of the input; found out when it is asked for.
    """

    edges: Sequence[GradientEdge]
    values: Tensor
    owners: Callable[[], Owners | None]

    @property
    def shapes(self) -> Sequence[torch.Size]:
        return [self.values.shape]

    def positive(self, modify: str) -> Residual:
        return replace(self, values=_positive(self.values, modify))

    def product(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        return [self.values * vectors[0]]

    def columns(self) -> Iterator[Column]:
        owners = self.owners()
        if owners is None:
            return
        values = owners.split(self.values)  # [N, E]
        roots = values.abs().sqrt()
        # The same entry of all samples makes one column: E passes, however many samples there are.
        for entry in _used(values).nonzero().flatten().tolist():
            column = torch.zeros_like(values)
            column[:, entry] = roots[:, entry]
            yield Column(
                self.edges,
                [owners.join(column, self.values.shape)],
                _signs(values[:, entry]),
            )


def _used(values: Tensor) -> Tensor:
    """Which eigenvalues `[N, E, ...]` are not zero up to rounding in all samples; NaN is not."""
    magnitudes = values.abs()
    # One infinite eigenvalue must not make all others look like rounding.
    finite = magnitudes[magnitudes.isfinite()]
    largest = float(finite.max()) if finite.numel() else 0.0
    threshold = torch.finfo(values.dtype).eps * largest * values.shape[1]
    return ~(magnitudes <= threshold).all(0)


def _signs(values: Tensor) -> Tensor:
    """The signs of eigenvalues; that of NaN, which is in the column, is 1.

    The column may be masked below, where the network takes nothing of it.
    """
    return values.sign().nan_to_num(1.0)


@dataclass(frozen=True)
class EigenResidual(Residual):
    """The residual of a node with several inputs, or of one that couples the entries of a sample.

    Attributes:
        edges: The node's data inputs.
        owners: Which sample owns each row of them.
        sizes: Their shapes.
        values: Eigenvalues: `[N, E, k]` for an elementwise node of k inputs with E entries, else
            `[N, E]`.
        vectors: Eigenvectors: `[N, E, k (input), k]`, else `[N, E (entry of all inputs), E]`.
    """

    edges: Sequence[GradientEdge]
    owners: Sequence[Owners]
    sizes: Sequence[torch.Size]
    values: Tensor
    vectors: Tensor

    @property
    def shapes(self) -> Sequence[torch.Size]:
        return self.sizes

    @property
    def entries(self) -> list[int]:
        """The number of entries of a sample in every input."""
        return _entries(self.owners, self.sizes)

    @property
    def elementwise(self) -> bool:
        """Whether the node treats every entry alone."""
        return self.values.ndim == 3

    def _position(self, index: list[int]) -> int:
        if self.elementwise:
            return index[0] * self.values.shape[-1] + index[1]
        return index[0]

    def positive(self, modify: str) -> Residual:
        return replace(self, values=_positive(self.values, modify))

    def product(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        parts = [owners.split(v) for owners, v in zip(self.owners, vectors, strict=True)]
        if self.elementwise:
            joint = torch.stack(parts, -1)
        else:
            joint = torch.cat(parts, 1)
        # V Λ Vᵀ v, entry by entry or sample by sample.
        image = (
            self.vectors @ (self.values * (self.vectors.mT @ joint[..., None])[..., 0])[..., None]
        )[..., 0]
        if self.elementwise:
            out = list(image.unbind(-1))
        else:
            out = list(image.split([part.shape[1] for part in parts], dim=1))
        return [
            owners.join(part, shape)
            for owners, part, shape in zip(self.owners, out, self.sizes, strict=True)
        ]

    def columns(self) -> Iterator[Column]:
        # Columns √|λ| v: with the signs of λ their outer products add up to R.
        scaled = self.vectors * self.values.abs().sqrt().unsqueeze(-2)
        for index in _used(self.values).nonzero().tolist():
            if self.elementwise:
                entry, k = index
                flat = [torch.zeros_like(self.values[..., 0]) for _ in self.edges]
                for i, part in enumerate(flat):
                    part[:, entry] = scaled[:, entry, i, k]
            else:
                flat = list(scaled[:, :, index[0]].split(self.entries, dim=1))
            seeds = [
                owners.join(part, shape)
                for owners, part, shape in zip(self.owners, flat, self.sizes, strict=True)
            ]
            values = self.values.flatten(1)[:, self._position(index)]
            yield Column(self.edges, seeds, _signs(values))


def _blocked(edges: Sequence[GradientEdge]) -> AbstractContextManager[None]:
    """Capture gradients at `edges`, and let them go no further.

    An input may depend on another input of the same node.
    """
    return nothing_below(dict.fromkeys(edge.node for edge in edges) if len(edges) > 1 else ())


class LocalCurvature:
    """The local second derivative R of one node, as a linear map on its inputs.

    Raises:
        UnsupportedError: Torch cannot differentiate the node twice, or its inputs are complex.
    """

    def __init__(
        self,
        node: Node,
        edges: Sequence[GradientEdge],
        outputs: Sequence[tuple[GradientEdge, Tensor]],
    ) -> None:
        self.node = node
        self.edges = edges
        with (
            differentiating_twice(node.name()),
            torch.enable_grad(),
            internal_pass(),
            _blocked(edges),
            differentiable([node]),
        ):
            gradients = torch.autograd.grad(
                [edge for edge, _ in outputs],
                edges,
                [g for _, g in outputs],
                create_graph=True,
                allow_unused=True,
            )
        # What has no graph does not depend on the inputs: there the node is linear.
        self.gradients = [
            (i, g) for i, g in enumerate(gradients) if g is not None and g.requires_grad
        ]
        self.inputs = [g.detach() for g in gradients if g is not None]
        if any(v.is_complex() for v in self.inputs):
            raise UnsupportedError(
                "Second derivatives of ops expect real numbers, found complex ones in "
                f"`{node.name()}`; use `HMP`."
            )

    @cached_property
    def trial(self) -> list[Tensor]:
        """A vector per input."""
        return trial_vectors(self.inputs)

    @cached_property
    def image(self) -> list[Tensor]:
        """R times the trial."""
        # An input without a gradient: nothing of the loss comes through it, and R is left out.
        if len(self.inputs) == len(self.edges):
            return self(self.trial)
        return []

    def diagonal(self) -> Tensor:
        """The diagonal of R, of the input's shape, of a node elementwise in its only input."""
        # R is diagonal: its product with ones is the diagonal.
        return self([torch.ones_like(self.inputs[0])])[0]

    @property
    def linear(self) -> bool:
        """Whether R is zero."""
        return not any(bool(part.any()) for part in self.image)

    def __call__(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """R applied to vectors of the inputs' shapes."""
        if not self.gradients:
            return [torch.zeros_like(v) for v in vectors]
        with differentiating_twice(self.node.name()), internal_pass(), _blocked(self.edges):
            parts = torch.autograd.grad(
                [g for _, g in self.gradients],
                self.edges,
                [vectors[i] for i, _ in self.gradients],
                retain_graph=True,
                allow_unused=True,
            )
        return [
            torch.zeros_like(v) if part is None else part
            for part, v in zip(parts, vectors, strict=True)
        ]

    def eigen(self, owners: Sequence[Owners]) -> EigenResidual:
        """The eigendecomposition of R, per entry where the node is elementwise, else per sample."""
        shapes = [v.shape for v in self.inputs]
        # Inputs that are laid out alike may be combined entry by entry; the trial tells.
        if len(set(zip(shapes, owners, strict=True))) == 1:
            matrix = self._elementwise(owners)
        else:
            matrix = None
        if matrix is None:
            matrix = self._dense(owners, shapes)
        if matrix.shape[-1] == 1:
            return EigenResidual(
                self.edges,
                owners,
                shapes,
                matrix[..., 0],
                torch.ones_like(matrix),
            )
        # No decomposition takes entries that are not finite, as of a logarithm of masked numbers.
        broken = ~matrix.isfinite().all(-1).all(-1)
        values, vectors = eigh(matrix.masked_fill(broken[..., None, None], 0))
        values = values.masked_fill(broken[..., None], torch.nan)
        return EigenResidual(self.edges, owners, shapes, values, vectors)

    def _elementwise(self, owners: Sequence[Owners]) -> Tensor | None:
        """R as `[N, E, k, k]`, or `None` if it couples entries."""
        zero = [torch.zeros_like(v) for v in self.inputs]
        # If R couples no entries, ones in one input give all entries of one row of blocks.
        rows = [
            self(
                [
                    torch.ones_like(v) if i == j else z
                    for j, (v, z) in enumerate(zip(self.inputs, zero, strict=True))
                ]
            )
            for i in range(len(zero))
        ]
        for j, image in enumerate(self.image):
            expected = torch.stack(
                [row[j] * w for row, w in zip(rows, self.trial, strict=True)]
            ).sum(0)
            finite = image.isfinite() & expected.isfinite()
            expected, image = expected[finite], image[finite]
            largest = float(image.abs().max()) if image.numel() else 0.0
            if not torch.allclose(expected, image, rtol=1e-4, atol=1e-5 * largest):
                return None
        return torch.stack(
            [torch.stack([owners[0].split(part) for part in row], -1) for row in rows],
            -2,
        )

    def _dense(self, owners: Sequence[Owners], shapes: Sequence[torch.Size]) -> Tensor:
        """R as `[N, E, E]` over the entries of all inputs."""
        sizes = _entries(owners, shapes)
        unit = self.inputs[0].new_zeros(owners[0].count, sum(sizes))
        rows = []
        for e in range(sum(sizes)):
            unit.zero_()[:, e] = 1
            parts = [
                o.join(flat, shape)
                for o, flat, shape in zip(owners, unit.split(sizes, 1), shapes, strict=True)
            ]
            rows.append(
                torch.cat(
                    [o.split(part) for o, part in zip(owners, self(parts), strict=True)],
                    dim=1,
                )
            )
        matrix = torch.stack(rows, 1)
        return (matrix + matrix.mT) / 2


def _entries(owners: Sequence[Owners], shapes: Sequence[torch.Size]) -> list[int]:
    """The number of entries of a sample in tensors of these shapes."""
    return [
        o.split(torch.zeros(()).expand(shape)).shape[1]
        for o, shape in zip(owners, shapes, strict=True)
    ]
