"""Checkpoints in the middle of an epoch, checkpoints of other software, and every form of `configure_optimizers`."""

import os
import signal
import warnings
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from monitoring import CONSTANT, Net, assert_same_parameters, data, fit, kfac, series, sgd
from processes import spawn
from pytorch_lightning.loggers import TensorBoardLogger
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader

from lightning_curv import CurvatureCallback, CurvatureStepSize, DiagGGNOptimizer, KFACOptimizer

pytestmark = pytest.mark.filterwarnings(
    "ignore:At step .* are too small:UserWarning",  # they are, for speed
    # the steps choose their data
    "ignore:(?s).*(resuming from a checkpoint that ended before|not resumable)",
)
QUANTITIES = ["default", "ggn_trace", "distance", "update_size"]


class Stepwise(Net):
    """The batch of a step does not depend on where the loader of a resumed run starts."""

    def training_step(self, batch, batch_idx):
        position = self.trainer.fit_loop.epoch_loop.total_batch_idx % 4
        return super().training_step(
            tuple(t[6 * position : 6 * position + 6] for t in data().tensors), batch_idx
        )


class Save(pl.Callback):
    """A checkpoint in the middle of the second epoch."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, *args):
        if trainer.fit_loop.epoch_loop._batches_that_stepped == 5:
            trainer.save_checkpoint(self.path)


def resume(net, path, callbacks, folder):
    trainer = pl.Trainer(
        max_epochs=2,
        max_steps=8,  # Lightning 2.4 repeats the batch at whose end the checkpoint was saved
        accelerator="cpu",
        precision="64-true",
        log_every_n_steps=1,
        callbacks=callbacks,
        logger=TensorBoardLogger(folder, name="", version=""),
        **CONSTANT,
    )
    trainer.fit(net, DataLoader(data(), batch_size=6), ckpt_path=path)
    return trainer


def uncounted(trainer):
    """Steps that the loggers' count lacks: Lightning 2.4 forgets the one at whose end it saved the checkpoint."""
    return 8 - trainer.fit_loop.epoch_loop._batches_that_stepped


BUILD = {
    "kfac": kfac,
    "automatic": KFACOptimizer,
    "eigenbasis": lambda params: KFACOptimizer(params, lr=0.1, eigen=True, inverse_interval=3),
    "seldom": lambda params: KFACOptimizer(params, lr=0.1, factor_interval=3, inverse_interval=5),
    "diagonal": DiagGGNOptimizer,
    "step size": lambda params: CurvatureStepSize(
        torch.optim.AdamW(params), interval=2, max_samples=4
    ),
    "sgd": sgd,
}


@pytest.mark.parametrize(("optimizer", "most"), [*((name, None) for name in BUILD), ("sgd", 4)])
def test_a_run_resumed_in_the_middle_of_an_epoch_is_the_same_bit_for_bit(tmp_path, optimizer, most):
    # Lightning loads a checkpoint before it converts the module to float64.
    whole, part = (Stepwise(optimizer=BUILD[optimizer]).double() for _ in range(2))
    one, other = (CurvatureCallback(QUANTITIES, max_samples=most) for _ in range(2))
    fit(whole, one, Save(tmp_path / "checkpoint"), tmp_path=tmp_path / "whole")
    trainer = resume(part, tmp_path / "checkpoint", [other], tmp_path / "part")
    assert trainer.global_step == 8
    assert_same_parameters(whole, part)
    for name in (
        "grad_norm",
        "grad_variance",
        "noise_scale",
        "ggn_trace",
        "distance",
        "update_size",
    ):
        after = {
            step - uncounted(trainer): value
            for step, value in series(tmp_path / "whole", name).items()
            if step > 5
        }
        assert series(tmp_path / "part", name) == after
        assert after or name == "noise_scale"


class Kill(pl.Callback):
    """The end of the process, without a chance to write anything, one step after the checkpoint."""

    def on_train_batch_end(self, trainer, *args):
        if trainer.fit_loop.epoch_loop._batches_that_stepped == 6:
            os.kill(os.getpid(), signal.SIGKILL)


KILLED = ["kfac", "automatic", "eigenbasis", "diagonal", "sgd"]


