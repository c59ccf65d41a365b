"""Whatever the logger is, and whatever happens to it, training goes on."""

import warnings
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from monitoring import Net, assert_same_parameters, fit
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from lightning_curv import CurvatureCallback
from lightning_curv.callbacks.monitoring.publish import _is_plain_tensorboard


class Minimal:
    """All that Lightning itself calls, and no more."""

    name = version = save_dir = root_dir = None

    def __init__(self):
        self.seen = []

    def log_metrics(self, metrics, step):
        self.seen.append((metrics, step))

    def log_hyperparams(self, *args, **kwargs):
        pass

    log_graph = save = finalize = after_save_checkpoint = log_hyperparams


class Typed(Logger):
    """A subclass whose experiment fails."""

    name, version = "typed", 0

    def __init__(self):
        super().__init__()
        self.seen = []
        self.experiment = MagicMock()
        self.experiment.add_histogram_raw.side_effect = RuntimeError("no histograms here")

    def log_metrics(self, metrics, step):
        self.seen.append((metrics, step))

    def log_hyperparams(self, params, *args, **kwargs):
        pass


def run(logger, **settings):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        net = Net()
        trainer = fit(net, CurvatureCallback(layout=True), logger=logger, epochs=1, **settings)
    return (
        net,
        trainer,
        [str(w.message) for w in caught if "cannot write to a logger" in str(w.message)],
    )


def test_a_minimal_logger_gets_the_values():
    logger = Minimal()
    net, _, said = run(logger)
    steps = [step for metrics, step in logger.seen if "curvature/grad_norm" in metrics]
    assert steps == [0, 1, 2, 3]
    assert not said
    plain = Net()
    fit(plain, logger=Minimal(), epochs=1)
    assert_same_parameters(plain, net)


def test_a_logger_whose_experiment_fails_gets_the_values_and_one_warning():
    logger = Typed()
    _, _, said = run(logger)
    assert [step for metrics, step in logger.seen if "curvature/grad_norm" in metrics] == [
        0,
        1,
        2,
        3,
    ]
    assert len(said) == 1


@pytest.mark.parametrize("spec", [None, TensorBoardLogger, CSVLogger])
def test_a_mocked_logger_does_not_end_the_run(spec):
    logger = MagicMock() if spec is None else MagicMock(spec=spec)
    logger.save_dir = logger.log_dir = None
    _, trainer, _ = run(logger)
    assert trainer.callback_metrics["curvature/grad_norm"] > 0


def test_a_logger_by_duck_typing_is_not_tensorboard():
    class Duck:
        def __getattr__(self, name):
            return lambda *args, **kwargs: None

    import torch.utils.tensorboard  # noqa: F401

    assert not _is_plain_tensorboard(Duck())


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_a_full_disk_is_one_warning_and_the_values_are_kept(monkeypatch, tmp_path, kind):
    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    logger = kind(tmp_path)
    logger.log_hyperparams({})  # what Lightning itself writes
    monkeypatch.setattr(EventFileWriter, "add_event", full)
    monkeypatch.setattr(type(logger), "log_hyperparams", lambda *args, **kwargs: None)
    if kind is CSVLogger:
        monkeypatch.setattr(CSVLogger, "log_metrics", full)
    net, trainer, said = run(logger)
    assert len(said) == 1
    assert "No space left" in said[0]
    assert trainer.callback_metrics["curvature/grad_norm"] > 0
    plain = Net()
    fit(plain, epochs=1)
    assert_same_parameters(plain, net)


def test_a_folder_that_vanishes_is_no_error(tmp_path):
    logger = CSVLogger(tmp_path / "logs")
    net = Net()

    def vanish(*args):
        raise PermissionError(13, "Permission denied")

    logger.experiment.log_metrics = vanish
    with pytest.warns(UserWarning, match="cannot write to a logger .*Permission denied"):
        trainer = fit(net, CurvatureCallback(), logger=logger, epochs=1)
    assert trainer.callback_metrics["curvature/grad_norm"] > 0


def fill(path):
    """Nothing can be written to a file any more, as on a full disk."""
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/full")


def forbid(path):
    """Nothing can be written to a file any more, not even by who may write everywhere."""
    path.unlink(missing_ok=True)
    path.mkdir()


class Obstructed(Net):
    """What the logger writes to is taken away after the second step; Lightning logs the loss as well."""

    def __init__(self, obstruct):
        super().__init__()
        self.obstruct = obstruct

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        if self.trainer.global_step == 2 and self.obstruct is not None:
            folder = Path(self.logger.log_dir)
            for path in [*folder.glob("events*")] or [folder / "metrics.csv"]:
                self.obstruct(path)
        return loss


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("obstruct", [fill, forbid])
@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_no_space_and_no_permission_in_the_middle_of_a_run(tmp_path, kind, obstruct):
    if obstruct is fill and not Path("/dev/full").exists():  # what Linux has
        obstruct = forbid
    logger, net = kind(tmp_path), Obstructed(obstruct)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(net, CurvatureCallback(), logger=logger, epochs=2)
    said = [str(w.message) for w in caught if "cannot write to a logger" in str(w.message)]
    assert len(said) == 1
    assert trainer.global_step == 8
    assert {"loss", "curvature/grad_norm"} <= trainer.callback_metrics.keys()
    assert not {"log_metrics", "save", "finalize"} & vars(logger).keys()
    plain = Obstructed(None)
    fit(plain, logger=CSVLogger(tmp_path / "plain"), epochs=2)
    assert_same_parameters(plain, net)


def test_a_value_that_a_logger_does_not_take_is_an_error_as_ever():
    class Choosy(Minimal):
        def log_metrics(self, metrics, step):
            if "loss" in metrics:
                raise TypeError("no losses here")

    logger = Choosy()
    with pytest.raises(TypeError, match="no losses here"):
        fit(Obstructed(None), CurvatureCallback(), logger=logger, epochs=1)
