"""The account is that of the batches which were drawn: recorded, and composed again by dp-accounting."""

import copy
import pickle
import warnings
from itertools import groupby

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from packages import needs
from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
)

from lightning_curv.callbacks import PrivacyCallback
from lightning_curv.callbacks.private_training.refusals import refuse_trainer
from lightning_curv.optimizers import (
    DPOptimizer,
    EpochSampling,
    PoissonSampling,
    PrivacyAccountant,
    TruncatedPoissonSampling,
)

da = needs("dp_accounting")
DELTA, INTERVAL = 1e-3, 1e-3
# A checkpoint that is saved at the end of a batch counts that batch as not completed. Newer releases
# of Lightning see that when they go on (`restarted_on_train_batch_end`); older ones train one batch
# more. Our account follows either: the batch is drawn anew with the loader's next number, is one
# more release, and is accounted as such. `test_epsilon_is_that_of_the_batches_drawn` compares the
# account with what was drawn, without this constant; it only says how long such a run is.
REPEATED = 0 if hasattr(_TrainingEpochLoop, "restarted_on_train_batch_end") else 1


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Ten times faster, in the oracle too."""
    monkeypatch.setattr("lightning_curv.optimizers.privacy.accounting._INTERVAL", INTERVAL)


class Numbers(Dataset):
    """Samples, targets and their numbers; may grow and shrink."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        x = torch.randn(4, generator=torch.Generator().manual_seed(i))
        return x, i % 3, i


class Net(pl.LightningModule):
    def __init__(self, batch_sizes=(6,), sizes=(60,), **settings):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(4, 3)
        self.batch_sizes, self.sizes, self.data = batch_sizes, sizes, Numbers(sizes[0])
        self.settings = {"clip_norm": 0.5, "noise_multiplier": 1.0, **settings}

    def train_dataloader(self):
        epoch = self.trainer.current_epoch
        self.data.size = self.sizes[min(epoch, len(self.sizes) - 1)]
        return DataLoader(
            self.data, self.batch_sizes[min(epoch, len(self.batch_sizes) - 1)], shuffle=True
        )

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return DPOptimizer(torch.optim.SGD(self.parameters(), lr=0.1), **self.settings)


class Recorder(pl.Callback):
    """What was drawn for every step: the numbers of the samples, the rate, and the gradient that was released."""

    def __init__(self):
        self.drawn, self.rates, self.grads = [], [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.drawn.append(())
            epoch = trainer.current_epoch
            size = (
                module.batch_sizes[min(epoch, len(module.batch_sizes) - 1)]
                * trainer.accumulate_grad_batches
            )
            self.rates.append(size / len(module.data))
        self.drawn[-1] += tuple(batch[2].tolist())

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.grads.append(torch.cat([p.grad.flatten() for p in module.parameters()]))

    def epsilon(self, sigma=1.0):
        """By dp-accounting."""
        accountant = da.pld.PLDAccountant(value_discretization_interval=INTERVAL)
        for rate, steps in groupby(self.rates):
            accountant.compose(
                da.PoissonSampledDpEvent(rate, da.GaussianDpEvent(sigma)), len(list(steps))
            )
        return accountant.get_epsilon(DELTA)


def trainer(*callbacks, **options):
    defaults = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
    }
    quiet = {"enable_model_summary": False, "enable_progress_bar": False}
    return pl.Trainer(callbacks=list(callbacks), **{**defaults, **quiet, **options})


def private(**settings):
    return PrivacyCallback(**{"delta": DELTA, **settings})


class AtEpochEnd(pl.Callback):
    """Something that changes the run while it is running."""

    def __init__(self, change):
        self.change = change

    def on_train_epoch_end(self, trainer, module):
        self.change(trainer, module)


class SaveAt(pl.Callback):
    """A checkpoint after so many batches."""

    def __init__(self, batches, path):
        self.left, self.path = batches, path

    def on_train_batch_end(self, trainer, module, *_):
        self.left -= 1
        if self.left == 0:
            trainer.save_checkpoint(self.path)


