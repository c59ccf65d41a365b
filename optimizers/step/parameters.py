"""The parameters of an optimizer: which of them move, which share a block, what they are called."""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_curv.errors import describe
from lightning_curv.optimizers.curvature.base import Block, Curvature, Member, ParamGroup, State


@dataclass(frozen=True)
class Parameters:
    """A view of an optimizer's parameter groups and state.

    Args:
        groups: parameter groups.
        state: state of each parameter; a weight's has under "bias" the number of the parameter that
            shares its block.
    """

    groups: Sequence[ParamGroup]
    state: MutableMapping[Tensor, State]

    def all(self) -> list[Tensor]:
        """All of them; their order survives saving."""
        return [param for group in self.groups for param in group["params"]]

    def members(self) -> list[Member]:
        """Those that move in this step.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        found = [(group, param) for group in self.groups for param in group["params"]]
        found = [
            (group, p) for group, p in found if p.grad is not None and p.requires_grad and p.numel()
        ]
        for _, param in found:
            if param.grad.layout != torch.strided:
                raise RuntimeError(
                    f"Curvature needs dense gradients, found a sparse one on {self.name(param)}; "
                    "build the layer with `sparse=False`."
                )
        return found

    def paired(self, members: Sequence[Member], pairs: dict[Tensor, Tensor]) -> list[Block]:
        """Remember, by its number, the bias that shares a block with each weight; the blocks."""
        numbers = {param: number for number, param in enumerate(self.all())}
        for _, param in members:
            if param in pairs:
                self.state[param]["bias"] = numbers[pairs[param]]
            else:
                self.state[param].pop("bias", None)
        return self.blocks(members)

    def blocks(self, members: Sequence[Member]) -> list[Block]:
        """The blocks of the members; a weight whose bias does not move is one alone."""
        groups = {param: group for group, param in members}
        params = self.all()
        joint = {p: params[self.state[p]["bias"]] for p in groups if "bias" in self.state[p]}
        joint = {weight: bias for weight, bias in joint.items() if bias in groups}
        partners = set(joint.values())
        return [
            Block(((group, p), (groups[joint[p]], joint[p])) if p in joint else ((group, p),))
            for group, p in members
            if p not in partners
        ]

    def name(self, param: Tensor) -> str:
        """What messages call a parameter."""
        for number, group in enumerate(self.groups):
            for index, other in enumerate(group["params"]):
                if other is param:
                    names = group.get("param_names")
                    return f"`{names[index]}`" if names else f"parameter {index} of group {number}"
        return "a parameter"

    def described(self, params: Sequence[Tensor], most: int = 3) -> str:
        """The first few for a message, by the names that their model has for them if the optimizer knows none. Slow."""
        own = [(self.name(param), describe(param)) for param in params[:most]]
        names = [
            described if described.startswith("`") and not name.startswith("`") else name
            for name, described in own
        ]
        return ", ".join(names) + (f" and {len(params) - most} more" if len(params) > most else "")

    def summary(self, curvature: Curvature) -> dict[str, str]:
        """Which update each parameter gets."""
        params = self.all()
        partners = {params[state["bias"]] for state in self.state.values() if "bias" in state}
        return {self.name(param): self._kind(param, curvature, partners) for param in params}

    def _kind(self, param: Tensor, curvature: Curvature, partners: set[Tensor]) -> str:
        state = self.state.get(param, {})
        if not param.requires_grad:
            return "frozen"
        if param in partners or curvature.ready(state):
            return "curvature"
        return "fallback" if "adam" in state else "not seen"


def gradient(param: Tensor) -> Tensor:
    """The gradient of a member."""
    assert param.grad is not None
    return param.grad
