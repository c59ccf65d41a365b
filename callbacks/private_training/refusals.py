"""Set-ups in which training would not be private, and the way out of each."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_curv.callbacks.import_names import MisconfigurationException
from lightning_curv.callbacks.private_training.loader import require_plain_loader
from lightning_curv.distributed.shards import dtype_in_graph
from lightning_curv.optimizers.privacy.optimizer import DPOptimizer

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


def refuse_trainer(trainer: Trainer, pl_module: LightningModule) -> None:
    """Raise if something that is known before the model is set up is not private."""
    strategy = type(trainer.strategy).__name__
    callbacks = [
        kind.__name__
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        # of all bases, by name: either copy of Lightning may have made it, or it is a subclass
        for kind in type(callback).__mro__
    ]
    overfits = bool(trainer.overfit_batches)  # type: ignore[attr-defined]
    refusals = {
        "automatic optimization, found manual; use `DPOptimizer` with `curvature(...)` in a loop "
        "of your own": (not pl_module.automatic_optimization),
        "`gradient_clip_val=None`, found a value: `DPOptimizer(clip_norm=...)` clips every sample "
        "instead": (trainer.gradient_clip_val is not None),
        "no gradient scaler, found precision '16-mixed': skipped steps depend on the data; use "
        "'bf16-mixed' or 32": (getattr(trainer.precision_plugin, "scaler", None) is not None),
        f"a strategy that keeps parameters apart from each other, found {strategy}; use one "
        "device, 'ddp', or `ModelParallelStrategy` with `fully_shard`": (
            any(name in strategy for name in ("FSDP", "DeepSpeed"))
        ),
        "a constant `accumulate_grad_batches`, found a GradientAccumulationScheduler; remove it": (
            "GradientAccumulationScheduler" in callbacks
        ),
        "a `training_step` that gets its batch, found `dataloader_iter`: a step must take one "
        "batch": ("dataloader_iter" in inspect.signature(pl_module.training_step).parameters),
        f"processes that live as long as the account, found spawned or forked ones ({strategy}): "
        "made anew for every `fit`, they would forget what was spent; use 'ddp'": (
            "MultiProcessing" in type(trainer.strategy.launcher).__name__
        ),
        "`overfit_batches=0`, found another value; limit the data set itself": overfits,
    }
    for message, refused in refusals.items():
        if refused:
            raise MisconfigurationException(f"PrivacyCallback needs {message}.")
    source = trainer.fit_loop._data_source
    if (
        source.instance is not None and not source.is_module()
    ):  # else it is a hook that may need `setup` first
        require_plain_loader(source.instance)


def refuse_batch_statistics(pl_module: LightningModule) -> None:
    """Raise if a layer normalises with statistics of the batch."""
    for name, module in pl_module.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise MisconfigurationException(
                f"PrivacyCallback needs samples that do not influence each other, found `{name}` "
                f"({type(module).__name__}) in training mode. Use GroupNorm or LayerNorm, or fix "
                "its statistics with `.eval()`."
            )


def refuse_half_precision(optimizer: DPOptimizer) -> None:
    """Raise if parameters are coarser than float32, so that all of the network is."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            dtype = dtype_in_graph(parameter)
            if torch.finfo(dtype).eps > torch.finfo(torch.float32).eps:
                raise MisconfigurationException(
                    "PrivacyCallback needs `same_shapes=True` where parameters are of half "
                    f"precision, found {dtype}: the last digits of a sample may depend "
                    "on how many others were drawn, and there are so few digits that the clip norm "
                    "would bound nothing. Pass it, or train in 'bf16-mixed' or 32."
                )


def settings_of(optimizer: DPOptimizer) -> dict[str, Any]:
    """What a private step is made of besides its batch; learning rates follow anything public."""
    return {
        "noise_multiplier": optimizer.noise_multiplier,
        "clip_norm": optimizer.clip_norm,
        "clip_norm of the groups": [group.get("clip_norm") for group in optimizer.param_groups],
        "clipping": id(optimizer.clipping),
        "expected_batch_size": optimizer.expected_batch_size,
        "loss_scale": optimizer.loss_scale,
    }


def private_optimizer(trainer: Trainer) -> DPOptimizer:
    """The one optimizer; raise if there are others."""
    optimizers: list[Any] = trainer.optimizers
    if len(optimizers) != 1 or not isinstance(optimizers[0], DPOptimizer):
        names = ", ".join(type(optimizer).__name__ for optimizer in optimizers) or "none"
        raise MisconfigurationException(
            f"PrivacyCallback expects one `DPOptimizer`, found {names}; return "
            "`DPOptimizer(your_optimizer, clip_norm=...)` from `configure_optimizers`."
        )
    return optimizers[0]