# --- everything that may change while a run, or a row of runs, goes on ------------------------------------------------


def one_fit(callback, recorder):
    trainer(callback, recorder).fit(Net())


def parts(callback, recorder):
    trainer(callback, recorder, accumulate_grad_batches=2).fit(Net(batch_sizes=(3,)))


def reloaded_with_larger_batches(callback, recorder):
    run = trainer(callback, recorder, max_epochs=3, reload_dataloaders_every_n_epochs=1)
    run.fit(Net(batch_sizes=(2, 20)))


def reloaded_with_more_data(callback, recorder):
    run = trainer(callback, recorder, max_epochs=3, reload_dataloaders_every_n_epochs=1)
    run.fit(Net(sizes=(60, 90, 30)))


def data_that_grow(callback, recorder):
    change = AtEpochEnd(lambda trainer, module: setattr(module.data, "size", 3 * module.data.size))
    trainer(callback, recorder, change, max_epochs=3).fit(Net(sizes=(20,)))


def data_that_shrink(callback, recorder):
    change = AtEpochEnd(lambda trainer, module: setattr(module.data, "size", 12))
    trainer(callback, recorder, change).fit(Net())


def more_epochs_than_planned(callback, recorder):
    change = AtEpochEnd(lambda trainer, module: setattr(trainer.fit_loop, "max_epochs", 4))
    trainer(callback, recorder, change).fit(Net())


def more_steps_than_planned(callback, recorder):
    change = AtEpochEnd(
        lambda trainer, module: setattr(trainer.fit_loop.epoch_loop, "max_steps", 25)
    )
    trainer(callback, recorder, change, max_steps=13, max_epochs=-1).fit(Net())


def a_second_fit(callback, recorder):
    module = Net()
    for _ in range(3):
        trainer(callback, recorder, max_epochs=1).fit(module)


def a_second_fit_of_one_trainer(callback, recorder):
    run, module = trainer(callback, recorder, max_epochs=1), Net()
    run.fit(module)
    run.fit_loop.max_epochs = 3
    run.fit(module)


def resumed(callback, recorder, path):
    first = trainer(private(), recorder, max_epochs=1)
    first.fit(Net())
    first.save_checkpoint(path)
    trainer(callback, recorder, max_epochs=3).fit(Net(), ckpt_path=path)


def resumed_in_the_middle_of_an_epoch(callback, recorder, path):
    trainer(private(), recorder, SaveAt(13, path), max_steps=13).fit(Net())
    run = trainer(callback, recorder)
    run.fit(Net(), ckpt_path=path)
    assert run.global_step == 20 + REPEATED


def back_to_an_earlier_checkpoint(callback, recorder, path):
    """What was released after the checkpoint stays released."""
    trainer(callback, recorder, SaveAt(4, path), max_steps=9).fit(Net())
    for _ in range(2):
        trainer(callback, recorder, max_epochs=1).fit(Net(), ckpt_path=path)


def run_at(folder, run, callback, recorder):
    """A run, with a place for its checkpoint if it saves one."""
    run(callback, recorder, *([folder / "a.ckpt"] if "path" in run.__code__.co_varnames else []))


RUNS = [
    one_fit,
    parts,
    reloaded_with_larger_batches,
    reloaded_with_more_data,
    data_that_grow,
    data_that_shrink,
    more_epochs_than_planned,
    more_steps_than_planned,
    a_second_fit,
    a_second_fit_of_one_trainer,
    resumed,
    resumed_in_the_middle_of_an_epoch,
    back_to_an_earlier_checkpoint,
]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_epsilon_is_that_of_the_batches_drawn(run, tmp_path):
    callback, recorder = private(), Recorder()
    run_at(tmp_path, run, callback, recorder)
    assert len(recorder.drawn) == sum(count for *_, count in callback.accountant.history)
    assert callback.accountant.epsilon(DELTA) == pytest.approx(recorder.epsilon(), rel=1e-6)
    large = [batch for batch in map(tuple, map(sorted, recorder.drawn)) if len(batch) > 2]
    assert len(large) == len(set(large))  # no batch is drawn twice
    assert len({tuple(grad.tolist()) for grad in recorder.grads}) == len(recorder.grads)


