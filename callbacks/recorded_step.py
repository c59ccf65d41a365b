"""Run one `training_step` under `record()`, by a patch on the instance that is easy to undo."""

import functools
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from pytorch_lightning import LightningModule

from lightning_curv.recording import record

_REPLACED = "_lightning_curv_replaced"


def record_training_step(pl_module: LightningModule) -> None:
    """Make `pl_module.training_step` run under `record()`; several callers share one patch."""
    step = pl_module.training_step
    if hasattr(step, _REPLACED):
        return

    @functools.wraps(step)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        with _eager(), record():
            return step(*args, **kwargs)

    setattr(recorded, _REPLACED, vars(pl_module).get("training_step"))
    pl_module.training_step = recorded  # type: ignore[method-assign]


def restore_training_step(pl_module: LightningModule) -> None:
    """Undo `record_training_step`; does nothing if there is nothing to undo."""
    recorded = vars(pl_module).get("training_step")
    if not hasattr(recorded, _REPLACED):
        return
    replaced = getattr(recorded, _REPLACED)
    del pl_module.training_step
    if replaced is not None:
        pl_module.training_step = replaced  # type: ignore[method-assign]


def _eager() -> AbstractContextManager[Any]:
    # Inside a compiled region no torch function is seen. The stance leaves compiled code valid for the next steps.
    if "torch._dynamo" in sys.modules:
        return torch.compiler.set_stance("force_eager")
    return nullcontext()
