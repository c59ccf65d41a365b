"""`PrivacyCallback` in a Trainer: batches, steps, account, budget, checkpoints, refusals."""

import copy
import math
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from packages import needs
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_curv.callbacks import PrivacyCallback
from lightning_curv.callbacks.private_training.poisson import PoissonBatchSampler
from lightning_curv.optimizers import (
    DPOptimizer,
    EpochSampling,
    PoissonSampling,
    PrivacyAccountant,
    TruncatedPoissonSampling,
    calibrated_noise,
)

da = needs("dp_accounting")
N = 60


class Net(pl.LightningModule):
    def __init__(self, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))
        self.settings = {"clip_norm": 0.5, "noise_multiplier": 0.0, **settings}

    def loss(self, output, y):
        return F.cross_entropy(output, y)

    def training_step(self, batch, batch_idx):
        loss = self.loss(self.net(batch[0].to(self.net[0].weight.dtype)), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = DPOptimizer(torch.optim.Adam(self.parameters(), lr=0.05), **self.settings)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.5)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def data(n=N):
    generator = torch.Generator().manual_seed(7)
    X = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return TensorDataset(X, torch.randint(3, (n,), generator=generator))


def fit(module, callback, batch_size=1, loader=None, ckpt_path=None, **options):
    defaults = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "precision": "64-true",
        "callbacks": [callback],
    }
    trainer = pl.Trainer(**{**defaults, **options})
    loader = DataLoader(data(), batch_size=batch_size, shuffle=True) if loader is None else loader
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer


