"""What users set in a Trainer: logged values against brute force, and parameters with and without monitoring."""

import pytest
import pytorch_lightning as pl
import torch
from monitoring import (
    CONSTANT,
    ManualNet,
    Net,
    Scaled,
    assert_logged_values_are_true,
    assert_nothing_left_behind,
    assert_same_parameters,
    data,
    expected,
    fit,
    kfac,
    per_sample_gradients,
    series,
    sgd,
)
from pytorch_lightning.callbacks import StochasticWeightAveraging
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_curv import CurvatureCallback

pytestmark = pytest.mark.filterwarnings(
    "ignore:At step .* are too small:UserWarning",  # they are, for speed
    "ignore:(?s).*(val_dataloader|training_step` returned `None|Detected call of `lr_scheduler|no `val_dataloader)",
)


class Dict(Net):
    def training_step(self, batch, batch_idx):
        return {"loss": super().training_step(batch, batch_idx), "more": torch.ones(3)}


class Sometimes(Net):
    """Every third batch is left out."""

    def training_step(self, batch, batch_idx):
        return None if batch_idx % 3 == 1 else super().training_step(batch, batch_idx)


class Validated(Net):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(self(batch[0]), batch[1]))

    def val_dataloader(self):
        return DataLoader(data(dtype=self.dtype), batch_size=6)


