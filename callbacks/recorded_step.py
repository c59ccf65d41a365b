"""Run one `training_step` under `record()`, by a patch on the instance that is easy to undo."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_curv.recording.lenient import lenient_record
from lightning_curv.recording.record import record

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule

_REPLACED = "_lightning_curv_replaced"
_OUTPUTS = "_lightning_curv_outputs"
_RETURNED = "_lightning_curv_returned"
_READERS = "_lightning_curv_readers"
_LISTENERS = "_lightning_curv_listeners"


def record_training_step(
    pl_module: LightningModule,
    output: nn.Module | None = None,
    read: Callable[[Any], None] | None = None,
    failed: Callable[[Exception], None] | None = None,
) -> None:
    """Make `pl_module.training_step` run under `record()`; several callers share one patch.

    Args:
        pl_module: is patched until `restore_training_step`.
        output: a module whose output is to be found again.
        read: gets the batch as `training_step` does, before it runs.
        failed: gets an error of the recording itself, which then disturbs nothing. If some caller
            leaves it out, such an error is raised.
    """
    # On the instance, where it shadows the method: deleting one attribute undoes it.
    step = pl_module.training_step
    if not hasattr(step, _REPLACED):
        outputs: list[nn.Module] = []
        returned: list[Any] = []
        readers: list[Callable[[Any], None]] = []
        listeners: list[Callable[[Exception], None] | None] = []

        # Lightning reads the signature to see whether the step takes `batch_idx`.
        @functools.wraps(step)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            for reader in readers:
                reader(args[0] if args else next(iter(kwargs.values()), None))
            # An error of the recording stays silent only if all who asked for the record can do
            # without.
            told = [listener for listener in listeners if listener is not None]
            lenient = lenient_record if len(told) == len(listeners) else record
            recordings = [lenient(output) for output in outputs] or [lenient()]
            with ExitStack() as stack:
                stack.enter_context(eager())
                for recording in recordings:
                    stack.enter_context(recording)
                # In place: `returned_loss` finds this very list on the patch.
                returned[:] = [step(*args, **kwargs)]
            for recording in recordings:
                if isinstance(recording, lenient_record) and recording.failure is not None:
                    for listener in told:
                        listener(recording.failure)
            return returned[0]

        own = {
            # A patch of the user's own, which has to come back.
            _REPLACED: vars(pl_module).get("training_step"),
            _OUTPUTS: outputs,
            _RETURNED: returned,
        }
        vars(recorded).update(own | {_READERS: readers, _LISTENERS: listeners})
        vars(pl_module)["training_step"] = recorded
    shared: list[nn.Module] = getattr(pl_module.training_step, _OUTPUTS)
    if output is not None and output not in shared:
        shared.append(output)
    if read is not None:
        getattr(pl_module.training_step, _READERS).append(read)
    getattr(pl_module.training_step, _LISTENERS).append(failed)


def returned_loss(pl_module: LightningModule) -> Tensor | None:
    """The loss as `training_step` returned it.

    A strategy, or Lightning, may have added something to its graph since: with
    `static_graph` DDP adds a node that must be passed once per step only.
    """
    returned: list[Any] = getattr(pl_module.training_step, _RETURNED, [])
    return loss_of(returned[0] if returned else None)


def loss_of(loss: Any) -> Tensor | None:
    """The loss in what a `training_step` returned."""
    if not isinstance(loss, Tensor) and isinstance(loss, Mapping):
        loss = loss.get("loss")
    if isinstance(loss, Tensor) and loss.grad_fn is not None:
        return loss
    return None


def forget_returned_loss(pl_module: LightningModule) -> None:
    """Drop the graph that the loss holds."""
    getattr(pl_module.training_step, _RETURNED, []).clear()


def restore_training_step(pl_module: LightningModule) -> None:
    """Undo `record_training_step`; does nothing if there is nothing to undo."""
    recorded = vars(pl_module).get("training_step")
    if hasattr(recorded, _REPLACED):
        del vars(pl_module)["training_step"]
        if getattr(recorded, _REPLACED) is not None:
            vars(pl_module)["training_step"] = getattr(recorded, _REPLACED)


def is_compiled(pl_module: LightningModule) -> bool:
    """Whether a part of a module is compiled: its steps run eagerly only where that is needed."""
    # Lightning sets it where the whole module was compiled.
    if getattr(pl_module, "_compiler_ctx", None) is not None:
        return True
    return any(
        # `torch.compile(module)` makes a wrapper, `module.compile()` does not.
        hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None)
        for m in pl_module.modules()
    )


def eager() -> AbstractContextManager[Any]:
    """Run compiled modules eagerly."""
    # Inside a compiled region no torch function is seen. The stance leaves compiled code valid for
    # the next steps.
    if "torch._dynamo" in sys.modules:
        return torch.compiler.set_stance("force_eager")
    return nullcontext()
