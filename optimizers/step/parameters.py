"""The parameters of an optimizer: which of them move, which share a block, what they are called."""

from __future__ import annotations

from collections.abc import Container, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_curv.distributed.shards import is_sharded, whole
from lightning_curv.errors import describe
from lightning_curv.optimizers.curvature.base import Block, Curvature, Member, ParamGroup, State
from lightning_curv.optimizers.linear_algebra.collectives import largest_over_ranks
from lightning_curv.optimizers.warn import warn


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
        """All parameters; their order survives saving."""
        return [param for group in self.groups for param in group["params"]]

    def members(self) -> list[Member]:
        """The parameters that move in this step, with their groups.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        moving: list[Member] = []
        for group in self.groups:
            for param in group["params"]:
                if param.grad is None or not param.requires_grad or not param.numel():
                    continue
                if param.grad.layout != torch.strided:
                    raise RuntimeError(
                        "Curvature needs dense gradients, found a sparse one on "
                        f"{self.name(param)}; build the layer with `sparse=False`."
                    )
                moving.append((group, param))
        return moving

    def paired(
        self,
        members: Sequence[Member],
        pairs: dict[Tensor, Tensor],
        seen: Container[Tensor],
    ) -> list[Block]:
        """Remember which bias shares a block with each weight, and return the blocks.

        Args:
            members: parameters that move.
            pairs: the bias of each weight that has one.
            seen: the parameters that this backward pass has used; the others keep their partners.
        """
        # By its number, which survives saving.
        numbers = {param: number for number, param in enumerate(self.all())}
        for _, param in members:
            if param in pairs:
                self.state[param]["bias"] = numbers[pairs[param]]
            elif param in seen:
                self.state[param].pop("bias", None)
        return self.blocks(members)

    def agree(self, members: Sequence[Member]) -> None:
        """Take over the partners of weights that only other processes have used.

        What processes exchange afterwards is ordered by blocks, which must be the same in all.

        Args:
            members: parameters that move, the same in all processes.
        """
        partners = [self.state[param].get("bias", -1) for _, param in members]
        agreed = largest_over_ranks(partners, members[0][1].device)
        for (_, param), partner in zip(members, agreed, strict=True):
            if partner >= 0:
                self.state[param]["bias"] = partner

    def blocks(self, members: Sequence[Member]) -> list[Block]:
        """The blocks of the members; a weight whose bias does not move is one alone."""
        groups = {param: group for group, param in members}
        params = self.all()
        bias_of: dict[Tensor, Tensor] = {}
        for param in groups:
            if "bias" in self.state[param]:
                partner = params[self.state[param]["bias"]]
                if partner in groups:
                    bias_of[param] = partner
        partners = set(bias_of.values())
        blocks = []
        for member in members:
            _, param = member
            if param in partners:
                continue  # in the block of its weight
            bias = bias_of.get(param)
            blocks.append(Block((member,) if bias is None else (member, (groups[bias], bias))))
        return blocks

    def name(self, param: Tensor) -> str:
        """What messages call a parameter."""
        for number, group in enumerate(self.groups):
            for index, other in enumerate(group["params"]):
                if other is param:
                    names = group.get("param_names")
                    if names:
                        return f"`{names[index]}`"
                    return f"parameter {index} of group {number}"
        return "a parameter"

    def described(self, params: Sequence[Tensor], most: int = 3) -> str:
        """The first few parameters for a message.

        Where the optimizer knows no names, they have those of their model. Slow: models are
        searched for.
        """
        names = [self._best_name(param) for param in params[:most]]
        if len(params) > most:
            more = f" and {len(params) - most} more"
        else:
            more = ""
        return ", ".join(names) + more

    def warn_of_skipped(self, kind: str, params: Sequence[Tensor], flags: Sequence[bool]) -> None:
        """Warn that a step is skipped, and say which parameters' tensors are not finite.

        Args:
            kind: What the tensors are.
            params: The parameters; one may have several tensors.
            flags: Whether each tensor is finite.
        """
        guilty = {param: None for param, ok in zip(params, flags, strict=True) if not ok}
        names = self.described([*guilty])
        warn(f"found inf or NaN in the {kind} of {names}; this step is skipped.")

    def _best_name(self, param: Tensor) -> str:
        own = self.name(param)
        of_model = describe(param)
        only_model_knows = of_model.startswith("`") and not own.startswith("`")
        return of_model if only_model_knows else own

    def summary(self, curvature: Curvature) -> dict[str, str]:
        """Which update each parameter gets."""
        params = self.all()
        numbers = [state["bias"] for state in self.state.values() if "bias" in state]
        partners = {params[number] for number in numbers}
        return {self.name(param): self._kind(param, curvature, partners) for param in params}

    def _kind(self, param: Tensor, curvature: Curvature, partners: set[Tensor]) -> str:
        state = self.state.get(param, {})
        if not param.requires_grad:
            return "frozen"
        if param in partners or curvature.ready(state):
            return "curvature"
        return "fallback" if "adam" in state else "not seen"


# Whole gradients of sharded parameters, and the version they were gathered of, by the gradient.
_gathered = WeakTensorKeyDictionary()


def gradient(param: Tensor) -> Tensor:
    """The gradient of a member; under FSDP2 all of it, gathered once in a step."""
    assert param.grad is not None
    if not is_sharded(param.grad):
        return param.grad
    version, gathered = _gathered.get(param.grad, (None, None))
    if version != param.grad._version:
        gathered = whole(param.grad)
        _gathered[param.grad] = param.grad._version, gathered
    return gathered