class Adversaries(ManualNet):
    """Two optimizers in turn, the second on a loss of opposite sign: `toggle_optimizer` as in a GAN."""

    def configure_optimizers(self):
        return sgd(self.net[0].parameters()), sgd(self.net[3].parameters())

    def training_step(self, batch, batch_idx):
        for sign, optimizer in zip((1, -1), self.optimizers()):
            self.toggle_optimizer(optimizer)
            loss = Net.training_step(self, batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(sign * loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)


def several(output, y):
    return F.cross_entropy(output, y) + 0.1 * F.mse_loss(output, F.one_hot(y, 3).to(output)) / 2


def ema():
    averaging = getattr(pl.callbacks, "EMAWeightAveraging", None)
    return [averaging(decay=0.5)] if averaging else []


ROWS = {
    "plain": (Net, {}),
    "accumulation whose last window is shorter": (Net, {"accumulate_grad_batches": 3}),
    "clipping by norm": (Net, {"gradient_clip_val": 0.1}),
    "clipping by value": (Net, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "manual optimization": (ManualNet, {}),
    "several losses": (lambda **settings: Net(loss=several, **settings), {}),
    "a dict": (Dict, {}),
    "sanity check and validation": (
        Validated,
        {"num_sanity_val_steps": 2, "val_check_interval": 2},
    ),
    "overfit_batches": (Net, {"overfit_batches": 2}),
    "limit_train_batches": (Net, {"limit_train_batches": 3}),
    "weight averaging": (
        Net,
        {"more": lambda: [StochasticWeightAveraging(0.05, swa_epoch_start=1), *ema()]},
    ),
    "fast_dev_run": (Net, {"fast_dev_run": 2}),
    "detect_anomaly": (Net, {"detect_anomaly": True}),
    "deterministic": (Net, {"deterministic": True}),
    "inference_mode off": (Validated, {"inference_mode": False}),
    "reload_dataloaders": (Net, {"reload_dataloaders_every_n_epochs": 1}),
    "max_steps": (Net, {"max_steps": 5}),
}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("optimizer", [sgd, kfac])
def test_values_are_true_and_parameters_as_without(tmp_path, row, optimizer):
    build, settings = ROWS[row]
    settings = dict(settings)
    more = settings.pop("more", list)
    nets = [build(optimizer=optimizer, dropout=0.0) for _ in range(2)]
    fit(nets[0], CurvatureCallback(every_n_steps=0), *more(), **settings)
    fit(nets[1], CurvatureCallback(), *more(), tmp_path=tmp_path, **settings)
    assert_same_parameters(*nets)
    assert_nothing_left_behind(nets[1])
    if row != "fast_dev_run":  # has no loggers
        assert_logged_values_are_true(
            nets[1], tmp_path, sorted({step for step, *_ in nets[1].seen})
        )


def test_batches_without_a_loss_are_left_out(tmp_path):
    nets = [Sometimes(), Sometimes()]
    fit(nets[0])
    fit(nets[1], CurvatureCallback(mc_samples=0), tmp_path=tmp_path)
    assert_same_parameters(*nets)
    steps = [step for step, *_ in nets[1].seen]
    assert steps == [0, 2, 3, 4, 6, 7]
    assert_logged_values_are_true(nets[1], tmp_path, steps)
    assert list(series(tmp_path, "grad_norm")) == steps


def test_two_optimizers_that_take_turns(tmp_path):
    nets = [Adversaries(), Adversaries()]
    fit(nets[0])
    fit(nets[1], CurvatureCallback(mc_samples=0), tmp_path=tmp_path)
    assert_same_parameters(*nets)
    for index, columns in enumerate((slice(0, 30), slice(30, None))):
        turn = Net()
        for step in range(8):
            turn.seen = [[seen for seen in nets[1].seen if seen[0] == step][index]]
            values = expected(per_sample_gradients(turn, step)[:, columns])
            for name in ("grad_norm", "grad_variance", "sample_norm_max"):
                assert series(tmp_path, f"{name}/optimizer_{index}")[step] == pytest.approx(
                    values[name], rel=1e-5
                )


class Tunable(Net):
    lr, batch_size = 0.1, 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def train_dataloader(self):
        return DataLoader(data(), batch_size=self.batch_size)


@pytest.mark.parametrize("tool", ["lr_find", "scale_batch_size"])
def test_tuners_find_the_same_and_disturb_nothing(tmp_path, tool):
    found, nets = [], [Tunable(), Tunable()]
    settings = {
        "lr_find": {"num_training": 20},
        "scale_batch_size": {"max_trials": 2, "steps_per_trial": 2},
    }
    for net, callbacks in zip(nets, ([], [CurvatureCallback(mc_samples=0)])):
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            precision="64-true",
            callbacks=callbacks,
            log_every_n_steps=1,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            logger=pl.loggers.TensorBoardLogger(tmp_path / str(len(found)), name="", version=""),
        )
        result = getattr(pl.tuner.Tuner(trainer), tool)(net, **settings[tool])
        found.append(result.suggestion() if tool == "lr_find" else result)
        net.seen.clear()
        trainer.fit(net)
    assert found[0] == found[1]
    assert_same_parameters(*nets)
    assert_nothing_left_behind(nets[1])
    assert_logged_values_are_true(
        nets[1], tmp_path / "1", sorted({step for step, *_ in nets[1].seen})
    )


class TunableKFAC(Tunable):
    def configure_optimizers(self):
        return kfac(self.parameters())


def test_tuners_name_why_a_curvature_optimizer_cannot_be_tuned(tmp_path):
    trainer = pl.Trainer(
        accelerator="cpu",
        precision="64-true",
        callbacks=[CurvatureCallback()],
        default_root_dir=tmp_path,
        **CONSTANT,
    )
    with pytest.raises(
        RuntimeError, match="tuners run without callbacks: tune with another optimizer"
    ):
        pl.tuner.Tuner(trainer).scale_batch_size(TunableKFAC(), max_trials=1, steps_per_trial=1)


def test_a_second_fit_with_the_same_objects(tmp_path):
    net, callback = Net(), CurvatureCallback(mc_samples=0)
    trainer = fit(net, callback, tmp_path=tmp_path, epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(net, DataLoader(data(), batch_size=6))
    assert_logged_values_are_true(net, tmp_path, range(8))
    other = Net()
    fit(other, callback, tmp_path=tmp_path / "other", epochs=1)
    assert list(series(tmp_path / "other", "grad_norm")) == [0, 1, 2, 3]


class Skips(Scaled):
    """A scaler that overflows in the third and the sixth step."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def optimizer_step(self, optimizer, model, closure, **kwargs):
        def infinite():
            result = closure()
            if self.calls in (2, 5):
                next(model.parameters()).grad[0, 0] = torch.inf
            self.calls += 1
            return result

        return super().optimizer_step(optimizer, model, infinite, **kwargs)


PRECISIONS = {
    "32-true": ({"precision": "32-true"}, 1e-4),
    "64-true": ({"precision": "64-true"}, 1e-6),
    "bf16-true": ({"precision": "bf16-true"}, 0.03),
    "bf16-mixed": ({"precision": "bf16-mixed"}, 0.03),
    "16-mixed": ({"precision": None, "plugins": [Scaled]}, 1e-4),
    "16-mixed that skips steps": ({"precision": None, "plugins": [Skips]}, 1e-4),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("optimizer", [sgd, kfac])
def test_precision(tmp_path, precision, optimizer):
    """Norms and moments against float64, from the parameters as they are rounded."""
    settings, tolerance = PRECISIONS[precision]
    nets = [Net(optimizer=optimizer), Net(optimizer=optimizer)]
    for net, folder, callback in zip(
        nets, (None, tmp_path), (CurvatureCallback(every_n_steps=0), CurvatureCallback())
    ):
        plugins = [plugin() for plugin in settings.get("plugins", [])]
        fit(net, callback, tmp_path=folder, **settings | {"plugins": plugins})
    assert_same_parameters(*nets)
    reference = nets[1].double()
    reference.seen = [
        (step, {name: p.double() for name, p in params.items()}, (x.double(), y))
        for step, params, (x, y) in reference.seen
    ]
    skipped = (2, 5) if precision.endswith("steps") else ()
    for step in set(range(8)) - {*skipped}:
        for name, value in expected(per_sample_gradients(reference, step)).items():
            if name != "grad_signal":  # a small difference of large numbers
                assert series(tmp_path, name)[step] == pytest.approx(value, rel=tolerance), (
                    name,
                    step,
                )
    assert not {*skipped} & {*series(tmp_path, "grad_norm")}
