"""Parameters that processes share among each other: FSDP2, and tensor parallelism.

Under `fully_shard` the parameters of a module, and of an optimizer, are `DTensor`s of which every
process has a part. The ops of a forward pass see other tensors, gathered for the while of it: these
are the leaves of its graph, and are freed and gathered again as FSDP sees fit. What is found for a
gathered parameter belongs to the registered one, which the user knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_curv.distributed.failures import distributed, together
from lightning_curv.distributed.search import instances

# The shard of a gathered or registered parameter, by that parameter; None: it belongs to no FSDP.
_known = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class Shard:
    """A parameter under FSDP2. FSDP has no public way from a gathered parameter to its module.

    Args:
        own: what FSDP knows of the parameter.
        group: parameters that are gathered together.
        state: of the module.
    """

    own: ref[Any]
    group: ref[Any]
    state: ref[Any]

    @property
    def registered(self) -> Tensor:
        """The `DTensor` that the module and the optimizer have."""
        return self._alive.sharded_param

    @property
    def gathered(self) -> Tensor | None:
        """The leaf of graphs; None before the first forward pass."""
        return getattr(self._alive, "_unsharded_param", None)

    @property
    def dtype(self) -> torch.dtype:
        """Of the leaf of graphs: mixed precision may have another one than the `DTensor`."""
        return self._alive.mp_policy.param_dtype or self.registered.dtype

    @property
    def processes(self) -> int:
        """The number of processes that share the batch: of the mesh, replicas included."""
        return self._alive.mesh_info.mesh.size()

    @property
    def _alive(self) -> Any:
        own = self.own()
        assert own is not None, "the module of a parameter is gone"
        return own


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a `DTensor`, of which this process may have a part only."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor; the very tensor if that is all of it."""
    return tensor._local_tensor if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def version(tensor: Tensor) -> tuple[int, int]:
    """Changes with every change in place, also of the part alone, as FSDP adds gradients."""
    return tensor._version, local(tensor)._version


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; of a `DTensor` its parts are gathered from all processes."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def registered(parameter: Tensor) -> Tensor:
    """The parameter that the user knows, of one in a graph."""
    # Asked for every parameter several times a step.
    if not distributed():
        return parameter
    shard = shard_of(parameter)
    return parameter if shard is None else shard.registered


def in_graph(parameter: Tensor) -> Tensor:
    """The leaf in the graph of a forward pass, of a parameter that the user knows."""
    shard = shard_of(parameter)
    gathered = None if shard is None else shard.gathered
    return parameter if gathered is None else gathered


def dtype_in_graph(parameter: Tensor) -> torch.dtype:
    """The type of the leaf in the graph of a forward pass, of a parameter that the user knows."""
    shard = shard_of(parameter)
    return parameter.dtype if shard is None else shard.dtype


def shard_of(parameter: Tensor) -> Shard | None:
    """What there is to a parameter under FSDP2; None for any other."""
    return find_shards([parameter]).get(parameter)


def find_shards(parameters: Iterable[Tensor]) -> dict[Tensor, Shard]:
    """Those of several parameters that are under FSDP2."""
    if not distributed():
        return {}
    parameters = list(parameters)
    for look in (_look_at_known, _look):
        if any(parameter not in _known for parameter in parameters):
            look()
    for parameter in parameters:
        # Remembered as one without a shard, so that nobody looks for it again.
        _known.setdefault(parameter, None)
    found = {parameter: _known[parameter] for parameter in parameters}
    return {parameter: shard for parameter, shard in found.items() if shard is not None}


