"""`CurvatureCallback` leaves nothing behind; loggers, checkpoints, processes, import names and the CLI."""

import copy
import inspect
import pickle

import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from monitoring import (
    CONSTANT,
    TAGS,
    WITH_TRACE,
    Net,
    assert_logged_values_are_true,
    assert_nothing_left_behind,
    assert_same_parameters,
    data,
    fit,
    kfac,
    series,
)
from packages import needs
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler

import lightning_curv
from lightning_curv import CurvatureCallback, KFACOptimizer
from lightning_curv.engine.sum_check import SumCheck

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:At step .* are too small:UserWarning"
    ),  # they are, for speed
    pytest.mark.filterwarnings(
        "ignore:(?s).*(deprecated in v4|LightningCLI's args)"
    ),  # Lightning and jsonargparse
]


@pytest.mark.parametrize(
    "where", ["training_step", "on_before_backward", "on_after_backward", "optimizer_step"]
)
def test_an_exception_in_the_middle_of_a_step_leaves_nothing_and_a_second_fit_works(
    tmp_path, where
):
    def fail(*args, **kwargs):
        raise ZeroDivisionError("on purpose")

    net, callback = Net(), CurvatureCallback()
    broken = copy.deepcopy(net)
    if where == "training_step":
        broken.loss = fail
    else:
        setattr(broken, where, fail)
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        fit(broken, callback)
    if where != "training_step":
        delattr(broken, where)
    broken.loss = net.loss
    assert_nothing_left_behind(broken)
    fit(broken, CurvatureCallback(), tmp_path=tmp_path)
    broken.seen = broken.seen[-8:]
    assert_logged_values_are_true(broken, tmp_path, range(8))


def test_a_patch_of_the_user_is_kept():
    net = Net()
    own = net.training_step
    net.training_step = lambda batch, batch_idx: 2 * own(batch, batch_idx)
    patch = net.training_step
    fit(net, CurvatureCallback())
    assert net.training_step is patch


def test_unsupported_model_raises_or_warns_once():
    class Normed(Net):
        def __init__(self):
            super().__init__()
            self.net.append(nn.BatchNorm1d(3))

    with pytest.raises(RuntimeError, match=r"(?i)batch.?norm"):
        fit(Normed(), CurvatureCallback(["default", "sample_norms"]))
    net = Normed()
    with pytest.warns(
        UserWarning, match="CurvatureCallback logs .* leaves out sample_norms"
    ) as caught:
        trainer = fit(net, CurvatureCallback())
    assert sum("CurvatureCallback" in str(warning.message) for warning in caught) == 1
    logged = {name for name in trainer.callback_metrics if name.startswith("curvature")}
    assert logged == {"curvature/grad_norm", "curvature/ggn_trace"}  # need no sample
    assert_nothing_left_behind(net)


def test_a_failed_check_raises_or_trains_on_without_logging(monkeypatch):
    def fail(*args):
        raise RuntimeError("on purpose")

    monkeypatch.setattr(SumCheck, "compare", fail)
    with pytest.raises(RuntimeError, match=r"on purpose.*`strict=False` trains on"):
        fit(Net(), CurvatureCallback(["grad_variance"]))
    plain, watched = Net(optimizer=kfac), Net(optimizer=kfac)
    fit(plain, CurvatureCallback(every_n_steps=0))
    with pytest.warns(
        UserWarning, match="CurvatureCallback stops logging .*grad_variance.*: on purpose"
    ):
        fit(watched, CurvatureCallback())
    assert_same_parameters(plain, watched)
    assert_nothing_left_behind(watched)


def test_fast_dev_run_and_other_loggers(tmp_path):
    fit(Net(), CurvatureCallback(), fast_dev_run=True, log_every_n_steps=50)
    trainer = fit(Net(), CurvatureCallback(), logger=CSVLogger(tmp_path))
    assert "curvature/noise_scale" in trainer.logger.experiment.metrics_keys
    trainer = fit(Net(), CurvatureCallback(), logger=False)
    assert trainer.callback_metrics["curvature/grad_norm"] > 0


def test_early_stopping_can_watch_a_quantity():
    stop = pl.callbacks.EarlyStopping(
        "curvature/grad_norm", stopping_threshold=1e9, check_on_train_epoch_end=True
    )
    trainer = fit(Net(), CurvatureCallback(), stop, epochs=5)
    assert trainer.current_epoch == 1


def test_resumed_run_continues_the_series(tmp_path):
    whole, part = Net(), Net()
    fit(whole, CurvatureCallback(WITH_TRACE), tmp_path=tmp_path / "whole")
    trainer = fit(part, CurvatureCallback(WITH_TRACE), epochs=1, tmp_path=tmp_path / "first")
    trainer.save_checkpoint(tmp_path / "checkpoint")
    trainer = pl.Trainer(
        max_epochs=2,
        callbacks=[CurvatureCallback(WITH_TRACE)],
        logger=TensorBoardLogger(tmp_path / "second", name="", version=""),
        log_every_n_steps=1,
        precision="64-true",
        **CONSTANT,
    )
    strictly = (
        {"weights_only": True}
        if "weights_only" in inspect.signature(trainer.fit).parameters
        else {}
    )
    trainer.fit(
        part, DataLoader(data(), batch_size=6), ckpt_path=tmp_path / "checkpoint", **strictly
    )
    for name in ("ggn_trace", "grad_variance", "noise_scale"):
        resumed = series(tmp_path / "second", name)
        assert resumed == {
            step: value for step, value in series(tmp_path / "whole", name).items() if step >= 4
        }
        assert resumed


