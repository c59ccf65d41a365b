"""Alarms: what sets them off, what they say, and that only "skip" and "stop" change a run."""

import copy
import math
import warnings

import alarm_runs
import pytest
import pytorch_lightning as pl
import torch
from monitoring import (
    ManualNet,
    Net,
    Scaled,
    adam,
    assert_same_parameters,
    fit,
    kfac,
    series,
    sgd,
)
from processes import spawn
from torch import nn

from lightning_curv import CurvatureCallback, DPOptimizer
from lightning_curv.callbacks import Alarm
from lightning_curv.callbacks.monitoring.watch import Watch

pytestmark = pytest.mark.filterwarnings("ignore:At step .* are too small:UserWarning")
SPIKE = 5  # the batch with a huge loss


class Spiky(Net):
    """One batch has a loss that is a million times too large, or NaN."""

    factor = 1e6
    times = (SPIKE,)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * self.factor if batch_idx in self.times else loss


class Infinite(Spiky):
    factor = math.nan


class Without(Net):
    """The same run without the batch: its gradient never arrives."""

    def on_before_optimizer_step(self, optimizer):
        step = self.trainer.fit_loop.epoch_loop.batch_idx
        if step // self.trainer.accumulate_grad_batches == SPIKE // (
            self.trainer.accumulate_grad_batches
        ):
            optimizer.zero_grad(set_to_none=True)


def run(net, *alarms, quantities=("grad_norm",), watch=None, **settings):
    callback = CurvatureCallback(list(quantities), alarms=list(alarms))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        extra = [] if watch is None else [watch]
        trainer = fit(net, callback, *extra, size=60, **({"epochs": 1} | settings))
    told = [str(w.message) for w in caught if str(w.message).startswith("Alarm")]
    return trainer, callback, told


def test_a_warning_names_step_series_bound_and_value():
    net = Spiky()
    _, callback, told = run(net, Alarm("grad_norm", above=1e3))
    assert len(told) == len(callback.raised) == 1
    assert callback.raised[0].step == SPIKE
    value = callback.raised[0].values[""]
    assert told[0] == (
        f"Alarm at step {SPIKE}: curvature/grad_norm must not be above 1e+03, found {value:.3g}."
    )
    assert value > 1e3


def test_warnings_change_nothing():
    plain, watched = Spiky(), Spiky()
    fit(plain, size=60, epochs=1)
    _, callback, _ = run(
        watched, Alarm("grad_norm", above=1e3), "exploding", "vanishing", "nonfinite"
    )
    assert callback.raised
    assert_same_parameters(plain, watched)


@pytest.mark.parametrize("make", [sgd, adam, kfac], ids=lambda make: make.__name__)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.5},
        {"precision": None, "plugins": [Scaled()]},
    ],
    ids=["plain", "accumulate", "clip", "scaler"],
)
def test_a_skipped_step_is_not_taken(make, settings):
    skipping, without = Spiky(make), Without(make)
    plugins = {"plugins": [Scaled()]} if "plugins" in settings else {}
    _, callback, told = run(
        skipping, Alarm("grad_norm", above=1e3, action="skip"), **(settings | plugins)
    )
    plugins = {"plugins": [Scaled()]} if "plugins" in settings else {}
    fit(without, CurvatureCallback(["grad_norm"]), size=60, epochs=1, **(settings | plugins))
    assert len(callback.raised) == 1
    assert told[0].endswith("This optimizer step is skipped.")
    if make is kfac:  # which still measures the curvature of the batch
        assert all(p.isfinite().all() for p in skipping.parameters())
    else:
        assert_same_parameters(skipping, without)


def test_a_skipped_step_moves_neither_parameters_nor_momentum():
    class Record(pl.Callback):
        def __init__(self):
            self.states = []

        def on_train_batch_end(self, trainer, module, *args):
            self.states.append(
                copy.deepcopy([module.state_dict(), trainer.optimizers[0].state_dict()])
            )

    for make in (sgd, adam, kfac):
        record = Record()
        run(Spiky(make), Alarm("grad_norm", above=1e3, action="skip"), watch=record)
        before, after = record.states[SPIKE - 1], record.states[SPIKE]
        for name, value in before[0].items():
            assert torch.equal(value, after[0][name]), (make, name)
        if make is not kfac:
            assert str(before[1]) == str(after[1])
        assert not torch.equal(
            record.states[SPIKE + 1][0]["net.0.weight"], after[0]["net.0.weight"]
        )


