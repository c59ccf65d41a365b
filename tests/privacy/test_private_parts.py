"""Logical batches that are split by size, whatever their own size is."""

import math
import warnings

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from packages import needs
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_curv import PrivacyCallback
from lightning_curv.callbacks.import_names import MisconfigurationException
from lightning_curv.callbacks.private_training.poisson import PoissonBatchSampler, enough_parts
from lightning_curv.optimizers import DPSGD, PoissonSampling, TruncatedPoissonSampling

needs("dp_accounting")
N = 120


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.sizes = nn.Linear(4, 3), []

    def training_step(self, batch, batch_idx):
        self.sizes.append(len(batch[0]))
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = DPSGD(
            self.parameters(), lr=0.5, clip_norm=0.5, noise_multiplier=0.5, noise_seed=1
        )
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9), "interval": "step"}
        ]


def fit(callback, batch_size=60, module=None, **options):
    generator = torch.Generator().manual_seed(7)
    X = torch.randn(N, 4, generator=generator, dtype=torch.float64)
    data = TensorDataset(X, torch.randint(3, (N,), generator=generator))
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "precision": "64-true",
    }
    settings = {
        "accelerator": "cpu",
        "enable_model_summary": False,
        "max_epochs": 3,
        "callbacks": [callback],
    }
    callback.accountant.epsilon = lambda delta: 0.0  # takes long, and is not what this is about
    trainer = pl.Trainer(**{**quiet, **settings, **options})
    module = Net() if module is None else module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, DataLoader(data, batch_size=batch_size, shuffle=True))
    return trainer, module


def test_parts_are_filled_one_after_the_other():
    sampler = PoissonBatchSampler(200, 0.2, 40, parts=6, part_size=10, seed=0)
    batches = list(sampler)
    for step in range(40):
        size = len(sampler.batch(step))
        sizes = [sampler.part_size(step, part) for part in range(6)]
        assert sizes == [min(10, max(0, size - 10 * part)) for part in range(5)] + [
            max(0, size - 50)
        ]
        drawn = [i for part, n in enumerate(sizes) for i in batches[6 * step + part][:n]]
        assert drawn == sampler.batch(step).tolist()


def test_processes_fill_parts_of_their_own_share():
    samplers = [
        PoissonBatchSampler(200, 0.2, 3, parts=3, part_size=8, seed=0, rank=r, world_size=2)
        for r in (0, 1)
    ]
    for step in range(3):
        sizes = [[s.part_size(step, part) for part in range(3)] for s in samplers]
        assert sum(map(sum, sizes)) == len(samplers[0].batch(step))
        assert all(size[:2] == [8, 8] for size in sizes)


@pytest.mark.parametrize(
    ("expected", "size"), [(1000.0, 256), (5.0, 1), (64.0, 64), (4096.0, 8), (3.0, 1000)]
)
def test_enough_parts_hold_all_but_one_batch_in_a_thousand_millions(expected, size):
    poisson = needs("scipy.stats").poisson
    parts = enough_parts(expected, size)
    assert poisson.sf(parts * size, expected) < 1e-9
    assert parts == 1 or poisson.sf((parts - 1) * size, expected) > 1e-12  # and are not many more
    binomial = needs("scipy.stats").binom
    assert binomial.sf(parts * size, math.ceil(2 * expected), 0.5) < 1e-9


