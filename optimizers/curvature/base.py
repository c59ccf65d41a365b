"""What an optimizer needs from a model of the curvature."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_curv.extensions import Extension
from lightning_curv.optimizers.linear_algebra.readings import Readings
from lightning_curv.terms.jacobian import Jacobian

State = dict[str, Any]
ParamGroup = dict[str, Any]
Member = tuple[ParamGroup, Tensor]
Part = tuple[State, int, Tensor]  # state of a block, number of a part of it, damping of the block


@dataclass(frozen=True)
class Block:
    """Parameters that one block of curvature covers: one alone, or weight and bias of a layer.

    The first one's group has the settings of the block, and its state the curvature.
    """

    members: tuple[Member, ...]

    @property
    def group(self) -> ParamGroup:
        """Settings of the block."""
        return self.members[0][0]

    @cached_property
    def params(self) -> list[Tensor]:
        """The parameters, the one with the state first."""
        return [param for _, param in self.members]


@dataclass(frozen=True)
class Direction:
    r"""A preconditioned gradient of one parameter.

    Args:
        param: the parameter.
        grad: $g$, its gradient.
        value: $d = C^{-1} g$, shape of the parameter; the update contains a negative multiple of
            it.
        squared_norm: gives the squared length of $d$ in the metric of the curvature, [].
        damping: gives $\lambda$ of the block, [].
        group: settings of the parameter.
        last: the last update of the parameter, if it is known.
        jacobians: derivatives of the columns of every micro-batch by the parameter, None where it
            has none; empty if the step rule did not ask for them.
        damped: `Curvature.damped` of a weight whose bias, the parameter of the next direction,
            shares its block.
    """

    param: Tensor
    grad: Tensor
    value: Tensor
    squared_norm: Callable[[], Tensor]
    damping: Callable[[], Tensor]
    group: ParamGroup
    last: Tensor | None = None
    jacobians: Sequence[Jacobian | None] = ()
    damped: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None


@dataclass(frozen=True)
class Gradient:
    r"""What is to be preconditioned.

    Args:
        state: state of the block.
        block: the parameters.
        values: their gradients.
        damping: gives $\lambda$ of the block, [], which most steps do not need.
    """

    state: State
    block: Block
    values: Sequence[Tensor]
    damping: Callable[[], Tensor]


class Curvature(ABC):
    """A positive semi-definite matrix per block: measured, averaged, damped, inverted.

    The object holds settings only. Everything measured lives in the state of a block (tensors and
    plain types), which only methods of this class and its subclasses read and write.

    Attributes:
        extension: what leaves the fields of one batch on the parameters.
        sharded: whether every process keeps only the parts that it inverts.
        derived: keys of what follows from the measured means and the damping.
    """

    extension: Extension
    sharded: bool = False
    derived: tuple[str, ...] = ()

    @abstractmethod
    def pairs(self, fields: dict[Tensor, Any]) -> dict[Tensor, Tensor]:
        """The bias that each weight shares a block with."""

    @abstractmethod
    def measure(
        self,
        state: State,
        block: Block,
        fields: Sequence[Any],
        step: int,
        samples: float = 0.0,
    ) -> list[Tensor]:
        """The statistics of one batch.

        Args:
            state: state of the block.
            block: the parameters.
            fields: what `extension` left on each of them.
            step: number of the step, the seed of everything random.
            samples: of the first batch in all processes together, the same in all steps; 0 as long
                as it is not known.

        Returns:
            Tensors; the first one and those of its shape are linear in the scale of the loss.

        Raises:
            ValueError: the fields do not fit the parameters.
        """

    @abstractmethod
    def absorb(
        self,
        state: State,
        block: Block,
        statistics: list[Tensor],
        scale: float,
        floor: float | Tensor = 0.0,
    ) -> None:
        """Average statistics into the state.

        Args:
            state: state of the block, updated.
            block: the parameters.
            statistics: what `measure` returned, averaged over processes.
            scale: what the curvature in them is to be multiplied by.
            floor: the least damping of the loss.
        """

    def measured(self, state: State) -> bool:
        """Whether statistics were absorbed; `weight` is the sum of their weights in the mean."""
        return "weight" in state

    @abstractmethod
    def mean_eigenvalue(self, state: State) -> Tensor:
        """The mean eigenvalue of the undamped block, []."""

    def floor_scale(self, state: State) -> Tensor | float:
        """What the least damping of the loss is multiplied by in this block."""
        return 1.0

    @abstractmethod
    def units(self, state: State) -> int:
        """The number of parts of the block that are refreshed independently."""

    @abstractmethod
    def inverted(
        self, due: Sequence[Part], readings: Readings | None = None
    ) -> list[list[Tensor] | None]:
        """Recompute parts of blocks that depend on the damping, from what is measured.

        Args:
            due: state, number of the part, damping of the block.
            readings: of the step, where it may be read later whether that failed.

        Returns:
            For each what `accept` takes; None if it failed.
        """

    @abstractmethod
    def shapes(self, state: State, unit: int) -> list[torch.Size]:
        """The shapes of the tensors of a part."""

    @abstractmethod
    def dtype(self, state: State) -> torch.dtype:
        """The dtype of the tensors of all parts, and of preconditioned gradients."""

    @abstractmethod
    def accept(self, state: State, unit: int, tensors: list[Tensor]) -> None:
        """Put a part into use."""

    @abstractmethod
    def ready(self, state: State) -> bool:
        """Whether gradients of this block can be preconditioned."""

    def fits(self, state: State, block: Block) -> bool:
        """Whether what was measured is that of the parameters that the block has in this step.

        A bias that was frozen since then has left the block of its weight.
        """
        return True

    @abstractmethod
    def precondition(self, gradients: Sequence[Gradient]) -> list[list[Tensor]]:
        """Precondition the gradients of many blocks, those of equal shapes together.

        Returns:
            The directions of each block, in the shapes of its gradients.
        """

    def damped(self, state: State, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Directions of a layer in the coordinates in which its damping is isotropic.

        Args:
            state: state of the block.
            weight: [K, *w].
            bias: [K, o].
        """
        return weight, bias

    @abstractmethod
    def squared_norm(self, state: State, grad: Tensor, value: Tensor) -> Tensor:
        """A parameter's share of the squared length of a direction, [].

        Args:
            state: state of the block.
            grad: gradient of the parameter.
            value: its direction; lengths are those in the metric of the curvature.
        """

    def owner(self, state: State) -> int | None:
        """The number of the process that inverts a sharded block; None before it has any."""
        return state.get("owner")

    def assign(self, state: State, owner: int) -> None:
        """Let a process invert a sharded block from now on."""
        state["owner"] = owner

    def saved(self, state: State) -> State:
        """The state of a block in a checkpoint.

        A process of a sharded curvature has only some of the parts: a checkpoint has none, nor who
        owned them, and the first step after it is loaded makes them anew.
        """
        if not self.sharded:
            return state
        return {key: value for key, value in state.items() if key not in ("owner", *self.derived)}