def test_an_optimizer_whose_kernel_divides_by_the_scalers_factor(tmp_path):
    """The scaler leaves gradients as they are; values have its factor taken out, and a step is skipped all the same."""

    def fused(params):
        return torch.optim.Adam(params, lr=0.01, fused=True)

    alarm = Alarm("grad_norm", above=1e3, action="skip")
    scaled = {"precision": None, "plugins": [Scaled()]}
    net = Spiky(fused)
    _, callback, _ = run(net, alarm, tmp_path=tmp_path / "a", **scaled)
    run(Spiky(adam), alarm, tmp_path=tmp_path / "b", precision="32-true")
    assert [raised.step for raised in callback.raised] == [SPIKE]
    one, other = series(tmp_path / "a", "grad_norm"), series(tmp_path / "b", "grad_norm")
    assert one == pytest.approx(other, rel=1e-3)
    without = Without(adam)
    fit(without, size=60, epochs=1, precision="32-true")
    for p, q in zip(net.parameters(), without.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


def test_stop_skips_the_step_and_ends_the_run():
    net, shorter = Spiky(), Net()
    trainer, _, told = run(net, Alarm("grad_norm", above=1e3, action="stop"))
    assert trainer.should_stop
    assert trainer.global_step == SPIKE + 1
    assert told[0].endswith("This optimizer step is skipped and the run stops.")
    fit(shorter, size=60, epochs=1, max_steps=SPIKE)
    assert_same_parameters(net, shorter)


def test_min_steps_are_respected():
    trainer, *_ = run(Spiky(), Alarm("grad_norm", above=1e3, action="stop"), min_steps=8)
    assert trainer.global_step >= 8


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gradients_that_are_not_finite(value):
    class Bad(Spiky):
        factor = value

    for alarm in ("nonfinite", Alarm("grad_norm", above=1e9), Alarm("grad_max", above=1e9)):
        _, callback, told = run(Bad(), alarm)
        assert callback.raised[0].step == SPIKE
        assert told
    net = Bad()
    _, callback, _ = run(net, Alarm("grad_norm", above=1e9, action="skip"))
    assert len(callback.raised) == 1  # the next gradients are finite again
    assert all(p.isfinite().all() for p in net.parameters())


def test_a_scaler_skips_infinite_gradients_by_itself():
    scaled = {"precision": None, "plugins": [Scaled()]}
    _, callback, told = run(Infinite(), "nonfinite", "exploding", **scaled)
    assert not callback.raised
    assert not told


def test_exploding_is_relative_to_what_was_usual():
    class Late(Spiky):
        factor, times = 30.0, (14,)

    with_average = {"batch_size": 3}
    _, callback, told = run(Late(), "exploding", **with_average)
    assert [raised.step for raised in callback.raised] == [14]
    assert "above 10 times its average" in told[0]
    Late.times = (4,)  # there is no average yet
    assert not run(Late(), "exploding", **with_average)[1].raised


def test_values_that_set_it_off_are_not_averaged():
    watch = Watch([Alarm("grad_norm", above=2.0, relative=True)])
    values = [1.0] * 10 + [100.0] * 50 + [1.5, 2.5]
    off = []
    for step, value in enumerate(values):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = watch.check({"": {"grad_norm": value}}, step, "", None, "gradient")
        off += [step] if found else []
    assert off == [*range(10, 60), 61]


def test_vanishing_names_the_layers():
    class Vanishing(Net):
        def forward(self, x):
            return self.net[3](self.net[1](1e-12 * self.net[0](x)))

    _, callback, told = run(Vanishing(), "vanishing")
    assert callback.raised[0].values.keys() == {"net.0"}
    assert " in net.0" in told[0]
    assert len(told) == 1


def test_a_warning_comes_once_per_cooldown_and_the_action_at_every_step():
    class Always(Spiky):
        times = range(100)

    _, callback, told = run(Always(), Alarm("grad_norm", above=1e3, cooldown=4, action="skip"))
    assert len(callback.raised) == 10
    assert [int(text.split(":")[0].split()[-1]) for text in told] == [0, 4, 8]


def test_series_of_the_gradient_are_watched_at_steps_that_are_not_logged():
    callback = CurvatureCallback(
        ["grad_norm"], every_n_steps=0, alarms=[Alarm("grad_norm", above=1e3)]
    )
    with pytest.warns(UserWarning, match=f"Alarm at step {SPIKE}"):
        fit(Spiky(), callback, size=60, epochs=1)


def test_other_series_are_watched_where_they_are_logged():
    alarms = [
        Alarm("grad_variance", below=1e12),
        Alarm("update_size", above=0.0, action="stop"),
    ]
    trainer, callback, _ = run(Net(), *alarms, quantities=["grad_variance", "update_size"])
    assert {raised.alarm.series for raised in callback.raised} == {"grad_variance", "update_size"}
    assert trainer.global_step == 1


def test_manual_optimization_and_several_optimizers():
    class Two(ManualNet):
        def training_step(self, batch, batch_idx):
            x, y = batch
            for index, optimizer in enumerate(self.optimizers()):
                optimizer.zero_grad()
                loss = self.loss(self(x), y)
                self.manual_backward(loss * (1e6 if (index, batch_idx) == (1, SPIKE) else 1))
                before = [p.clone() for p in self.net[3 * index].parameters()]
                optimizer.step()
                moved = not all(map(torch.equal, before, self.net[3 * index].parameters()))
                self.moves.append((batch_idx, index, moved))

        def configure_optimizers(self):
            self.moves = []
            return [sgd(self.net[0].parameters()), sgd(self.net[3].parameters())]

    net = Two()
    _, callback, told = run(net, Alarm("grad_norm", above=1e3, action="skip"))
    assert [move[:2] for move in net.moves if not move[2]] == [(SPIKE, 1)]
    assert "curvature/grad_norm/optimizer_1" in told[0]
    assert len(callback.raised) == 1


def test_a_run_without_gradients_and_with_sparse_ones():
    class Sparse(Net):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(4, 4, sparse=True)

        def training_step(self, batch, batch_idx):
            spike = 1e6 if batch_idx == SPIKE else 1
            return spike * self.loss(self.net(self.table(batch[1]) + batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    _, callback, _ = run(Sparse(), Alarm("grad_max", above=1e3, action="skip"), "vanishing")
    assert [raised.step for raised in callback.raised if raised.alarm.action == "skip"] == [SPIKE]

    class Nothing(Net):
        def training_step(self, batch, batch_idx):
            return None

    assert not run(Nothing(), "vanishing", "exploding")[1].raised


def test_averages_survive_a_checkpoint():
    alarm = Alarm("grad_norm", above=2.0, relative=True)
    one, other = (CurvatureCallback(["grad_norm"], alarms=[alarm]) for _ in range(2))
    for step in range(10):
        one._watch.check({"": {"grad_norm": 1.0}}, step, "", None, "gradient")
    other.load_state_dict(one.state_dict())
    with pytest.warns(UserWarning, match="Alarm at step 10"):
        assert other._watch.check({"": {"grad_norm": 3.0}}, 10, "", None, "gradient")


@pytest.mark.parametrize("action", ["warn", "skip", "stop"])
def test_private_steps_are_never_skipped(action):
    def private(params):
        return DPOptimizer(sgd(params), clip_norm=1.0, noise_multiplier=1.0, expected_batch_size=6)

    callback = CurvatureCallback(["grad_norm"], alarms=[Alarm("grad_norm", above=1, action=action)])
    net, trainer = Net(), pl.Trainer(logger=False)
    net.trainer, trainer.strategy.optimizers = trainer, [private(net.parameters())]
    if action == "warn":
        callback.on_fit_start(trainer, net)
    else:
        with pytest.raises(Exception, match="Alarms on private steps must warn, found `action="):
            callback.on_fit_start(trainer, net)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Alarm("grad_norm"), "must have a bound `above` or `below`, found none"),
        (
            lambda: Alarm("grad_norm", above=1, action="skp"),
            "`action` must be 'warn', 'skip' or 'stop', found 'skp'; did you mean 'skip'",
        ),
        (lambda: Alarm("grad_norm", above=1, cooldown=0), "`cooldown` must be a positive number"),
        (
            lambda: Alarm("distance", above=1, action="skip"),
            "'warn' or 'stop' for 'distance', which is known after the step, found 'skip'",
        ),
        (lambda: Alarm("alpha", above=1, layers=True), "`layers` must be False for 'alpha'"),
        (
            lambda: CurvatureCallback(alarms=["explodin"]),
            "names of presets, found 'explodin'; did you mean 'exploding'",
        ),
        (
            lambda: CurvatureCallback(alarms=[Alarm("alpha", above=1)]),
            "must watch a series that is logged, found 'alpha'; add it to `quantities`",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alarms")
    spawn(alarm_runs.work, str(folder))
    return {
        (rank, *case): torch.load(folder / f"{rank}-{case[0]}-{case[1]}", weights_only=False)
        for rank in range(2)
        for case in alarm_runs.RUNS
    }


@pytest.mark.parametrize(("action", "alone"), alarm_runs.RUNS)
def test_two_processes_do_the_same(processes, action, alone):
    """Also where only one of them finds the bound crossed."""
    one, other = (processes[rank, action, alone] for rank in range(2))
    assert one["steps"] == other["steps"] == ([1] if alone else [2])
    assert one["done"] == other["done"] == (one["steps"][0] + 1 if action == "stop" else 5)
    assert all(map(torch.equal, one["parameters"], other["parameters"]))
    if alone and action == "skip":
        assert not all(
            map(torch.equal, one["parameters"], processes[0, "warn", True]["parameters"])
        )
