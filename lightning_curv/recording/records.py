"""What recording leaves in the autograd graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from lightning_curv.differentiation.internal_pass import RUNNING
from lightning_curv.recording.provenance import CONSTANT as CONSTANT_ROOTS
from lightning_curv.recording.provenance import DATA, Roots, is_parameter, roots_of
from lightning_curv.rules import Rule
from lightning_curv.terms.owners import Owners

KEY = "lightning_curv"
# What a tensor was computed from: parameters alone, …
PURE = "pure"
# … and constants, …
CONSTANT = "constant"
# … and tensors without gradient that came from outside. Whether these are data is not known yet.
TENTATIVE = "tentative"


@dataclass(slots=True)
class Operand:
    """A parameter, or a tensor computed from parameters, as an argument of a recorded op."""

    tensor: Tensor  # detached where it is derived
    source: GradientEdge | None = None  # where the gradient of a derived tensor arrives

    @property
    def derived(self) -> bool:
        """Whether the tensor was computed from parameters instead of being one."""
        return self.source is not None

    @property
    def edge(self) -> GradientEdge:
        """Where the gradient of the tensor arrives."""
        return self.source or edge_of(self.tensor)


@dataclass(slots=True)
class Use:
    """One call of an op with parameters among its arguments."""

    function: Callable[..., Any]
    rule: Rule
    arguments: dict[str, Any]  # by name; tensors detached, operands included
    operands: dict[str, Operand]  # by argument name
    inputs: dict[str, GradientEdge]  # of the other differentiable arguments
    shape: torch.Size  # of the output
    dtype: torch.dtype
    output_nr: int = 0
    versions: dict[str, int] = field(default_factory=dict)
    mixes_samples: bool = False  # a sample's output depends on other samples
    # Of the arguments without gradient, and of operands.
    roots: dict[str, Roots] = field(default_factory=dict)
    shapes: dict[str, torch.Size] = field(default_factory=dict)  # of the same
    # Instead of a rule: cotangents to J of the only operand.
    pull: Callable[[Tensor, Owners], Tensor] | None = None

    @property
    def name(self) -> str:
        """The op's name in messages."""
        return str(getattr(self.function, "__name__", self.function)).strip("_")

    def release(self, *_: Any) -> None:
        """Hook of the node: free the inputs as soon as autograd frees what it has saved."""
        # Passes of our own run before the user's: they must leave everything where it is.
        if not (_keeps_graph() or RUNNING):
            self.arguments = {}

    def check(self) -> None:
        """Raise if a recorded input was freed, or modified in place after the op had read it."""
        if not self.arguments:
            raise _freed(self)
        # Torch counts changes in place: autograd itself compares these numbers.
        for name, version in self.versions.items():
            if self.arguments[name]._version != version:
                raise RuntimeError(
                    f"`{self.name}` needs its argument `{name}` as it was in the forward pass, but "
                    "it was modified by an in-place operation afterwards. Modify a copy instead: "
                    f"`{name}.clone()`."
                )


@dataclass(slots=True)
class LossCall:
    """One call of a known loss function."""

    function: Callable[..., Any]
    arguments: dict[str, Any]  # by name; tensors detached
    input: GradientEdge
    shape: torch.Size  # of the output
    output_nr: int = 0
    roots: Roots = CONSTANT_ROOTS  # of the arguments without gradient
    beside: bool = False  # the node below is the same call once more, for its other input

    @property
    def name(self) -> str:
        """The loss function's name in messages."""
        return str(getattr(self.function, "__name__", self.function))

    def release(self, *_: Any) -> None:
        """Hook of the node: free the arguments as soon as autograd frees what it has saved."""
        if not (_keeps_graph() or RUNNING):
            self.arguments = {}

    def check(self) -> None:
        """Raise if the arguments were freed."""
        if not self.arguments:
            raise _freed(self)


def _freed(record: Use | LossCall) -> RuntimeError:
    return RuntimeError(
        "Expected a graph that still holds the inputs of its ops, found one that is passed a "
        f"second time: the first backward pass freed the inputs of `{record.name}`. Pass "
        "`retain_graph=True` to it, or run the forward pass again."
    )


# Of the pass that is running. A torch without it never frees: that costs memory, but is right.
_keeps_graph: Callable[[], bool] = getattr(
    torch._C._autograd,
    "_get_current_graph_task_keep_graph",
    lambda: True,
)


