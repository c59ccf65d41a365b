"""Processes that each have the whole model and average its gradients: `DistributedDataParallel`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch.autograd.graph import Node
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_curv.distributed.failures import processes
from lightning_curv.distributed.search import instances
from lightning_curv.distributed.shards import is_sharded
from lightning_curv.errors import UnsupportedError

# The models that there were when an optimizer first asked.
_known: WeakKeyDictionary[Optimizer, WeakSet[Any]] = WeakKeyDictionary()
# The settings of the last `join` of each model that is known to be over.
_over: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


@contextmanager
def unnoticed(nodes: Iterable[Node]) -> Iterator[None]:
    """`DistributedDataParallel` takes no notice of passes through a graph.

    With `static_graph` it averages gradients for the first time at the end of the first pass
    through the outputs of the model: after one of ours there are none yet, and it never does again.

    Args:
        nodes: of the graph; those of the model's outputs know the model.

    Cost: a look at every node, where there are several processes.
    """
    models: dict[int, Any] = {}
    # Alone a process averages nothing: the gradients are there before and after.
    for node in nodes if processes() > 1 else ():
        reference = getattr(node, "ddp_weakref", None)
        model = None if reference is None else reference()
        if model is not None and model.static_graph:
            models[id(model)] = model
    queued = [model._static_graph_delay_allreduce_enqueued for model in models.values()]
    for model in models.values():
        # What is said to be queued is not queued again.
        model._static_graph_delay_allreduce_enqueued = True
    try:
        yield
    finally:
        for model, before in zip(models.values(), queued, strict=True):
            model._static_graph_delay_allreduce_enqueued = before


def _in_join(model: Any) -> bool:
    """Whether a model is in `join` now, without `throw_on_early_termination=True`."""
    config = model._join_config
    if not config.enable or config.throw_on_early_termination or _over.get(model) is config:
        return False
    # The model keeps its settings when `join` is over; the context itself is gone then.
    if any(joined is model for join in instances(Join) for joined in join._joinables):
        return True
    _over[model] = config
    return False


def refuse_join(optimizer: Optimizer) -> None:
    """Refuse a step in which processes that have run out of batches take no part.

    In their place `join` answers the collectives of `DistributedDataParallel`, and no others: those
    of the optimizer would meet them, and end the processes.

    Args:
        optimizer: exchanges numbers with other processes in its steps.

    Raises:
        UnsupportedError: A model is in `join`, without `throw_on_early_termination=True`.

    Cost: models are searched for once per optimizer, a tenth of a second.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if processes() == 1 or any(map(is_sharded, params)):
        return
    if optimizer not in _known:
        _known[optimizer] = WeakSet(instances(DistributedDataParallel))
    for model in _known[optimizer]:
        if _in_join(model):
            raise UnsupportedError(
                f"{type(optimizer).__name__} needs all processes in every step, found a model in "
                "`join`, where some run out of batches before the others. Use "
                "`join(throw_on_early_termination=True)`, which ends the loop in all of them, or "
                "give all as many batches."
            )
