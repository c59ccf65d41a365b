"""Other callbacks of Lightning beside ours, and what users see of both."""

import warnings

import pytest
import torch
from monitoring import Net, assert_same_parameters, data, fit, kfac
from pytorch_lightning.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
)
from pytorch_lightning.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_curv import CurvatureCallback, KFACOptimizer
from lightning_curv.callbacks.curvature import CurvatureCallback as Callback


def automatic(params):
    return KFACOptimizer(params)


class Seen(CSVLogger):
    """All rows."""

    def __init__(self, folder):
        super().__init__(folder)
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append(dict(metrics))


def test_a_monitor_shows_the_steps_that_were_taken(tmp_path):
    taken, logger = [], Seen(tmp_path)

    class Steps(Net):
        def on_train_batch_end(self, *args):
            taken.append(dict(self.optimizers().optimizer.last_step))

    monitor = LearningRateMonitor("step", log_momentum=True)
    net = Steps(optimizer=automatic)
    fit(net, CurvatureCallback(every_n_steps=0), monitor, logger=logger, epochs=1)
    rows = [row for row in logger.rows if "lr-KFACOptimizer" in row]
    rates = [row["lr-KFACOptimizer"] for row in rows]
    assert rates == [0.0, *(step["learning_rate"] for step in taken[:-1])]
    assert 1.0 not in rates
    momenta = [row["lr-KFACOptimizer-momentum"] for row in rows]
    assert momenta == pytest.approx([0.0, *(step["momentum"] for step in taken[:-1])])
    assert not {"_extract_lr", "_extract_momentum"} & vars(monitor).keys()


def test_a_monitor_shows_the_learning_rate_that_was_given(tmp_path):
    logger = Seen(tmp_path)
    monitor = LearningRateMonitor("step", log_momentum=True)
    fit(Net(optimizer=kfac), CurvatureCallback(every_n_steps=0), monitor, logger=logger, epochs=1)
    assert {row["lr-KFACOptimizer"] for row in logger.rows if "lr-KFACOptimizer" in row} == {0.1}


def test_a_monitor_shows_the_schedule_too(tmp_path):
    class Scheduled(Net):
        def configure_optimizers(self):
            optimizer = KFACOptimizer(self.parameters())
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    logger, net = Seen(tmp_path), Scheduled()
    fit(
        net,
        CurvatureCallback(every_n_steps=0),
        LearningRateMonitor("step"),
        logger=logger,
        epochs=1,
    )
    rates = [row["lr-KFACOptimizer"] for row in logger.rows if "lr-KFACOptimizer" in row]
    assert len(rates) == 4
    assert all(0 <= rate != 0.5 for rate in rates)


def test_an_absolute_rate_beside_the_automatic_one_is_named():
    class Backbone(Net):
        def __init__(self):
            super().__init__(optimizer=automatic)
            self.backbone = self.net[0]

        def configure_optimizers(self):
            return KFACOptimizer(self.net[3].parameters())

    with pytest.warns(
        RuntimeWarning, match=r"0\.001, that of a parameter group, is taken as a factor"
    ) as caught:
        fit(
            Backbone(),
            CurvatureCallback(),
            BackboneFinetuning(1, backbone_initial_lr=1e-3),
            epochs=4,
        )
    assert sum("taken as a factor" in str(warning.message) for warning in caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = torch.nn.Linear(2, 2)
        KFACOptimizer([{"params": [layer.weight], "lr": 0.1}, {"params": [layer.bias]}], lr=0.2)
        KFACOptimizer([{"params": [layer.weight]}, {"params": [layer.bias], "lr": 1.0}])


@pytest.mark.parametrize("make", [EarlyStopping, ModelCheckpoint])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_series_that_is_watched_exists_at_the_end_of_every_epoch(tmp_path, make, accumulate):
    where = {"dirpath": tmp_path} if make is ModelCheckpoint else {"check_on_train_epoch_end": True}
    watching = make(monitor="curvature/grad_norm", **where)
    settings = {"log_every_n_steps": 50, "accumulate_grad_batches": accumulate}
    watched, plain = Net(), Net()
    trainer = fit(
        watched,
        CurvatureCallback(),
        watching,
        **settings,
        enable_checkpointing=make is ModelCheckpoint,
    )
    assert trainer.callback_metrics["curvature/grad_norm"] > 0
    fit(plain, **settings)
    assert_same_parameters(plain, watched)
    trainer = fit(Net(), CurvatureCallback(), log_every_n_steps=50)
    assert "curvature/grad_norm" not in trainer.callback_metrics


def test_a_series_that_is_watched_exists_at_every_validation():
    class Validated(Net):
        def validation_step(self, batch, batch_idx):
            pass

        def val_dataloader(self):
            return DataLoader(data(), batch_size=6)

    stop = EarlyStopping("curvature/grad_norm")
    trainer = fit(
        Validated(), CurvatureCallback(), stop, log_every_n_steps=50, val_check_interval=2
    )
    assert stop.best_score > 0
    assert trainer.global_step == 8


def test_rows_of_a_profiler_have_short_names():
    keys = [
        Callback(["default", "norm_test"], every_n_steps=10, layers="topk").state_key,
        Callback().state_key,
        Callback(every_n_steps=3).state_key,
    ]
    assert len({*keys}) == 3
    assert max(map(len, keys)) < 30
    assert keys[1] == Callback().state_key