@pytest.mark.parametrize(
    "run", [reloaded_with_larger_batches, reloaded_with_more_data, data_that_grow, data_that_shrink]
)
def test_batches_have_the_rate_that_is_accounted(run):
    recorder = Recorder()
    run(private(seed=5), recorder)
    sizes = {}
    for batch, rate in zip(recorder.drawn, recorder.rates):
        sizes.setdefault(rate, []).append(len(batch) / rate)
    assert len(sizes) > 1
    for rate, numbers in sizes.items():  # each has the size of the data set as its mean
        mean, deviation = (
            sum(numbers) / len(numbers),
            (90 * (1 - rate) / rate / len(numbers)) ** 0.5,
        )
        assert 12 - 5 * deviation <= mean <= 180 + 5 * deviation


# --- the budget ------------------------------------------------------------------------------------------------------

GROWING = [
    reloaded_with_larger_batches,
    data_that_shrink,
    more_epochs_than_planned,
    more_steps_than_planned,
    a_second_fit,
    a_second_fit_of_one_trainer,
    resumed,
    back_to_an_earlier_checkpoint,
]


@pytest.mark.parametrize("run", GROWING, ids=lambda run: run.__name__)
def test_the_budget_is_never_exceeded_and_used(run, tmp_path):
    epsilon = 2.3  # of 23 releases
    callback = private(epsilon=epsilon)
    run_at(tmp_path, run, callback, Recorder())
    assert 0 < callback.accountant.epsilon(DELTA) <= epsilon
    left = callback.accountant.releases_left(epsilon, DELTA, 1.0)
    assert left == (
        2 - 2 * REPEATED if run is back_to_an_earlier_checkpoint else 0
    )  # 9 + 6 + 6 of 23


def test_a_budget_that_is_larger_stops_nothing():
    callback = private(epsilon=2.3)
    one_fit(callback, Recorder())
    assert callback.accountant.history == [(PoissonSampling(0.1), 1.0, 20)]


@pytest.mark.parametrize("change", ["epochs", "steps", "batches"])
def test_noise_that_was_calibrated_stays_and_the_run_stops(change):
    def grow(trainer, module):
        if change == "epochs":
            trainer.fit_loop.max_epochs = 6
        elif change == "steps":
            trainer.fit_loop.epoch_loop.max_steps = 40
            trainer.fit_loop.max_epochs = -1
        else:
            module.batch_sizes = (30,)

    callback = private(epsilon=2.0)
    planned = {"max_steps": 20} if change == "steps" else {"max_epochs": 2}
    run = trainer(callback, AtEpochEnd(grow), reload_dataloaders_every_n_epochs=1, **planned)
    run.fit(Net(noise_multiplier=None))
    assert 1.4 < callback.accountant.epsilon(DELTA) <= 2.0
    assert run.global_step == (10 if change == "batches" else 20)