@dataclass(frozen=True)
class Mapped:
    """What an op under `vmap` reads of the batch.

    Attributes:
        name: The name of the op.
        roots: What it reads was computed from; their numbers are those of the rows of its output.
        edge: Where its output is in the graph.
        like: A tensor like the output, with the axes that are mapped over.
    """

    name: str
    roots: Roots
    edge: GradientEdge
    like: Tensor


class Marks:
    """What recording leaves at an autograd node."""

    # These stay in the class until they are set: at most nodes one or two of them are.
    use: Use | None = None
    loss: LossCall | None = None
    # The modules that returned the node's value.
    outputs: dict[nn.Module, tuple[int, Tensor]] | None = None
    # PURE, CONSTANT or TENTATIVE: the node's value was computed from parameters.
    origin: str | None = None
    roots: Roots = CONSTANT_ROOTS  # what else the value was computed from, where it has an origin
    read: Roots | None = None  # of the tensors without gradient that the op reads
    mapped: Mapped | None = None  # what an op reads of the batch under `vmap`, which hides it
    nested: str | None = None  # the op whose value it is, if that is a nested tensor
    # The value repeats a parameter: where that is data, the data are what the repetition made.
    copies: bool = False
    # Values of the node whose gradients the user looks at, by a hook or by `retain_grad`.
    watched: list[ref[Tensor]] | None = None


def marks(node: Node) -> Marks | None:
    """What recording left at `node`."""
    return node.metadata.get(KEY)  # type: ignore[attr-defined]


def edge_of(tensor: Tensor) -> GradientEdge:
    """The place in the graph where the gradient of `tensor` arrives."""
    node = tensor.grad_fn
    if node is None:
        return torch.autograd.graph.get_gradient_edge(tensor)
    return GradientEdge(node, tensor.output_nr)


def shape_at(edge: GradientEdge) -> torch.Size:
    """The shape of the tensor at an edge."""
    return torch.Size(edge.node._input_metadata[edge.output_nr].shape)


@dataclass(frozen=True)
class Output:
    """An output of a network, where the curvature of a loss enters.

    Attributes:
        edge: Where it is in the graph.
        like: A tensor of its shape, type and device.
    """

    edge: GradientEdge
    like: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> Output:
        """The output that a tensor is now; later changes in place do not matter."""
        if not tensor.requires_grad:
            raise ValueError(
                "`output` must be computed from parameters, found a tensor without a graph."
            )
        return cls(edge_of(tensor), like(tensor))


def like(tensor: Tensor) -> Tensor:
    """A tensor of the same shape, type and device that takes no memory."""
    return tensor.detach().new_zeros(()).expand(tensor.shape)


def is_copy(tensor: Tensor) -> bool:
    """Whether a tensor repeats a parameter, as `Marks.copies` says."""
    if tensor.grad_fn is None:
        return False
    left = marks(tensor.grad_fn)
    return left is not None and left.copies


def mark_at(node: Node) -> Marks:
    """The marks at `node`, to be written."""
    metadata: dict[str, Any] = node.metadata  # type: ignore[assignment]
    left: Marks | None = metadata.get(KEY)
    if left is None:
        left = Marks()
        metadata[KEY] = left
    return left


def origin_of(tensor: Tensor) -> str | None:
    """What a tensor with gradients was computed from: an origin or, with data, `None`."""
    node = tensor.grad_fn
    if node is None:
        return PURE if is_parameter(tensor) else None
    left: Marks | None = node.metadata.get(KEY)  # type: ignore[attr-defined]
    return None if left is None else left.origin


def all_roots(tensor: Tensor) -> Roots:
    """What a tensor was computed from besides parameters.

    Of one that depends on data only that it does is known.
    """
    if not tensor.requires_grad:
        return roots_of(tensor)
    if tensor.grad_fn is None:
        return CONSTANT_ROOTS if is_parameter(tensor) else roots_of(tensor)
    left = marks(tensor.grad_fn)
    if left is not None and left.origin is not None:
        return left.roots
    return DATA


def combined(others: Iterable[Roots]) -> tuple[str | None, Roots]:
    """What a value comes from that was computed from some tensors, some of which have gradients.

    Args:
        others: The roots of those that were not computed from parameters alone.
    """
    roots: Roots | None = None
    for found in others:
        if found.data:
            return None, DATA
        roots = found if roots is None else roots | found
    if roots is None:
        return PURE, CONSTANT_ROOTS
    return TENTATIVE if roots.tensors else CONSTANT, roots
