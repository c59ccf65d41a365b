"""Noise multipliers and clip norms that change from step to step."""

import inspect
import math
import warnings

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from packages import needs
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_curv import PrivacyCallback, curvature
from lightning_curv.optimizers import (
    DPSGD,
    ExponentialSchedule,
    PoissonSampling,
    PrivacyAccountant,
    calibrated_noise,
)
from lightning_curv.optimizers.privacy.schedule import held_for, runs_of

da = needs("dp_accounting")


def brute_force(values, rate, delta):
    """ε of dp-accounting, composed release by release."""
    accountant = da.pld.PLDAccountant(value_discretization_interval=1e-4)
    for sigma in values:
        accountant.compose(da.PoissonSampledDpEvent(rate, da.GaussianDpEvent(sigma)))
    return accountant.get_epsilon(delta)


def make(**settings):
    torch.manual_seed(0)
    net = nn.Linear(4, 3, dtype=torch.float64)
    accountant = PrivacyAccountant(PoissonSampling(0.2))
    options = {"lr": 0.0, "expected_batch_size": 1.0, "accountant": accountant, "noise_seed": 1}
    return net, DPSGD(net.parameters(), **{**options, **settings})


def step(net, optimizer):
    generator = torch.Generator().manual_seed(3)
    X = 50 * torch.randn(6, 4, generator=generator, dtype=torch.float64)
    optimizer.zero_grad()
    with curvature(*optimizer.extensions, batch_size=6):
        F.cross_entropy(net(X), torch.arange(6) % 3).backward()
    optimizer.step()
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def test_values_of_an_exponential_schedule():
    schedule = ExponentialSchedule(2.0, factor=0.5, every=3, least=0.3)
    assert [schedule(t) for t in range(0, 15, 3)] == [2.0, 1.0, 0.5, 0.3, 0.3]
    assert schedule(2) == 2.0
    assert runs_of(schedule, 10) == [(2.0, 3), (1.0, 3), (0.5, 3), (0.3, 1)]
    assert [held_for(schedule, t, 100) for t in (0, 2, 9)] == [3, 1, 100]


def test_every_step_is_accounted_with_its_own_noise():
    schedule = ExponentialSchedule(1.5, factor=0.9, every=2)
    net, optimizer = make(noise_multiplier=schedule)
    for _ in range(7):
        step(net, optimizer)
    expected = [(1.5 * 0.9**k, n) for k, n in ((0, 2), (1, 2), (2, 2), (3, 1))]
    assert [entry[1:] for entry in optimizer.accountant.history] == expected
    values = [schedule(t) for t in range(7)]
    assert optimizer.accountant.epsilon(1e-5) == pytest.approx(
        brute_force(values, 0.2, 1e-5), rel=1e-6
    )


def test_noise_and_clipping_are_those_of_the_schedule():
    """At step t, the sum without noise has the norm of the clipped sum for C_t; the noise is σ_t C_t."""
    clip = ExponentialSchedule(0.5, factor=2.0)
    quiet = [step(*make(noise_multiplier=0.0, clip_norm=clip(t))) for t in range(4)]
    net, optimizer = make(noise_multiplier=0.0, clip_norm=clip)
    for expected in quiet:
        torch.testing.assert_close(step(net, optimizer), expected)
    net, optimizer = make(noise_multiplier=lambda t: 1.0 + t, clip_norm=clip)
    other_net, other = make(noise_multiplier=1.0, clip_norm=1.0)
    for t, expected in enumerate(quiet):
        unit = step(other_net, other) - step(*make(noise_multiplier=0.0, clip_norm=1.0))
        torch.testing.assert_close(step(net, optimizer) - expected, unit * (1 + t) * clip(t))


def test_the_number_of_steps_is_in_the_checkpoint():
    settings = {"noise_multiplier": ExponentialSchedule(2.0, 0.5), "clip_norm": lambda t: 1.0 + t}
    net, optimizer = make(**settings)
    for _ in range(3):
        step(net, optimizer)
    _, other = make(**settings)
    other.load_state_dict(optimizer.state_dict())
    assert (other.steps, other.noise_multiplier, other.clip_norm) == (3, 0.25, 4.0)