def test_noise_that_changes_is_accounted_and_allowed_step_by_step():
    class Schedule(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            trainer.optimizers[0].noise_multiplier *= 0.9

    callback, recorder = private(epsilon=5.0), Recorder()
    run = trainer(callback, recorder, Schedule(), max_epochs=9)
    run.fit(Net())
    sigmas = [1.0 * 0.9**k for k in range(run.global_step)]
    assert [sigma for _, sigma, _ in callback.accountant.history] == pytest.approx(sigmas)
    accountant = da.pld.PLDAccountant(value_discretization_interval=INTERVAL)
    for sigma in sigmas:
        accountant.compose(da.PoissonSampledDpEvent(0.1, da.GaussianDpEvent(sigma)))
    assert callback.accountant.epsilon(DELTA) == pytest.approx(
        accountant.get_epsilon(DELTA), rel=1e-6
    )
    assert callback.accountant.epsilon(DELTA) <= 5.0
    assert (
        accountant.compose(
            da.PoissonSampledDpEvent(0.1, da.GaussianDpEvent(0.9 * sigmas[-1]))
        ).get_epsilon(DELTA)
        > 5
    )


def test_noise_that_changes_after_the_batch_was_allowed_is_refused():
    class Late(Net):
        def on_before_backward(self, loss):
            self.trainer.optimizers[0].noise_multiplier *= 0.5

    with pytest.raises(Exception, match="change it between steps"):
        trainer(private(epsilon=5.0)).fit(Late())


@pytest.mark.parametrize(
    "setting", ["noise_multiplier", "clip_norm", "expected_batch_size", "loss_scale", "group"]
)
def test_settings_of_a_step_that_follow_its_batch_are_refused(setting):
    class Following(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            optimizer = self.trainer.optimizers[0]
            if setting == "clip_norm":
                optimizer.clipping.set_clip_norm(float(loss))
            elif setting == "group":
                optimizer.param_groups[0]["clip_norm"] = float(loss)
            else:
                setattr(optimizer, setting, float(loss))
            return loss

    clipping = "per_group" if setting == "group" else "flat"
    with pytest.raises(Exception, match="settings of a private step before its batch is read"):
        trainer(private()).fit(Following(clipping=clipping))


def test_parts_of_a_batch_that_are_dropped_are_refused():
    class Dropping(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if batch_idx % 2 and loss > 0:
                self.trainer.optimizers[0].zero_grad()
            return loss

    with pytest.raises(Exception, match="the sum of 2 backward passes, found one of 1"):
        trainer(private(), accumulate_grad_batches=2).fit(Dropping())


def test_what_an_optimizer_has_spent_before_stays_spent():
    spent = PrivacyAccountant(PoissonSampling(0.3))
    spent.step(2.0)
    callback = private()
    trainer(callback, max_epochs=1).fit(Net(accountant=spent))
    assert callback.accountant.history == [
        (PoissonSampling(0.3), 2.0, 1),
        (PoissonSampling(0.1), 1.0, 10),
    ]
    assert spent.history == callback.accountant.history  # whoever holds it is told of every step
    spent.step(3.0)
    other = private()
    trainer(other, max_epochs=1).fit(Net(accountant=spent))
    assert sum(count for *_, count in other.accountant.history) == 22
    assert spent.history == other.accountant.history
    assert spent.epsilon(DELTA) == other.accountant.epsilon(DELTA)
    copied = copy.deepcopy(spent)
    other.accountant.step(1.0)
    assert sum(count for *_, count in copied.history) == 22  # a copy goes on by itself


def test_a_module_that_another_callback_has_trained_is_told():
    net, first, second, third = Net(), private(), private(), private()
    trainer(first, max_epochs=1).fit(net)
    found = r"another PrivacyCallback has trained with ε = [\d.]+ at δ = 0.001"
    with pytest.warns(UserWarning, match=found):
        trainer(second, max_epochs=1).fit(net)
    third.accountant.share_with(second.accountant)
    with pytest.warns(UserWarning, match=found):  # of the first one
        trainer(third, max_epochs=1).fit(net)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*another PrivacyCallback.*")
        trainer(private(), max_epochs=1).fit(Net())
        third.accountant.share_with(first.accountant)
        trainer(third, max_epochs=1).fit(net)
        trainer(third, max_epochs=1).fit(net)
    assert sum(count for *_, count in third.accountant.history) == 50


# --- fresh batches and fresh noise -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "noise"), [({}, {}), ({"seed": 3}, {"noise_seed": 4})], ids=["secret", "given"]
)
def test_continuations_of_a_checkpoint_share_nothing(settings, noise, tmp_path):
    trainer(private(**settings), SaveAt(3, tmp_path / "a.ckpt"), max_steps=3).fit(Net(**noise))
    saved = torch.load(tmp_path / "a.ckpt", weights_only=False)
    assert "noise" not in saved["optimizer_states"][0]["privacy"]
    assert not any("entropy" in state for state in saved["callbacks"].values())
    runs = [Recorder(), Recorder()]
    for recorder in runs:
        trainer(private(**settings), recorder, max_steps=9).fit(
            Net(**noise), ckpt_path=tmp_path / "a.ckpt"
        )
    assert runs[0].drawn != runs[1].drawn
    expected = 2**0.5 * 0.5 / 6 * 15**0.5  # of the difference of two draws of noise alone
    for a, b in zip(runs[0].grads, runs[1].grads, strict=True):
        assert float((a - b).norm()) > expected / 4


@pytest.mark.filterwarnings("ignore:.*repeatable noise")
def test_an_exact_resume_is_asked_for_and_needs_what_was_saved(tmp_path):
    trainer(private(), SaveAt(3, tmp_path / "plain.ckpt"), max_steps=3).fit(Net(noise_seed=5))
    with pytest.raises(KeyError, match="saved without that option"):
        trainer(private(exact_resume=True)).fit(
            Net(noise_seed=5), ckpt_path=tmp_path / "plain.ckpt"
        )
    trainer(private(exact_resume=True), SaveAt(3, tmp_path / "exact.ckpt"), max_steps=3).fit(
        Net(noise_seed=5)
    )
    runs = [Recorder(), Recorder()]
    for recorder in runs:
        exact = trainer(private(exact_resume=True), recorder, max_steps=9)
        exact.fit(Net(noise_seed=5), ckpt_path=tmp_path / "exact.ckpt")
    assert runs[0].drawn == runs[1].drawn
    for a, b in zip(runs[0].grads, runs[1].grads, strict=True):
        assert torch.equal(a, b)


def test_an_exact_resume_of_noise_without_a_seed_is_refused(tmp_path):
    trainer(private(exact_resume=True), SaveAt(3, tmp_path / "exact.ckpt"), max_steps=3).fit(Net())
    with pytest.raises(KeyError, match="noise_seed"):
        trainer(private(exact_resume=True)).fit(Net(), ckpt_path=tmp_path / "exact.ckpt")


def in_a_loop(**settings):
    w = nn.Parameter(torch.zeros(50))
    settings = {"noise_multiplier": 1.0, "expected_batch_size": 1.0, **settings}
    return w, DPOptimizer(torch.optim.SGD([w], lr=1.0), **settings)


@pytest.mark.parametrize("settings", [{}, {"noise_seed": 1}], ids=["secret noise", "given noise"])
@pytest.mark.parametrize("way", ["load", "deepcopy", "pickle", "renew"])
def test_copies_of_an_optimizer_draw_fresh_noise(way, settings):
    w, optimizer = in_a_loop(**settings)
    optimizer.step()
    noises = []
    for _ in range(2):
        if way == "load":
            _, other = in_a_loop(**settings)
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        elif way == "renew":
            _, other = in_a_loop(**settings)
            other.renew_noise()
        else:
            other = (
                copy.deepcopy(optimizer)
                if way == "deepcopy"
                else pickle.loads(pickle.dumps(optimizer))
            )
        other.zero_grad()
        other.step()
        noises.append(other.param_groups[0]["params"][0].grad)
    optimizer.zero_grad()
    optimizer.step()
    noises.append(w.grad)
    assert len({tuple(noise.tolist()) for noise in noises}) == 3


def test_an_account_of_copies_and_loads_forgets_and_repeats_nothing():
    a = PrivacyAccountant(PoissonSampling(0.1))
    a.release(1.0, 5)
    saved = a.state_dict()
    a.release(1.0, 3)
    a.load_state_dict(saved)  # an earlier state of the same run
    assert a.history == [(PoissonSampling(0.1), 1.0, 8)]
    b = copy.deepcopy(a)
    a.release(1.0, 2)
    b.release(1.0, 4)  # goes on apart from the original
    a.load_state_dict(b.state_dict())
    a.load_state_dict(b.state_dict())
    assert a.history == [(PoissonSampling(0.1), 1.0, 14)]
    old = PrivacyAccountant()
    old.load_state_dict(
        {"history": [("PoissonSampling", {"sampling_rate": 0.1}, 1.0, 7)]}
    )  # of an older version
    assert old.history == [(PoissonSampling(0.1), 1.0, 7)]


# --- steps that are left out -----------------------------------------------------------------------------------------


class SkipsStep(Net):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        loss = optimizer_closure()
        if batch_idx != 3:
            optimizer.step()
        return loss


class StepsTwice(Net):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer.step(optimizer_closure)
        optimizer.optimizer.zero_grad()
        optimizer.optimizer.step() if hasattr(
            optimizer.optimizer, "clipping"
        ) else DPOptimizer.step(optimizer.optimizer)


class SkipsBatch(Net):
    def on_train_batch_start(self, batch, batch_idx):
        return -1 if self.global_step == 3 else None


class ReturnsNone(Net):
    def training_step(self, batch, batch_idx):
        return None if batch_idx == 3 else super().training_step(batch, batch_idx)


class TakesTheIterator(Net):
    def training_step(self, dataloader_iter):
        return super().training_step(next(dataloader_iter)[0], 0)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (SkipsStep, "one optimizer step for every drawn batch, found 0"),
        (StepsTwice, "one optimizer step for every drawn batch, found 2"),
        (SkipsBatch, "`on_train_batch_start` left out by returning -1"),
        (ReturnsNone, "leaving out a batch depends on the data"),
        (TakesTheIterator, "a step must take one batch"),
    ],
    ids=lambda case: getattr(case, "__name__", ""),
)
@pytest.mark.parametrize("sampling", ["poisson", "epoch"])
def test_steps_that_are_left_out_are_refused(module, message, sampling):
    with pytest.raises(Exception, match=message):  # a run limited by steps went on for ever
        trainer(private(sampling=sampling), max_steps=20, max_epochs=-1).fit(module())