def killed(rank, folder):
    """Every run in a process of its own, which is not started anew: that takes long."""
    for name in KILLED:
        process = os.fork()
        if not process:
            path = Path(folder) / name
            net = Stepwise(optimizer=BUILD[name]).double()
            callback = CurvatureCallback(QUANTITIES)
            fit(net, callback, Save(path / "checkpoint"), Kill(), tmp_path=path / "killed")
            os._exit(1)
        assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """What is left of runs whose processes were killed."""
    folder = tmp_path_factory.mktemp("killed")
    spawn(killed, str(folder), world=1)
    return folder


@pytest.mark.parametrize("optimizer", KILLED)
def test_a_run_whose_process_was_killed_goes_on_bit_for_bit(tmp_path, checkpoints, optimizer):
    whole, part = (Stepwise(optimizer=BUILD[optimizer]).double() for _ in range(2))
    fit(whole, CurvatureCallback(QUANTITIES), tmp_path=tmp_path / "whole")
    saved = checkpoints / optimizer / "checkpoint"
    resume(part, saved, [CurvatureCallback(QUANTITIES)], tmp_path / "part")
    assert_same_parameters(whole, part)


def test_a_checkpoint_of_another_optimizer_without_our_state_loads_with_warnings(tmp_path):
    """Settings and curvature start anew, parameters and loops go on."""
    trained = Stepwise().double()
    fit(trained, Save(tmp_path / "checkpoint"))
    net = Stepwise(optimizer=kfac).double()
    with pytest.warns(
        UserWarning, match="checkpoint holds no state of CurvatureCallback.*start anew"
    ) as caught:
        trainer = resume(net, tmp_path / "checkpoint", [CurvatureCallback()], tmp_path / "part")
    assert any("without the state of KFACOptimizer" in str(warning.message) for warning in caught)
    assert trainer.global_step == 8
    assert trainer.optimizers[0].steps == 2
    assert trainer.optimizers[0].param_groups[0]["damping"] == 0.1
    assert [step + uncounted(trainer) for step in series(tmp_path / "part", "grad_norm")] == [6, 7]


def test_a_new_run_and_a_resumed_one_do_not_warn(tmp_path):
    net = Stepwise()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "checkpoint holds no state")
        fit(net, CurvatureCallback(), Save(tmp_path / "checkpoint"))
        resume(net, tmp_path / "checkpoint", [CurvatureCallback()], tmp_path / "part")


def plateau(optimizer):
    return {"scheduler": ReduceLROnPlateau(optimizer), "monitor": "loss"}


FORMS = {
    "optimizer": lambda o: o,
    "list": lambda o: [o],
    "tuple": lambda o: (o,),
    "lists with scheduler": lambda o: ([o], [StepLR(o, 2)]),
    "lists with settings": lambda o: ([o], [{"scheduler": StepLR(o, 2), "interval": "step"}]),
    "dict": lambda o: {"optimizer": o},
    "dict with scheduler": lambda o: {"optimizer": o, "lr_scheduler": StepLR(o, 1)},
    "dict with settings": lambda o: {
        "optimizer": o,
        "lr_scheduler": {"scheduler": StepLR(o, 2), "interval": "step"},
    },
    "dict with plateau": lambda o: {"optimizer": o, "lr_scheduler": plateau(o)},
}


class Formed(Net):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return FORMS[self.form](self.optimizer(self.parameters()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("optimizer", [sgd, kfac])
def test_every_form_of_configure_optimizers(form, optimizer):
    nets = [Formed(optimizer=optimizer), Formed(optimizer=optimizer)]
    for net, callback in zip(nets, (CurvatureCallback(every_n_steps=0), CurvatureCallback())):
        net.form = form
        trainer = fit(net, callback)
    assert_same_parameters(*nets)
    assert trainer.callback_metrics["curvature/grad_norm"] > 0


def test_no_optimizer_at_all():
    class Still(Net):
        def configure_optimizers(self):
            return None

    net = Still()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(net, CurvatureCallback())
    assert_same_parameters(net, Net().double())


def test_a_scheduler_acts_on_curvature_optimizers():
    net = Formed(optimizer=kfac)
    net.form = "dict with settings"
    trainer = fit(net, CurvatureCallback())
    group = trainer.optimizers[0].param_groups[0]
    assert (group["lr"], group["base_lr"]) == (pytest.approx(0.1 * 0.1**4), 0.1)