def test_compiled_modules_run_eagerly_when_logged(tmp_path):
    net = Net()
    net.net = torch.compile(net.net, backend="eager")
    fit(net, CurvatureCallback(every_n_steps=2), tmp_path=tmp_path)
    assert list(series(tmp_path, "grad_norm")) == [1, 3, 5, 7]


def test_callback_can_be_pickled_and_copied():
    callback = CurvatureCallback(every_n_steps=3)
    fit(Net(), callback)
    assert pickle.loads(pickle.dumps(callback)).every_n_steps == 3
    assert copy.deepcopy(callback).state_dict() == callback.state_dict()


def test_values_of_two_processes_equal_those_of_one(tmp_path):
    """Lightning's sampler deals shuffled samples out to the processes in turn."""
    one, two = tmp_path / "one", tmp_path / "two"
    x, y = data().tensors
    batches = torch.tensor(list(DistributedSampler(data(), num_replicas=1, rank=0))).split(6)
    fit(
        Net(),
        CurvatureCallback(mc_samples=0),
        tmp_path=one,
        epochs=1,
        loader=[(x[i], y[i]) for i in batches],
    )
    fit(
        Net(),
        CurvatureCallback(mc_samples=0),
        tmp_path=two,
        epochs=1,
        batch_size=3,
        strategy="ddp_spawn",
        devices=2,
    )
    for name in ("grad_norm", "grad_variance", "grad_signal", "noise_scale"):
        assert series(two, name) == pytest.approx(series(one, name), rel=1e-5)
        assert series(two, name)


def test_either_import_name_trains_with_the_callback_and_kfac(tmp_path):
    lightning = needs("lightning.pytorch")
    assert issubclass(lightning_curv.CurvatureCallback, pl.Callback)
    assert issubclass(lightning_curv.CurvatureCallback, lightning.Callback)

    class Other(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net().net

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return kfac(self.parameters())

    trainer = lightning.Trainer(
        max_epochs=1,
        callbacks=[CurvatureCallback(WITH_TRACE)],
        logger=lightning.loggers.TensorBoardLogger(tmp_path, name="", version=""),
        log_every_n_steps=1,
        accelerator="cpu",
        precision="64-true",
        **CONSTANT,
    )
    module, reference = Other(), Net(optimizer=kfac)
    torch.manual_seed(2)
    trainer.fit(module, DataLoader(data(), batch_size=6))
    fit(reference, CurvatureCallback(WITH_TRACE), tmp_path=tmp_path / "reference", epochs=1)
    assert_same_parameters(module.net, reference.net)
    for tag in TAGS:
        name = tag.removeprefix("curvature/")
        assert series(tmp_path, name) == series(tmp_path / "reference", name)


CONFIG = """
trainer:
  max_epochs: 1
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_checkpointing: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_curv.CurvatureCallback
      init_args: {quantities: [default, norm_test], every_n_steps: 2, layers: topk, output: net, strict: false}
optimizer:
  class_path: lightning_curv.KFACOptimizer
  init_args: {lr: 0.1, damping: 0.05, factor_interval: 2}
"""


@pytest.mark.parametrize("import_name", ["pytorch_lightning", "lightning.pytorch"])
def test_lightning_cli_builds_callback_and_optimizer_from_yaml(tmp_path, import_name):
    needs("jsonargparse")
    lightning = needs(import_name)
    cli = needs(f"{import_name}.cli")

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net().net

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def train_dataloader(self):
            return DataLoader(data(dtype=torch.float32), batch_size=6)

    (tmp_path / "config.yaml").write_text(CONFIG)
    arguments = ["fit", f"--config={tmp_path / 'config.yaml'}", "--optimizer.damping=0.2"]
    trainer = cli.LightningCLI(
        Model, args=arguments, save_config_callback=None, seed_everything_default=False
    ).trainer
    [optimizer] = trainer.optimizers
    assert type(optimizer) is KFACOptimizer
    assert optimizer.steps == 4
    assert optimizer.param_groups[0]["damping"] == 0.2
    assert trainer.callback_metrics["curvature/grad_norm"] > 0
    assert trainer.callback_metrics["curvature/norm_test"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_steps": -1}, "`every_n_steps` must be None, 0 or positive, found -1"),
        ({"ema": 1.0}, r"`ema` must be in \[0, 1\), found 1.0"),
        ({"mc_samples": -1}, "`mc_samples` must be 0 or positive, found -1"),
    ],
)
def test_bad_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        CurvatureCallback(**settings)


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_strategies_that_shard_parameters_are_refused_by_name(name):
    class Sharded(pl.strategies.SingleDeviceStrategy):
        pass

    Sharded.__name__ = name
    with pytest.raises(
        MisconfigurationException, match=f"parameters apart from each other, found {name}; use"
    ):
        fit(Net(), CurvatureCallback(), strategy=Sharded(torch.device("cpu")), accelerator="auto")