def test_a_run_that_goes_on_in_the_middle_of_a_step_is_refused(tmp_path):
    save = SaveAt(3 + REPEATED, tmp_path / "a.ckpt")
    trainer(private(), save, accumulate_grad_batches=2).fit(Net(batch_sizes=(3,)))
    with pytest.raises(Exception, match="in the middle of one"):
        trainer(private(), accumulate_grad_batches=2).fit(
            Net(batch_sizes=(3,)), ckpt_path=tmp_path / "a.ckpt"
        )


def test_processes_that_forget_the_account_are_refused():
    with pytest.raises(Exception, match="they would forget what was spent"):
        refuse_trainer(trainer(private(), strategy="ddp_spawn", devices=1), Net())


# --- one Gaussian per epoch ------------------------------------------------------------------------------------------


class Twice(RandomSampler):
    def __iter__(self):
        return iter([0] * len(self.data_source))


class Ordered(SequentialSampler):
    pass


class Repeats(DataLoader):
    def __iter__(self):
        return iter([next(super().__iter__())] * len(self))


@pytest.mark.parametrize(
    ("loader", "sampling", "message"),
    [
        (lambda d: DataLoader(d, 6), "epoch", "needs a loader that shuffles"),
        (
            lambda d: DataLoader(d, 6, sampler=DistributedSampler(d, 1, 0, shuffle=False)),
            "epoch",
            "that shuffles",
        ),
        (
            lambda d: DataLoader(d, 6, sampler=DistributedSampler(d, 2, 0)),
            "epoch",
            "for 2 of 1 processes",
        ),
        (lambda d: Repeats(d, 6, shuffle=True), "epoch", "which overrides `__iter__`"),
        (lambda d: DataLoader(d, 6, sampler=Twice(d)), "both", "found `Twice`"),
        (lambda d: DataLoader(d, 6, sampler=Ordered(d)), "both", "found `Ordered`"),
        (
            lambda d: DataLoader(d, 6, sampler=RandomSampler(d, num_samples=300)),
            "both",
            "num_samples=300 of 60",
        ),
        (
            lambda d: DataLoader(d, 6, sampler=RandomSampler(d, num_samples=30)),
            "both",
            "num_samples=30 of 60",
        ),
        (lambda d: DataLoader(d, 6, sampler=RandomSampler(d, True)), "both", "replacement=True"),
        (
            lambda d: DataLoader(d, 6, sampler=RandomSampler(range(90))),
            "both",
            "over 90 of 60 samples",
        ),
    ],
)
def test_loaders_that_are_no_shuffled_epoch_are_refused(loader, sampling, message):
    for mode in ["poisson", "epoch"] if sampling == "both" else [sampling]:
        with pytest.raises(Exception, match=message):
            trainer(private(sampling=mode)).fit(Net(), loader(Numbers(60)))


