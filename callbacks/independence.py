"""Whether a sample's gradient depends on the other samples of its batch: then clipping it protects nobody."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from lightning_curv.backprop import Backprop
from lightning_curv.callbacks.user_batch import describe_batch
from lightning_curv.extensions import GraphExtension
from lightning_curv.passes import Column, Passes
from lightning_curv.recording import record
from lightning_curv.records import edge_of


class _Norms(GraphExtension):
    """Squared norms of the per-sample gradients, by a pass that touches no gradient and no hook of a parameter."""

    savefield = "_independence"
    needs_likelihood = False

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def compute(self, passes: Passes) -> dict[Tensor, Any]:
        column = Column([edge_of(passes.loss)], [passes.seed])
        squares = [jacobian.squared_norms()[0] for jacobian in passes.jacobian(column).values()]
        self.total = torch.stack([s.double() for s in squares]).sum(0)
        return {}


def refuse_coupled_samples(pl_module: LightningModule, batch: Any, batch_idx: int, size: int, mean: bool) -> None:
    """Compare the gradients of half a batch with those of the same samples in the whole batch.

    Randomness (dropout) is switched off, logging too, and all buffers and metrics are put back.

    Args:
        pl_module: Its `training_step` is called twice.
        batch: A batch on the module's device.
        batch_idx: Its number.
        size: Number of its samples, at least 2.
        mean: Whether the loss is a mean over the samples.

    Raises:
        MisconfigurationException: They differ.
    """
    half = size // 2
    try:
        with _undisturbed(pl_module):
            whole = _norms(pl_module, batch, batch_idx, size, mean)
            part = _norms(pl_module, _first(batch, half, size), batch_idx, half, mean)
    except _Unsplit:
        warnings.warn(
            f"PrivacyCallback cannot check that samples do not influence each other: no tensor of the batch has "
            f"{size} entries along its first axis.",
            stacklevel=2,
        )
        return
    if whole is None or part is None:
        return
    tolerance = 1e-3 if next(iter(pl_module.parameters())).dtype == torch.float64 else 2e-2
    if bool(((whole[:half] - part).abs() > tolerance * whole.max().clamp(min=1e-12)).any()):
        raise MisconfigurationException(
            f"PrivacyCallback needs a loss that is the {'mean' if mean else 'sum'} of one loss per sample, found that "
            f"a sample's gradient depends on the other samples of its batch (norms {_some(whole[:half])} in the whole "
            f"batch, {_some(part)} in half of it). Class weights, `ignore_index` and ragged sequences make a mean over "
            "something else than samples: compute one loss per sample and return its `.mean()`; for a sum set "
            "`loss_reduction='sum'` in the optimizer. Contrastive losses and batch statistics cannot be private."
        )


class _Unsplit(Exception):
    pass


def _norms(pl_module: LightningModule, batch: Any, batch_idx: int, size: int, mean: bool) -> Tensor | None:
    known = describe_batch(batch, size)
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), pl_module.trainer.precision_plugin.forward_context():
        torch.manual_seed(0)
        with record():
            output = pl_module.training_step(batch, batch_idx)
    loss = output["loss"] if isinstance(output, dict) else output
    if not isinstance(loss, Tensor) or loss.grad_fn is None:
        return None
    norms = _Norms()
    Backprop(loss, [norms], batch_size=known).before()
    return None if norms.total is None else norms.total.sqrt() * (size if mean else 1)


def _first(batch: Any, count: int, size: int) -> Any:
    """The first samples of a batch."""
    found = False

    def cut(value: Any) -> Any:
        nonlocal found
        if isinstance(value, Tensor):
            if value.ndim and len(value) == size:
                found = True
                return value[:count]
            return value
        if isinstance(value, dict):
            return {key: cut(entry) for key, entry in value.items()}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(cut(entry) for entry in value))
        if isinstance(value, (list, tuple)):
            whole = len(value) == size and not any(isinstance(v, Tensor) and v.ndim for v in value)
            return value[:count] if whole else type(value)(cut(entry) for entry in value)
        return value

    result = cut(batch)
    if not found:
        raise _Unsplit
    return result


@contextmanager
def _undisturbed(pl_module: LightningModule) -> Iterator[None]:
    """Put everything back that a training step changes."""
    buffers = {buffer: buffer.clone() for buffer in pl_module.buffers()}
    metrics = {m: copy.deepcopy(vars(m)) for m in pl_module.modules() if hasattr(m, "_defaults")}
    random = [m for m in pl_module.modules() if m.training and _drops(m)]
    for module in random:
        module.training = False
    silent = {name: lambda *args, **kwargs: None for name in ("log", "log_dict")}
    before = {name: vars(pl_module)[name] for name in silent if name in vars(pl_module)}
    vars(pl_module).update(silent)
    try:
        yield
    finally:
        for name in silent:
            del vars(pl_module)[name]
        vars(pl_module).update(before)
        for module in random:
            module.training = True
        for metric, values in metrics.items():
            vars(metric).update(values)
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)


def _drops(module: nn.Module) -> bool:
    dropout = getattr(module, "dropout", 0.0)  # attention and recurrent layers keep a probability
    return isinstance(module, nn.modules.dropout._DropoutNd) or (isinstance(dropout, float) and dropout > 0)


def _some(norms: Tensor) -> str:
    return ", ".join(f"{norm:.3g}" for norm in norms[:3].tolist())
