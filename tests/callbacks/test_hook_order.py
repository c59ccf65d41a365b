"""What Lightning's own tests of its hooks look at: with the callback in the Trainer nothing else changes.

Every hook of the module, of another callback and of the logger is called in the same order, in the
same state of the trainer, the module and the random generators; progress, metrics, gradients and
checkpoints are those of the run without.
"""

import inspect
from unittest.mock import Mock

import pytest
import pytorch_lightning as pl
import torch
from monitoring import CONSTANT, ManualNet, Net, data, kfac, sgd
from pytorch_lightning.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from torch.utils.data import DataLoader

from lightning_curv import CurvatureCallback

pytestmark = pytest.mark.filterwarnings(
    "ignore:(?s).*(are too small|`training_step` returned `None`|CurvatureCallback logs)"
)
OWN_HOOKS = [
    "forward",
    "training_step",
    "validation_step",
    "test_step",
    "predict_step",
    "backward",
    "optimizer_step",
    "optimizer_zero_grad",
    "lr_scheduler_step",
    "configure_gradient_clipping",
    "configure_optimizers",
    "configure_callbacks",
]


def hooks_of(*classes):
    return sorted(
        name
        for room in classes
        for name, hook in vars(room).items()
        if not name.startswith("_") and inspect.isfunction(hook)
    )


def state(trainer, module):
    """All that a hook of the user's can see."""
    gradients = [p.grad.double().sum().item() for p in module.parameters() if p.grad is not None]
    return (
        trainer.global_step,
        trainer.current_epoch,
        trainer.state.stage,
        trainer.should_stop,
        trainer.num_training_batches,
        module.training,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.random.get_rng_state().double().sum().item(),
        [p.requires_grad for p in module.parameters()],
        gradients,
        sorted(key for key in trainer.callback_metrics if not key.startswith("curvature/")),
        sorted(key for key in trainer.progress_bar_metrics if not key.startswith("curvature/")),
    )


def spied(build, calls):
    """A class whose hooks note that they were called, and in which state."""

    def spy(name, hook):
        def call(self, *args, **kwargs):
            trainer = self._trainer
            calls.append((name, () if trainer is None else state(trainer, self)))
            return hook(self, *args, **kwargs)

        return call

    names = [*hooks_of(ModelHooks, DataHooks, CheckpointHooks), *OWN_HOOKS]
    # To override these says something else: loaders are given to the Trainer, the other is deprecated.
    names = [n for n in names if "dataloader" not in n and n != "configure_sharded_model"]
    hooks = {name: spy(name, getattr(build, name)) for name in names if hasattr(build, name)}
    return type(f"Spied{build.__name__}", (build,), hooks)


class Spy(pl.Callback):
    """Another callback, beside ours."""


def spying(calls, index):
    def spy(name):
        def call(self, trainer, module, *args, **kwargs):
            calls.append((f"callback {index} {name}", state(trainer, module)))

        return call

    names = [n for n in hooks_of(pl.Callback) if n.startswith("on_") and "exception" not in n]
    return type("Spying", (Spy,), {name: spy(name) for name in names})()


class Whole(Net):
    """A module that uses most of Lightning."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss, prog_bar=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(self(batch[0]), batch[1]), prog_bar=True)

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters())
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class Manual(ManualNet):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(self(batch[0]), batch[1]))


class Without(Whole):
    """A module that leaves every third batch out."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) if batch_idx % 3 else None


class Closure(Whole):
    """An optimizer that calls the closure several times."""

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), max_iter=3)


class Skipping(Whole):
    """A hook that leaves the rest of an epoch out."""

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 2 else None


ROWS = {
    "plain": (Whole, {}),
    "manual optimization": (Manual, {}),
    "accumulation": (Whole, {"accumulate_grad_batches": 3}),
    "clipping": (Whole, {"gradient_clip_val": 0.1}),
    "batches without a loss": (Without, {}),
    "closures that are called again": (Closure, {}),
    "a hook that ends epochs": (Skipping, {}),
    "validation within epochs": (Whole, {"val_check_interval": 2}),
    "fast_dev_run": (Whole, {"fast_dev_run": True}),
    "overfit_batches": (Whole, {"overfit_batches": 2}),
    "no limit but a time": (Whole, {"max_time": "00:01:00:00"}),
    "steps": (Whole, {"max_steps": 5, "max_epochs": -1}),
}


def run(build, optimizer, added, folder, settings):
    calls = []
    torch.manual_seed(0)
    net = spied(build, calls)(optimizer=optimizer, dropout=0.5)
    logger = Mock(spec=pl.loggers.Logger, save_dir=str(folder), version=0)
    logger.configure_mock(name="mock")
    callbacks = [spying(calls, 0), *added, spying(calls, 1)]
    trainer = pl.Trainer(
        **{
            "max_epochs": 2,
            "accelerator": "cpu",
            "logger": logger,
            "log_every_n_steps": 1,
            "callbacks": callbacks,
            "default_root_dir": folder,
            **CONSTANT,
            **settings,
        }
    )
    loader = DataLoader(data(dtype=torch.float32), batch_size=6, shuffle=True)
    trainer.fit(net, loader, loader)
    metrics = dict(trainer.callback_metrics)
    if hasattr(net, "predict_step") and build is not Manual:
        trainer.test(net, loader, verbose=False)
        trainer.predict(net, loader)
    checkpoint = (
        {} if settings.get("fast_dev_run") else trainer._checkpoint_connector.dump_checkpoint()
    )
    logged = [
        (call.kwargs or dict(zip(("metrics", "step"), call.args)))
        for call in logger.log_metrics.call_args_list
    ]
    return calls, net.state_dict(), metrics, checkpoint, logged


def others(metrics):
    return {key: value for key, value in metrics.items() if not key.startswith("curvature/")}


@pytest.mark.parametrize(
    ("row", "optimizer"),
    [
        (row, optimizer)
        for row, (build, _) in ROWS.items()
        for optimizer in (sgd, kfac)
        if build is not Closure or optimizer is sgd  # it brings an optimizer of its own
    ],
)
def test_a_run_is_the_same_but_for_what_is_logged(row, optimizer, tmp_path):
    build, settings = ROWS[row]
    idle = [CurvatureCallback(every_n_steps=0)] if optimizer is kfac else []
    calls, weights, metrics, checkpoint, logged = run(
        build, optimizer, idle, tmp_path / "0", settings
    )
    beside = [CurvatureCallback(every_n_steps=1)]
    calls_beside, weights_beside, metrics_beside, checkpoint_beside, logged_beside = run(
        build, optimizer, beside, tmp_path / "1", settings
    )
    assert [name for name, _ in calls] == [name for name, _ in calls_beside]
    for (name, seen), (_, seen_beside) in zip(calls, calls_beside):
        assert seen == seen_beside, name
    assert all(torch.equal(weights[key], weights_beside[key]) for key in weights)
    assert others(metrics) == others(metrics_beside)
    assert any(key.startswith("curvature/") for key in metrics_beside)
    for key in ("epoch", "global_step", "loops", "lr_schedulers"):
        assert checkpoint.get(key) == checkpoint_beside.get(key)
    plain = [(entry["step"], others(entry["metrics"])) for entry in logged]
    monitored = [(entry["step"], others(entry["metrics"])) for entry in logged_beside]
    plain, monitored = ([entry for entry in entries if entry[1]] for entries in (plain, monitored))
    assert plain == monitored