@pytest.mark.parametrize(
    "loader",
    [
        lambda d: DataLoader(d, 6, shuffle=True, drop_last=True),
        lambda d: DataLoader(d, 7, sampler=RandomSampler(d)),
        lambda d: DataLoader(d, 6, sampler=DistributedSampler(d, 1, 0)),
    ],
)
def test_an_epoch_is_accounted_for_zeroed_out_samples(loader):
    callback = private(sampling="epoch")
    trainer(callback, max_epochs=3).fit(Net(), loader(Numbers(60)))
    relation = da.NeighboringRelation.REPLACE_SPECIAL
    oracle = da.pld.PLDAccountant(relation, value_discretization_interval=INTERVAL).compose(
        da.GaussianDpEvent(1.0), 3
    )
    assert callback.accountant.epsilon(DELTA) == pytest.approx(oracle.get_epsilon(DELTA), rel=1e-9)
    assert callback.accountant.history[0][0].relation == relation.name


def test_zeroing_a_sample_out_moves_one_step_of_an_epoch_by_at_most_the_clip_norm():
    """Inserting one moves them all: why the relation of an epoch is not that of Poisson batches."""
    C = 0.5

    def sums(contributions):
        return torch.stack([part.clamp(-C, C).sum() for part in contributions.split(3)])

    values = torch.tensor([1.0, -1.0]).repeat(30)
    zeroed = values.clone()
    zeroed[17] = 0.0
    difference = sums(values) - sums(zeroed)
    assert int((difference != 0).sum()) == 1
    assert float(difference.norm()) <= C
    inserted = torch.cat([torch.tensor([-1.0]), values])[:60]
    assert float((sums(values) - sums(inserted)).norm()) > 4 * C
    assert EpochSampling.relation == TruncatedPoissonSampling.relation != PoissonSampling.relation