@pytest.mark.parametrize(("size", "accumulate"), [(8, 1), (16, 1), (7, 2), (1000, 1)])
def test_steps_are_those_of_whole_batches(size, accumulate):
    whole, module = fit(
        PrivacyCallback(seed=3), 60 // accumulate, accumulate_grad_batches=accumulate
    )
    callback = PrivacyCallback(seed=3, max_physical_batch_size=size)
    trainer, split = fit(callback, 60 // accumulate, accumulate_grad_batches=accumulate)
    assert trainer.global_step == whole.global_step == 6
    assert callback.accountant.history == [(PoissonSampling(0.5), 0.5, 6)]
    assert max(split.sizes) <= size
    assert trainer.optimizers[0].param_groups[0]["lr"] == whole.optimizers[0].param_groups[0]["lr"]
    for p, q in zip(module.parameters(), split.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
    assert trainer.accumulate_grad_batches == accumulate


# --- batches of one shape ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part_size", [None, 10])
def test_what_stands_in_takes_the_places_that_nobody_has(part_size):
    settings = {"parts": 3, "part_size": part_size, "seed": 0, "slots": 60}
    sampler = PoissonBatchSampler(200, 0.1, 40, **settings)
    ranks = [PoissonBatchSampler(200, 0.1, 40, **settings, rank=r, world_size=2) for r in (0, 1)]
    batches, own = list(sampler), [list(rank) for rank in ranks]
    taken = np.zeros(60, int)
    for step in range(40):
        for samplers, lists in (([sampler], [batches]), (ranks, own)):
            drawn = [
                i
                for s, parts in zip(samplers, lists)
                for part in range(3)
                for i, counts in zip(parts[3 * step + part], s.counted(step, part), strict=True)
                if counts
            ]
            assert sorted(drawn) == sorted(sampler.batch(step))
        sizes = [len(batches[3 * step + part]) for part in range(3)]
        assert sizes == ([20, 20, 20] if part_size is None else [10, 10, 40])
        taken += sampler._placed(step) >= 0
    assert taken.min() > 3  # of 13 on average
    assert taken.max() < 27


def test_a_sample_leaves_its_place_to_what_stands_in():
    """Given who else was drawn, each place is as likely for them with it as without it."""
    places = [PoissonBatchSampler(3, 1.0, 1, seed=i, slots=4)._placed(0) for i in range(4000)]
    fewer = [PoissonBatchSampler(2, 1.0, 1, seed=i, slots=4)._placed(0) for i in range(4000)]
    for i in range(4):
        for j in range(4):
            with_it = sum(row[i] == 0 and row[j] == 1 for row in places)
            without = sum(row[i] == 0 and row[j] == 1 for row in fewer)
            expected = 0 if i == j else 4000 / 12
            assert abs(with_it - expected) <= 5 * expected**0.5
            assert abs(without - expected) <= 5 * expected**0.5


def test_a_batch_beyond_all_places_is_whole():
    sampler = PoissonBatchSampler(40, 0.9, 1, seed=0, slots=8, parts=2, part_size=4)
    sizes = [sampler.part_size(0, part) for part in (0, 1)]
    assert sizes[0] == 4
    assert sum(sizes) == len(sampler.batch(0)) > 30


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, 60 * 2),
        ({"max_physical_batch_size": 16}, 16),
        ({"sampling": "truncated_poisson", "max_batch_size": 70, "delta": 1e-3}, 70),
    ],
)
def test_steps_in_batches_of_one_shape_are_those_of_the_samples(options, size):
    _, module = fit(PrivacyCallback(seed=3, **options))
    callback = PrivacyCallback(seed=3, same_shapes=True, **options)
    trainer, filled = fit(callback)
    assert trainer.global_step == 6
    assert len(set(filled.sizes)) == 1
    assert filled.sizes[0] <= size
    for p, q in zip(module.parameters(), filled.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def test_half_precision_needs_batches_of_one_shape():
    with pytest.raises(MisconfigurationException, match=r"same_shapes=True.*bfloat16"):
        fit(PrivacyCallback(seed=3), precision="bf16-true")
    trainer, module = fit(PrivacyCallback(seed=3, same_shapes=True), precision="bf16-true")
    assert trainer.global_step == 6
    assert module.net.weight.dtype == torch.bfloat16
    trainer, _ = fit(PrivacyCallback(sampling="epoch", delta=1e-3), precision="bf16-true")
    assert trainer.global_step == 6


def test_truncated_batches_need_no_room_beyond_their_maximum():
    callback = PrivacyCallback(
        sampling="truncated_poisson",
        max_batch_size=64,
        max_physical_batch_size=16,
        seed=3,
        delta=1e-3,
    )
    _, module = fit(callback, max_epochs=2)
    assert callback.accountant.history == [(TruncatedPoissonSampling(0.5, N, 64), 0.5, 4)]
    assert len([size for size in module.sizes if size == 16]) >= 8
    assert max(module.sizes) == 16


def test_the_trainer_keeps_its_setting_after_fits_and_errors():
    callback = PrivacyCallback(seed=3, max_physical_batch_size=8)
    trainer, module = fit(callback, max_epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.accumulate_grad_batches = 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        X, y = torch.randn(40, 4, dtype=torch.float64), torch.randint(3, (40,))
        trainer.fit(module, DataLoader(TensorDataset(X, y), batch_size=10, shuffle=True))
    assert trainer.accumulate_grad_batches == 2
    assert callback.accountant.history[-1][0] == PoissonSampling(0.5)

    class Failing(Net):
        def training_step(self, batch, batch_idx):
            raise ZeroDivisionError

    caught = {}
    with pytest.raises(ZeroDivisionError):
        fit(callback, module=Failing(), callbacks=[callback, Keep(caught)])
    assert caught["during"] > 1
    assert caught["trainer"].accumulate_grad_batches == 1


class Keep(pl.Callback):
    def __init__(self, caught):
        self.caught = caught

    def on_train_start(self, trainer, pl_module):
        self.caught.update(trainer=trainer, during=trainer.accumulate_grad_batches)


def test_parts_and_audits_go_together():
    sampler = PoissonBatchSampler(50, 0.5, 3, parts=4, part_size=10, seed=0)
    sampler.guests = np.zeros(30, bool)
    real = [i for part in range(4) for i in sampler._part(1, part) if i >= 0]
    assert sorted(real) == sorted(i for i in sampler.batch(1) if i < 50)
    assert sampler.part_size(1, 0) == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"max_physical_batch_size": 0},
            "`max_physical_batch_size` must be an integer of at least 1",
        ),
        (
            {"max_physical_batch_size": 8, "sampling": "epoch"},
            "splits Poisson batches, found sampling='epoch'",
        ),
        (
            {"same_shapes": True, "sampling": "epoch"},
            "fills Poisson batches up, found sampling='epoch'",
        ),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        PrivacyCallback(**options)