# --- the run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "accumulate"), [(2, 1), (1, 3), (4, 2)])
def test_fit_equals_a_loop_of_single_samples(batch_size, accumulate):
    module, callback = Net().double(), PrivacyCallback(seed=1)
    naive = copy.deepcopy(module.net)
    trainer = fit(module, callback, batch_size, accumulate_grad_batches=accumulate, max_epochs=2)
    expected = batch_size * accumulate
    steps = 2 * round(N / expected)
    sampler = PoissonBatchSampler(N, expected / N, steps, accumulate, seed=1)
    optimizer = torch.optim.Adam(naive.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.5)
    X, y = data().tensors
    for step in range(steps):
        total = [torch.zeros_like(p) for p in naive.parameters()]
        for i in sampler.batch(step):
            loss = F.cross_entropy(naive(X[i : i + 1]), y[i : i + 1])
            grads = torch.autograd.grad(loss, list(naive.parameters()))
            norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
            for t, g in zip(total, grads):
                t += min(1.0, 0.5 / float(norm)) * g
        for p, t in zip(naive.parameters(), total):
            p.grad = t / expected
        optimizer.step()
        scheduler.step()
    assert trainer.global_step == steps
    assert trainer.optimizers[0].param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    for p, q in zip(module.net.parameters(), naive.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def test_empty_batches_are_steps():
    callback = PrivacyCallback(seed=3)
    fit(Net(noise_multiplier=1.0), callback, loader=DataLoader(data(6), batch_size=1), max_epochs=4)
    sampler = PoissonBatchSampler(6, 1 / 6, 24, seed=3)
    assert any(len(sampler.batch(step)) == 0 for step in range(24))
    assert callback.accountant.history == [(PoissonSampling(1 / 6), 1.0, 24)]


# --- sampling --------------------------------------------------------------------------------------------------------


def test_poisson_batches_are_independent_draws_with_the_rate():
    sampler = PoissonBatchSampler(200, 0.1, 500, seed=0)
    drawn = np.zeros((500, 200), bool)
    for step in range(500):
        drawn[step, sampler.batch(step)] = True
    assert abs(drawn.mean() - 0.1) < 0.003
    assert (
        abs(drawn.sum(1).var() / (200 * 0.1 * 0.9) - 1) < 0.2
    )  # of a binomial, not of a fixed size
    assert abs(np.corrcoef(drawn[:, 0], drawn[:, 1])[0, 1]) < 0.15


def test_parts_and_ranks_share_one_global_batch():
    samplers = [
        PoissonBatchSampler(100, 0.2, 3, parts=2, seed=5, rank=r, world_size=3) for r in range(3)
    ]
    batches = [list(sampler) for sampler in samplers]
    for step in range(3):
        shared = sorted(i for b in batches for part in b[2 * step : 2 * step + 2] for i in part)
        assert shared == sorted(samplers[0].batch(step).tolist())


def test_truncated_batches_keep_at_most_the_maximum():
    sampler = PoissonBatchSampler(100, 0.2, 100, seed=5, max_batch_size=20)
    sizes = [len(sampler.batch(step)) for step in range(100)]
    assert max(sizes) == 20
    assert min(sizes) < 20


def test_default_seed_differs_from_run_to_run():
    torch.manual_seed(0)
    first = PoissonBatchSampler(100, 0.2, 3)
    torch.manual_seed(0)
    assert first.seed != PoissonBatchSampler(100, 0.2, 3).seed


def test_workers_read_the_same_batches():
    runs = []
    for workers in (0, 1):
        module = Net().double()
        loader = DataLoader(data(12), batch_size=3, num_workers=workers)
        fit(module, PrivacyCallback(seed=1), loader=loader, max_epochs=2)
        runs.append([p.detach().clone() for p in module.parameters()])
    for p, q in zip(*runs):
        assert torch.equal(p, q)


@pytest.mark.parametrize("order", [1, -1])
def test_curvature_is_logged_beside(tmp_path, order):
    """Who needs the whole backward pass gets it, and private training does not notice."""
    from lightning_curv.callbacks import CurvatureCallback

    logger = pl.loggers.CSVLogger(tmp_path)
    watch = CurvatureCallback(["grad_norm", "grad_variance"], every_n_steps=2)
    options = {"batch_size": 6, "accumulate_grad_batches": 2, "max_epochs": 2}
    runs = []
    for watching in (False, True):
        module, callback = Net(noise_multiplier=0.5, noise_seed=1).double(), PrivacyCallback(seed=1)
        callbacks = [callback, watch][::order] if watching else [callback]
        fit(
            module,
            callback,
            callbacks=callbacks,
            logger=logger if watching else False,
            log_every_n_steps=2,
            **options,
        )
        runs.append(list(module.parameters()))
    logger.save()
    values = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert "curvature/grad_variance" in values
    for p, q in zip(*runs):
        assert torch.equal(p, q)


@pytest.mark.parametrize("sampling", ["poisson", "truncated_poisson", "epoch"])
def test_samples_that_are_not_finite_do_not_take_part(sampling):
    clean, spoilt = data(), data()
    spoilt.tensors[0][::7] = math.nan
    runs = []
    for dataset, keep in ((spoilt, None), (clean, torch.arange(N) % 7 != 0)):
        module = Net(noise_multiplier=0.5, noise_seed=1).double()
        module.keep = keep
        callback = PrivacyCallback(
            sampling=sampling,
            seed=1,
            max_batch_size=9 if sampling == "truncated_poisson" else None,
            delta=1e-3,
        )
        callback.accountant.epsilon = lambda delta: 0.0  # takes long, and is not what this is about
        loader = DataLoader(Numbered(dataset), batch_size=6, shuffle=True)
        torch.manual_seed(3)  # of the order
        if keep is not None:
            module.training_step = lambda batch, i, m=module: weighted_step(m, batch)
            callback.check_independence = False
        fit(module, callback, loader=loader)
        runs.append([p.detach() for p in module.parameters()])
        assert all(p.isfinite().all() for p in runs[-1])
    for p, q in zip(*runs):
        torch.testing.assert_close(p, q)


class Numbered(torch.utils.data.Dataset):
    """Samples, targets and their numbers."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        return *self.dataset[i], i


def weighted_step(module, batch):
    """The step without the samples that are not to be kept, whose loss is zero."""
    X, y, i = batch
    return (F.cross_entropy(module.net(X), y, reduction="none") * module.keep[i]).mean()


# --- the account -----------------------------------------------------------------------------------------------------


def test_epsilon_is_that_of_dp_accounting():
    event = da.SelfComposedDpEvent(da.PoissonSampledDpEvent(0.01, da.GaussianDpEvent(1.1)), 100)
    pld = da.pld.PLDAccountant(value_discretization_interval=1e-4).compose(event).get_epsilon(1e-5)
    rdp = da.rdp.RdpAccountant().compose(event).get_epsilon(1e-5)
    for method, expected in (("pld", pld), ("rdp", rdp)):
        accountant = PrivacyAccountant(PoissonSampling(0.01), method)
        for _ in range(100):
            accountant.step(1.1)
        assert len(accountant.history) == 1
        assert accountant.epsilon(1e-5) == pytest.approx(expected, rel=1e-9)


def test_published_values():
    accountant = PrivacyAccountant(PoissonSampling(256 / 60000))
    accountant.release(1.1, 3525)
    assert accountant.epsilon(1e-5) == pytest.approx(1.1354, abs=1e-4)
    assert PrivacyAccountant(PoissonSampling(0.1)).epsilon(1e-5) == 0
    accountant.release(0.0)
    assert accountant.epsilon(1e-5) == math.inf


@pytest.mark.parametrize("method", ["pld", "rdp"])
@pytest.mark.parametrize("sigma", [1e-300, 1e-160, 1e-9, 0.009])
def test_hardly_any_noise_is_refused_where_an_account_is_kept(sigma, method):
    """The library has no memory for it, or takes an ε that overflows for 0."""
    accountant = PrivacyAccountant(PoissonSampling(0.1), method)
    for account in (accountant.release, accountant.step):
        with pytest.raises(
            ValueError, match=r"at least 0\.01 .* found .*: .* ε of thousands.* Use more"
        ):
            account(sigma)
    assert accountant.history == []
    # From the checkpoint of a version that accepted it.
    older = ("PoissonSampling", {"sampling_rate": 0.1}, sigma, 1)
    accountant.load_state_dict({"runs": {"older": [older]}})
    assert accountant.epsilon(1e-5) == math.inf
    assert accountant.releases_left(8.0, 1e-5, 1.0) == 0


def test_hardly_any_noise_is_refused_before_the_first_step():
    module = Net(noise_multiplier=1e-9)
    with pytest.raises(ValueError, match=r"at least 0\.01 where an account is kept"):
        fit(module, PrivacyCallback(delta=1e-3), max_steps=1)


def test_an_epoch_of_any_order_is_one_gaussian():
    accountant = PrivacyAccountant(EpochSampling(10))
    for _ in range(25):
        accountant.step(2.0)
    assert accountant.history == [(EpochSampling(10), 2.0, 3)]
    event = da.SelfComposedDpEvent(da.GaussianDpEvent(2.0), 3)
    expected = (
        da.pld.PLDAccountant(value_discretization_interval=1e-4).compose(event).get_epsilon(1e-5)
    )
    assert accountant.epsilon(1e-5) == pytest.approx(expected, rel=1e-9)
    accountant.start_epoch()
    accountant.step(2.0)
    assert accountant.history[-1][2] == 4


def test_truncated_sampling_costs_what_the_library_says():
    accountant = PrivacyAccountant(TruncatedPoissonSampling(0.1, 100, 14))
    accountant.release(2.0, 5)
    event = da.TruncatedSubsampledGaussianDpEvent(
        dataset_size=100, sampling_probability=0.1, truncated_batch_size=14, noise_multiplier=2.0
    )
    oracle = da.pld.PLDAccountant(
        da.NeighboringRelation.REPLACE_SPECIAL, value_discretization_interval=1e-4
    )
    assert accountant.epsilon(1e-4) == pytest.approx(
        oracle.compose(event, 5).get_epsilon(1e-4), rel=1e-9
    )
    accountant.sampling = PoissonSampling(0.1)
    accountant.release(2.0)
    with pytest.raises(ValueError, match="cannot be added up"):
        accountant.epsilon(1e-4)


@pytest.mark.parametrize("sampling", [PoissonSampling(0.1), EpochSampling(10)])
def test_calibrated_noise_spends_the_budget_and_no_more(sampling):
    sigma = calibrated_noise(2.0, 1e-4, sampling, 20)
    accountant = PrivacyAccountant(sampling)
    accountant.release(sigma, 20)
    assert 1.99 < accountant.epsilon(1e-4) <= 2.0
    assert accountant.releases_left(2.0, 1e-4, sigma) == 0
    assert PrivacyAccountant(sampling).releases_left(2.0, 1e-4, sigma, at_most=100) == 20


def test_settings_are_checked():
    with pytest.raises(ValueError, match="`sampling_rate` must lie in"):
        PoissonSampling(2.0)
    with pytest.raises(ValueError, match="`delta` must lie in"):
        PrivacyCallback(delta=0.0)
    with pytest.raises(ValueError, match="`max_batch_size` belongs to"):
        PrivacyCallback(max_batch_size=3)
    with pytest.raises(ValueError, match="`sampling` must be one of"):
        PrivacyCallback(sampling="shuffle")
    with pytest.raises(RuntimeError, match=r"`accountant\.sampling` must be set"):
        PrivacyAccountant().step(1.0)


# --- budget ----------------------------------------------------------------------------------------------------------


def test_noise_is_calibrated_to_the_budget():
    callback = PrivacyCallback(epsilon=4.0, delta=1e-3, seed=0)
    trainer = fit(Net(noise_multiplier=None), callback, batch_size=6, max_epochs=2)
    assert trainer.global_step == 20
    assert 3.98 < callback.accountant.epsilon(1e-3) <= 4.0
    assert trainer.callback_metrics["privacy/epsilon"] == pytest.approx(
        callback.accountant.epsilon(1e-3)
    )
    assert trainer.progress_bar_metrics["epsilon"] == pytest.approx(
        callback.accountant.epsilon(1e-3), abs=1e-3
    )


@pytest.mark.parametrize("sampling", ["poisson", "epoch"])
def test_training_stops_before_the_budget_is_exceeded(sampling):
    callback = PrivacyCallback(epsilon=8.0, delta=1e-3, seed=0, sampling=sampling)
    trainer = fit(
        Net(noise_multiplier=0.6 if sampling == "poisson" else 1.0),
        callback,
        batch_size=6,
        max_epochs=9,
    )
    spent = callback.accountant.epsilon(1e-3)
    assert 0 < spent <= 8.0
    assert 0 < trainer.global_step < 90
    ((_, sigma, count),) = callback.accountant.history
    assert callback.accountant.releases_left(8.0, 1e-3, sigma) == 0
    assert (
        count == trainer.global_step
        if sampling == "poisson"
        else count == math.ceil(trainer.global_step / 10)
    )


def test_training_goes_on_with_a_warning():
    callback = PrivacyCallback(epsilon=1.0, delta=1e-3, seed=0, on_budget="warn")
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        callbacks=[callback],
        enable_model_summary=False,
        enable_progress_bar=False,
        precision="64-true",
    )
    with pytest.warns(UserWarning, match="training goes on"):
        trainer.fit(Net(noise_multiplier=0.5), DataLoader(data(), batch_size=6))
    assert trainer.global_step == 10


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_resumed_run_keeps_the_account_and_equals_the_uninterrupted_one(tmp_path):
    # 64-true rounds Adam's state to float32 when it is loaded, without the callback too
    settings = {"noise_multiplier": 1.0, "noise_seed": 3}
    whole, uninterrupted = Net(**settings), PrivacyCallback(seed=2, exact_resume=True)
    fit(whole, uninterrupted, batch_size=6, precision="32-true", max_epochs=4)
    first = PrivacyCallback(seed=2, exact_resume=True)
    trainer = fit(Net(**settings), first, batch_size=6, precision="32-true", max_epochs=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, callback = (
        Net(**settings),
        PrivacyCallback(exact_resume=True),
    )  # the secret comes from the checkpoint
    fit(
        resumed,
        callback,
        batch_size=6,
        precision="32-true",
        max_epochs=4,
        ckpt_path=tmp_path / "half.ckpt",
    )
    assert (
        callback.accountant.history
        == uninterrupted.accountant.history
        == [(PoissonSampling(0.1), 1.0, 40)]
    )
    assert callback.accountant.epsilon(1e-5) == uninterrupted.accountant.epsilon(1e-5)
    for p, q in zip(whole.parameters(), resumed.parameters()):
        assert torch.equal(p, q)


def test_a_changed_batch_size_is_another_phase(tmp_path):
    trainer = fit(Net(noise_multiplier=1.0), PrivacyCallback(seed=2), batch_size=6)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    callback = PrivacyCallback()
    fit(
        Net(noise_multiplier=2.0),
        callback,
        batch_size=12,
        max_epochs=2,
        ckpt_path=tmp_path / "first.ckpt",
    )
    assert callback.accountant.history == [
        (PoissonSampling(0.1), 1.0, 10),
        (PoissonSampling(0.2), 2.0, 5),
    ]


# --- logs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("non_private", [False, True])
def test_logs(tmp_path, non_private):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = pl.loggers.TensorBoardLogger(tmp_path)
    callback = PrivacyCallback(seed=0, delta=1e-3, log_non_private=non_private, every_n_steps=5)
    fit(Net(noise_multiplier=1.0), callback, batch_size=6, logger=logger, log_every_n_steps=5)
    events = EventAccumulator(logger.log_dir).Reload()
    tags = set(events.Tags()["scalars"])
    named = {
        "privacy/epsilon",
        "privacy/noise_multiplier",
        "privacy/clip_norm",
        "privacy/noised_grad_norm",
    }
    assert named <= tags
    assert any(tag.startswith("non_private/") for tag in tags) == non_private
    assert events.Scalars("privacy/epsilon")[-1].value == pytest.approx(
        callback.accountant.epsilon(1e-3), rel=1e-5
    )


# --- refusals --------------------------------------------------------------------------------------------------------


class ClassWeights(Net):
    def loss(self, output, y):
        return F.cross_entropy(output, y, weight=torch.tensor([1.0, 5.0, 20.0], dtype=output.dtype))


class Ignored(Net):
    def loss(self, output, y):
        return F.cross_entropy(output, y, ignore_index=1)


class Contrastive(Net):
    def loss(self, output, y):
        return F.cross_entropy(output @ output.t(), torch.arange(len(output)))


class Summed(Net):
    def loss(self, output, y):
        return F.cross_entropy(output, y, reduction="sum")


@pytest.mark.parametrize("module", [ClassWeights, Ignored, Contrastive, Summed])
def test_losses_that_couple_samples_are_refused(module):
    with pytest.raises(Exception, match=r"depends on the other samples|samples mix"):
        fit(module(), PrivacyCallback(seed=0), batch_size=20)


def test_check_disturbs_nothing():
    seen = []

    class Dropping(Net):
        def __init__(self):
            super().__init__()
            self.drop, self.losses = nn.Dropout(0.5), []

        def training_step(self, batch, batch_idx):
            seen.append((self.drop.training, torch.get_rng_state()))
            self.losses.append(batch_idx)
            return super().training_step([self.drop(batch[0]), batch[1]], batch_idx)

    runs = {}
    for check in (True, False):
        module = Dropping()
        torch.manual_seed(1)
        seen.clear()
        fit(module, PrivacyCallback(seed=0, check_independence=check), batch_size=20)
        runs[check] = module, list(seen)
    (checked, with_checks), (plain, without) = runs[True], runs[False]
    assert [training for training, _ in with_checks[:4]] == [
        False,
        False,
        False,
        True,
    ]  # whole, two parts
    assert torch.equal(with_checks[3][1], without[0][1])
    assert checked.losses == plain.losses
    for p, q in zip(checked.parameters(), plain.parameters()):
        assert torch.equal(p, q)


def test_sum_is_allowed_where_it_is_named():
    fit(Summed(loss_reduction="sum"), PrivacyCallback(seed=0), batch_size=20)


class BatchNorm(Net):
    def __init__(self):
        super().__init__()
        self.net.insert(1, nn.BatchNorm1d(5))


class Plain(Net):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Manual(Net):
    automatic_optimization = False


class Skipping(Net):
    def training_step(self, batch, batch_idx):
        return None if batch_idx == 1 else super().training_step(batch, batch_idx)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(data())


def weighted():
    return DataLoader(data(), batch_size=6, sampler=WeightedRandomSampler(torch.ones(N), N))


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (Plain, {}, "expects one `DPOptimizer`, found SGD"),
        (Skipping, {}, "leaving out a batch depends on the data"),
        (
            Net,
            {"limit_train_batches": 3, "accumulate_grad_batches": 2},
            "must leave whole steps of 2",
        ),
        (Net, {"batch_size": 100}, "no more samples per step than the data set has"),
        (lambda: Net(noise_multiplier=None), {}, "The noise is unknown"),
        (
            lambda: Net(expected_batch_size=3.0),
            {},
            "`expected_batch_size` of the optimizer must be",
        ),
    ],
)
def test_refusals(module, options, message):
    options = {"batch_size": 6, **options}
    if "loader" in options:
        options["loader"] = options["loader"]()
    with pytest.raises(Exception, match=message):
        fit(module(), PrivacyCallback(seed=0), **options)


def sharded(name):
    """A strategy of this name that runs on a CPU."""
    return type(name, (pl.strategies.SingleDeviceStrategy,), {})(device=torch.device("cpu"))


def repeating():
    return DataLoader(data(), batch_size=6, sampler=RandomSampler(data(), replacement=True))


class Twice(BatchSampler):
    def __iter__(self):
        return (batch + batch for batch in super().__iter__())


def half_precision():
    return pl.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (BatchNorm, {}, "Use GroupNorm or LayerNorm"),
        (Manual, {}, "automatic optimization"),
        (Net, {"gradient_clip_val": 1.0}, "`gradient_clip_val=None`"),
        (
            Net,
            {"plugins": lambda: [half_precision()], "precision": None},
            "skipped steps depend on the data",
        ),
        (
            Net,
            {"strategy": lambda: sharded("FSDPStrategy")},
            "keeps parameters apart from each other, found FSDPStrategy",
        ),
        (
            Net,
            {"strategy": lambda: sharded("DeepSpeedStrategy")},
            "keeps parameters apart from each other, found DeepSpeedStrategy",
        ),
        (Net, {"scheduler": True}, "found a GradientAccumulationScheduler"),
        (Net, {"overfit_batches": 2}, "`overfit_batches=0`"),
        (
            Net,
            {"loader": weighted},
            "every sample with the same probability, found `WeightedRandomSampler`",
        ),
        (Net, {"loader": repeating}, "may repeat or prefer samples; use `shuffle=True`"),
        (
            Net,
            {"loader": lambda: DataLoader(data(), batch_sampler=Twice(range(N), 3, False))},
            "may repeat samples",
        ),
        (Net, {"loader": lambda: DataLoader(Stream(), batch_size=2)}, "found an iterable one"),
        (Net, {"loader": lambda: [torch.zeros(3, 4)]}, "expects one torch DataLoader"),
    ],
)
def test_refused_before_anything_is_set_up(module, options, message):
    options = {"batch_size": 6, **{k: v() if callable(v) else v for k, v in options.items()}}
    module, callback = module(), PrivacyCallback(seed=0)
    if options.pop("scheduler", False):
        options["callbacks"] = [callback, pl.callbacks.GradientAccumulationScheduler({0: 2})]
    module.configure_optimizers = lambda: pytest.fail("`setup` is over")
    with pytest.raises(Exception, match=message):
        fit(module, callback, **options)


@pytest.mark.parametrize("hook", ["train_dataloader", "configure_model"])
def test_what_hooks_bring_is_refused_too(hook):
    module = Net()
    if hook == "configure_model":
        module.configure_model = lambda: module.net.insert(1, nn.BatchNorm1d(5))
        loader = DataLoader(data(), batch_size=6)
    else:
        module.train_dataloader, loader = weighted, None
    options = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
    }
    trainer = pl.Trainer(callbacks=[PrivacyCallback()], enable_progress_bar=False, **options)
    with pytest.raises(Exception, match=r"GroupNorm|same probability"):
        trainer.fit(module, loader)


def test_epoch_sampling_keeps_the_loader():
    callback = PrivacyCallback(sampling="epoch")
    trainer = fit(
        Net(noise_multiplier=1.0), callback, batch_size=8, accumulate_grad_batches=2, max_epochs=3
    )
    assert trainer.global_step == 12
    assert callback.accountant.history == [(EpochSampling(4), 1.0, 3)]


def test_truncated_sampling_is_accounted_as_such():
    callback = PrivacyCallback(sampling="truncated_poisson", max_batch_size=9, seed=0)
    fit(Net(noise_multiplier=1.0), callback, batch_size=6)
    assert callback.accountant.history == [(TruncatedPoissonSampling(0.1, N, 9), 1.0, 10)]


def test_trainer_gets_its_loader_back():
    callback = PrivacyCallback(seed=0)
    trainer = fit(Net(), callback, batch_size=6)
    assert type(trainer.fit_loop._data_source).__name__ == "_DataLoaderSource"
    assert trainer._accelerator_connector.use_distributed_sampler is True


def test_second_fit_goes_on_counting():
    callback = PrivacyCallback(seed=0)
    module = Net(noise_multiplier=1.0)
    for _ in range(2):
        fit(module, callback, batch_size=6)
    assert callback.accountant.history == [(PoissonSampling(0.1), 1.0, 20)]


# --- several processes -----------------------------------------------------------------------------------------------


def test_two_processes_equal_one(tmp_path):
    script, tests = tmp_path / "run.py", Path(__file__).parents[1]
    script.write_text(
        "import sys, torch\n"
        f"sys.path += {[str(tests / room) for room in ('privacy', 'support', '')]!r}\n"
        "torch.set_num_threads(1)\n"
        "import test_privacy as t\n"
        "if __name__ == '__main__':\n"
        "    for size, parts in ((3, 2), (1, 1)):\n"
        "        module = t.Net(noise_multiplier=0.7, noise_seed=4)\n"
        "        callback = t.PrivacyCallback(seed=2)\n"
        "        t.fit(module, callback, batch_size=size, devices=2, strategy='ddp', accumulate_grad_batches=parts)\n"
        "        saved = [module.state_dict(), callback.accountant.history[0][1:]]\n"
        f"        torch.save(saved, {str(tmp_path)!r} + f'/{{module.global_rank}}_{{size}}.pt')\n"
    )
    subprocess.run([sys.executable, str(script)], check=True, timeout=100, capture_output=True)
    for size, parts in ((3, 2), (1, 1)):  # of 2 samples per step, a process often has none
        one, callback = Net(noise_multiplier=0.7, noise_seed=4), PrivacyCallback(seed=2)
        fit(one, callback, batch_size=2 * size, accumulate_grad_batches=parts)
        for rank in (0, 1):
            state, history = torch.load(tmp_path / f"{rank}_{size}.pt")
            assert history == callback.accountant.history[0][1:]
            for name, p in one.state_dict().items():
                torch.testing.assert_close(state[name], p, rtol=1e-9, atol=1e-11)


# --- the documentation -----------------------------------------------------------------------------------------------


def test_code_of_the_documentation_runs():
    import doctest
    from pathlib import Path

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = doctest.testfile(
            str(Path(__file__).parents[2] / "docs" / "privacy.md"), module_relative=False
        )
    assert results.failed == 0
    assert results.attempted > 10


def test_example_learns_within_its_budget(tmp_path):
    from pathlib import Path

    script = Path(__file__).parents[2] / "examples" / "dp_mnist.py"
    arguments = ["--epsilon", "8", "--epochs", "2", "--out", str(tmp_path / "out.png")]
    done = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, check=True
    )
    accuracy, epsilon = (float(word.strip("%,")) for word in np.array(done.stdout.split())[[2, 6]])
    assert epsilon <= 8
    assert accuracy > 50
    assert (tmp_path / "out.png").stat().st_size > 5_000