# --- what people read ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        ("poisson", ["ADD_OR_REMOVE_ONE", "one sample added or removed", "Poisson", "0.1"]),
        ("truncated_poisson", ["REPLACE_SPECIAL", "zeroed out", "at most 9 of 60"]),
        ("epoch", ["REPLACE_SPECIAL", "zeroed out", "every sample once per epoch", "2 epochs"]),
    ],
)
def test_summary_and_log_lines_name_the_relation(sampling, words, caplog):
    callback = private(
        epsilon=6.0,
        sampling=sampling,
        max_batch_size=9 if sampling == "truncated_poisson" else None,
    )
    assert "not known before the first batch" in callback.summary()
    with caplog.at_level("INFO"):
        run = trainer(callback, AtEpochEnd(lambda t, m: setattr(t.fit_loop, "max_epochs", 4)))
        with pytest.warns(UserWarning, match="budget ε = 6 is spent") as warned:
            run.fit(Net(noise_multiplier=None))
    text = callback.summary()
    spent = f"{callback.accountant.epsilon(DELTA):.4g} (budget 6)"
    for word in [*words, spent, "0.001", "PLD", "0.5", f"{callback.noise_multiplier:.4g}"]:
        assert word in text
    lines = [r.getMessage() for r in caplog.records if "PrivacyCallback" in r.getMessage()]
    lines += [str(w.message) for w in warned if "PrivacyCallback" in str(w.message)]
    assert len(lines) >= 3  # noise, budget, end
    assert all(words[1].split(",")[0] in line for line in lines)