@pytest.mark.parametrize("method", ["pld", "rdp"])
def test_noise_is_calibrated_for_a_schedule(method):
    schedule = ExponentialSchedule(1.0, factor=0.8, every=10)
    sigma = calibrated_noise(3.0, 1e-5, PoissonSampling(0.1), 35, method, schedule=schedule)
    accountant = PrivacyAccountant(PoissonSampling(0.1), method)
    for t in range(35):
        accountant.release(sigma * schedule(t))
    assert 2.97 < accountant.epsilon(1e-5) <= 3.0
    constant = calibrated_noise(3.0, 1e-5, PoissonSampling(0.1), 35, method)
    assert constant == calibrated_noise(
        3.0, 1e-5, PoissonSampling(0.1), 35, method, schedule=lambda t: 1.0
    )


class Net(pl.LightningModule):
    def __init__(self, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.settings = nn.Linear(4, 3), settings

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return DPSGD(self.parameters(), lr=0.1, **self.settings)


def fit(module, callback, ckpt_path=None, **options):
    data = TensorDataset(torch.randn(60, 4), torch.randint(3, (60,)))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        accelerator="cpu", enable_model_summary=False, callbacks=[callback], **quiet, **options
    )
    # A checkpoint of one's own: older versions of Lightning trust every file.
    trusted = (
        {"weights_only": False}
        if "weights_only" in inspect.signature(trainer.fit).parameters
        else {}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(
            module, DataLoader(data, batch_size=6, shuffle=True), ckpt_path=ckpt_path, **trusted
        )
    return trainer


def test_a_budget_stops_a_run_whose_noise_falls():
    schedule = ExponentialSchedule(3.0, factor=0.7, every=4)
    callback = PrivacyCallback(epsilon=1.0, delta=1e-3, seed=0)
    trainer = fit(Net(noise_multiplier=schedule), callback, max_epochs=5)
    steps = trainer.global_step
    assert 4 < steps < 50
    values = [schedule(t) for t in range(steps + 1)]
    assert callback.accountant.epsilon(1e-3) == pytest.approx(
        brute_force(values[:-1], 0.1, 1e-3), rel=1e-6
    )
    assert callback.accountant.epsilon(1e-3) <= 1.0 < brute_force(values, 0.1, 1e-3) + 2e-3


def test_a_resumed_run_goes_on_with_the_schedule(tmp_path):
    settings = {
        "noise_multiplier": ExponentialSchedule(3.0, factor=0.5, every=5),
        "clip_norm": lambda t: 1.0 + t,
    }
    trainer = fit(Net(**settings), PrivacyCallback(), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    callback = PrivacyCallback()
    trainer = fit(Net(**settings), callback, max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    assert [entry[1:] for entry in callback.accountant.history] == [
        (3.0, 5),
        (1.5, 5),
        (0.75, 5),
        (0.375, 5),
    ]
    assert trainer.optimizers[0].clip_norm == 21.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"noise_multiplier": lambda t: -1.0},
            "`noise_multiplier` must not be negative.*schedule gave it for step 0",
        ),
        ({"clip_norm": lambda t: 0.0}, "`clip_norm` must be positive.*step 0"),
        (
            {"clip_norm": lambda t: 1.0, "clipping": "adaptive"},
            "found a schedule for `clip_norm` too",
        ),
        ({"noise_multiplier": math.nan}, "`noise_multiplier` must not be negative, found nan"),
    ],
)
def test_schedules_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_a_later_value_out_of_range():
    net, optimizer = make(noise_multiplier=1.0, clip_norm=lambda t: 1.0 - t)
    with pytest.raises(ValueError, match=r"found 0\.0\. The schedule gave it for step 1"):
        step(net, optimizer)