@contextmanager
def gathered(shards: Iterable[Shard]) -> Iterator[None]:
    """Parameters stay gathered, and FSDP takes no notice of passes through their graph.

    FSDP counts passes: at the end of each it would free the parameters, and exchange gradients that
    were accumulated. All processes enter, in the same state: what is not there is gathered. Within,
    each may run as many passes as it likes, forward ones included: nothing is exchanged.

    Memory: these parameters, all at once.
    """
    # By identity: FSDP's own objects need not be hashable.
    groups = {id(group): group for shard in shards if (group := shard.group()) is not None}
    states = {id(state): state for shard in shards if (state := shard.state()) is not None}
    if not groups:
        yield
        return
    # One for each module that was sharded on its own, and not inside of another one.
    contexts = list({id(state._state_ctx): state._state_ctx for state in states.values()}.values())
    everyone = [state for context in contexts for state in context.all_states]
    everyone = everyone or [*states.values()]
    all_groups = [group for state in everyone for group in _groups(state)]
    # What is gathered already stays so for others; only what is fetched here is freed again.
    fetched = [group for group in groups.values() if not group.is_unsharded]
    for group in fetched:
        # Before the first forward pass FSDP has not prepared itself.
        group.lazy_init()
        group.unshard()
        group.wait_for_unshard()
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    phases = [(thing, thing._training_state) for thing in (*everyone, *all_groups)]
    queued = [context.post_backward_final_callback_queued for context in contexts]
    # What is said to be queued is not queued again, who is in a pass begins none, and what runs
    # forward in a backward pass is a recomputation, which finds its parameters there.
    for context in contexts:
        context.post_backward_final_callback_queued = True
    for thing, _ in phases:
        thing._training_state = TrainingState.PRE_BACKWARD
    silenced = [group for group in all_groups if "post_backward" not in vars(group)]
    for group in silenced:
        group.post_backward = _nothing
    try:
        yield
    finally:
        for group in silenced:
            del group.post_backward
        for thing, phase in phases:
            thing._training_state = phase
        for context, before in zip(contexts, queued, strict=True):
            context.post_backward_final_callback_queued = before
        for group in fetched:
            group.reshard()


def _nothing(*_: Any) -> None:
    pass


@contextmanager
def passes_apart(parameters: Iterable[Tensor], wanted: bool) -> Iterator[None]:
    """Each process may run the model by itself, as often as it likes, if one of them wants to.

    Args:
        parameters: Of the model. All processes enter together, and leave together, so that an error
            in one of them is heard of in the others.
        wanted: Whether this process wants to.

    Cost: nothing where parameters are whole; else two small collectives, and the parameters of the
    model in memory, all at once, if some process wants to.
    """
    shards = find_shards(parameters)
    if not shards:
        yield
        return
    flag = torch.tensor(float(wanted), device=next(iter(shards)).device)
    together(dist.all_reduce, flag)
    with gathered(shards.values()) if flag else nullcontext():
        yield
    if flag:
        together(dist.all_reduce, flag)


def end_pass(shards: Iterable[Shard]) -> None:
    """FSDP hears that a backward pass is over which has not reached the parameters.

    It then frees them, as it does itself behind a pass in which no parameter gets a gradient.
    """
    states = {id(state._state_ctx): state for shard in shards if (state := shard.state())}
    for state in states.values():
        # Before the first forward pass there is nothing to end.
        if state._state_ctx.all_states:
            state._root_post_backward_final_callback()


def free(shards: Iterable[Shard]) -> None:
    """Parameters are freed: who needs them next gathers what they are then.

    A forward pass without a backward pass leaves those of the outermost module gathered.
    """
    groups = {id(group): group for shard in shards if (group := shard.group()) is not None}
    for group in groups.values():
        if group.is_unsharded:
            group.reshard()


def _look_at_known() -> None:
    """What is gathered for the first time belongs to a parameter that the optimizer has shown."""
    for shard in list(_known.values()):
        if shard is not None and shard.own() is not None and shard.gathered is not None:
            _known[shard.gathered] = shard


def _look() -> None:
    """Find the parameters of all modules under FSDP2; with some, it takes a tenth of a second."""
    for module in _modules():
        state = module._get_fsdp_state()
        for group in _groups(state):
            for own in group.fsdp_params:
                shard = Shard(ref(own), ref(group), ref(state))
                _known[own.sharded_param] = shard
                if shard.gathered is not None:
                    _known[shard.gathered] = shard


def _modules() -> list[Any]:
    from torch.distributed import fsdp

    kind = getattr(fsdp, "FSDPModule", None)
    # `fully_shard` makes a subclass for every class of modules.
    return instances(kind) if kind is not None and kind.__subclasses__() else []


def _groups(state: Any) -> list[Any]:
    """Parameters that are gathered together; before torch 2.13 a module had one such group."""
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is not None:
        return list(groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def own_part(tensor: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that this process has of another one; no communication.

    Args:
        tensor: whole, the same in all processes.
        like: whose parts are wanted; the tensor is returned if it has none.
    """
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = like  # a `DTensor`, whose attributes type checkers do not know
    # Without a source: every process has the whole tensor, and nothing is sent.
    return distribute_tensor(tensor, sharded.device_mesh, sharded.placements, src_data_rank=None)
