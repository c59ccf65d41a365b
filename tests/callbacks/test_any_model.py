"""`CurvatureCallback()` on models that nobody prepared: it runs, logs right values only, and says one sentence."""

import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from kinds import KINDS, Contrastive, ContrastiveByHand, N, Normed, Quantiles
from monitoring import NORMS, assert_nothing_left_behind, assert_same_parameters, data, fit, series
from torch import nn
from torch.utils.data.distributed import DistributedSampler

import lightning_curv
from lightning_curv import CurvatureCallback
from lightning_curv.callbacks.monitoring import report
from lightning_curv.callbacks.monitoring.measurement import Measurement
from lightning_curv.callbacks.monitoring.observation import Observation, for_optimizers
from lightning_curv.callbacks.monitoring.quantities import DEFAULT, QUANTITIES
from lightning_curv.callbacks.monitoring.support import for_trainers
from lightning_curv.errors import UnsupportedError
from lightning_curv.extensions import BatchL2Grad
from lightning_curv.extensions.unevaluated import GradientJacobian
from lightning_curv.metrics.functional import unbiased_moments, unbiased_moments_of_parts
from lightning_curv.recording import record as record_module
from lightning_curv.recording.lenient import lenient_record

OF_SAMPLES = {"grad_variance", "grad_signal", *NORMS}
NOISE = {"grad_variance", "grad_signal", "noise_scale", "suggested_batch_size"}


class Values(pl.Callback):
    """The values of every step, and the parameters and batches that they belong to."""

    def __init__(self):
        self.rows, self.params, self.batches = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.params.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})
        self.batches.append(batch)

    def on_train_batch_end(self, trainer, pl_module, *args):
        metrics = trainer.callback_metrics
        self.rows.append(
            {
                k.removeprefix("curvature/"): float(v)
                for k, v in metrics.items()
                if k.startswith("curv")
            }
        )


def run(module, *callbacks, batches=2, **settings):
    values = Values()
    net = module if isinstance(module, pl.LightningModule) else module()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(
            net,
            *callbacks,
            values,
            epochs=1,
            loader=[net.batch(seed) for seed in range(batches)],
            **settings,
        )
    values.said = [
        str(warning.message) for warning in caught if "CurvatureCallback" in str(warning.message)
    ]
    values.net = net
    return values


def gradient(net, params, batch):
    """Of the loss of a batch, flat, by autograd."""
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    state = net.state_dict()
    with torch.enable_grad():
        loss = torch.func.functional_call(
            Wrapped(net), {f"net.{k}": v for k, v in {**state, **leaves}.items()}, (batch,)
        )
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).flatten()
            for g, p in zip(found, leaves.values())
        ]
    )


class Wrapped(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, batch):
        return self.net.loss(batch)


@pytest.mark.parametrize("name", KINDS)
def test_the_defaults_run_log_right_values_and_say_one_sentence(name):
    plain, watched = run(KINDS[name]), run(KINDS[name], CurvatureCallback())
    assert_same_parameters(plain.net, watched.net)
    assert_nothing_left_behind(watched.net)
    coupled = getattr(watched.net, "coupled", False)
    for params, batch, row in zip(watched.params, watched.batches, watched.rows):
        mean = gradient(watched.net, params, batch)
        assert row["grad_norm"] == pytest.approx(float(mean.norm()))
        if coupled:
            assert not OF_SAMPLES & row.keys()
            continue
        rows = torch.stack(
            [gradient(watched.net, params, watched.net.one(batch, n)) for n in range(N)]
        )
        norms, trace = rows.norm(dim=1), rows.var(0).sum()
        truth = {"grad_variance": trace, "grad_signal": mean @ mean - trace / N}
        truth |= {name: norms.quantile(level) for name, level in NORMS.items()}
        assert {key: row[key] for key in truth} == pytest.approx(
            {key: float(value) for key, value in truth.items()}
        )
    lost = {q for q in DEFAULT if q != "sample_norms"} - watched.rows[-1].keys()
    assert len(watched.said) == (1 if coupled or "ggn_trace" in lost else 0)
    if watched.said:
        sentence = watched.said[0]
        assert sentence.startswith("CurvatureCallback logs grad_norm")
        left = sentence.partition("leaves out")[2]
        assert all(quantity in left for quantity in lost - {"noise_scale", "suggested_batch_size"})


@pytest.mark.parametrize("kind", [Normed, Contrastive, ContrastiveByHand])
def test_where_samples_are_coupled_the_noise_comes_from_micro_batches(kind):
    values = run(kind, CurvatureCallback(every_n_steps=1), batches=4, accumulate_grad_batches=2)
    assert len(values.said) == 1
    assert "noise_scale, suggested_batch_size (from micro-batches)" in values.said[0]
    for start, row in ((0, values.rows[1]), (2, values.rows[3])):
        parts = [
            gradient(values.net, values.params[i], values.batches[i]) for i in (start, start + 1)
        ]
        small, large = sum(float(g @ g) for g in parts) / 2, float(sum(parts).square().sum()) / 4
        trace = (small - large) / (1 / N - 1 / (2 * N))  # McCandlish et al., 2018, appendix A.1
        signal = (2 * N * large - N * small) / (2 * N - N)
        assert row["grad_variance"] == pytest.approx(trace)
        assert row["grad_signal"] == pytest.approx(signal)
    assert values.rows[-1].keys() >= NOISE - {"noise_scale", "suggested_batch_size"}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_where_samples_are_coupled_the_noise_comes_from_processes(tmp_path, accumulate):
    size, net, initial = 3, Normed().double(), dict(Normed().double().named_parameters())
    total = 2 * accumulate * size
    settings = {
        "accumulate_grad_batches": accumulate,
        "strategy": "ddp_spawn",
        "devices": 2,
        "size": total,
    }
    fit(net, CurvatureCallback(), tmp_path=tmp_path, epochs=1, batch_size=size, **settings)
    order = torch.tensor(list(DistributedSampler(range(total), num_replicas=1, rank=0)))
    x, y = data(total).tensors
    shares = [order[rank::2][i * size :][:size] for rank in range(2) for i in range(accumulate)]
    parts = torch.stack([gradient(net, initial, [x[rows], y[rows]]) for rows in shares])
    mean, count = parts.mean(0), len(parts)
    trace = size * parts.var(0).sum()
    assert series(tmp_path, "grad_variance") == pytest.approx({0: float(trace)}, rel=1e-5)
    assert series(tmp_path, "grad_signal") == pytest.approx(
        {0: float(mean @ mean - trace / (count * size))}, rel=1e-5
    )


def test_the_noise_of_parts_per_layer_adds_up():
    layered = CurvatureCallback(layers=True)
    seen = {}
    original = CurvatureCallback.on_train_batch_end

    def remember(self, trainer, pl_module, *args):
        if self._report is not None:
            seen.update(self._report.layers)
        original(self, trainer, pl_module, *args)

    layered.on_train_batch_end = remember.__get__(layered)
    values = run(Normed, layered, batches=2, accumulate_grad_batches=2)
    total = sum(row["grad_variance"] for row in seen.values())
    assert total == pytest.approx(values.rows[-1]["grad_variance"])


def test_the_two_moments_of_parts_are_unbiased():
    """Simulated: parts of different sizes with different weights."""
    generator = torch.Generator().manual_seed(0)
    sizes, weights = torch.tensor([2.0, 5.0, 3.0]), torch.tensor([0.5, 0.2, 0.3])
    true, spread, runs = torch.tensor([1.0, -0.5, 0.2]), torch.tensor([2.0, 1.0, 0.5]), 200_000
    noise = torch.randn(runs, 3, 3, generator=generator) * spread / sizes[:, None].sqrt()
    parts = true + noise
    whole = (weights[:, None] * parts).sum(1)
    second = (weights * parts.square().sum(2)).sum(1)
    inverses = (weights / sizes).sum(), (weights.square() / sizes).sum()
    trace, signal = unbiased_moments_of_parts(second, whole.square().sum(1), *inverses)
    for estimate, truth in ((trace, spread.square().sum()), (signal, true @ true)):
        assert abs(estimate.mean() - truth) < 4 * estimate.std() / runs**0.5
        assert abs(estimate.mean() - truth) < 0.02 * truth


def test_parts_of_one_sample_are_samples():
    assert unbiased_moments(5.0, 4.0, 0.25) == unbiased_moments_of_parts(5.0, 4.0, 1, 0.25)


@pytest.mark.parametrize("kind", [Normed, ContrastiveByHand])
def test_the_trace_of_the_whole_batch_converges(kind):
    """For a loss that is not convex in the outputs the GGN takes the positive part of its Hessian."""
    values = run(kind, CurvatureCallback(["ggn_trace"], mc_samples=4000), batches=1)
    net, params, batch = values.net, values.params[0], values.batches[0]
    inputs = batch[:1] if kind is Normed else batch
    for module in net.modules():
        module.track_running_stats = False  # statistics of the batch
        module.running_mean = module.running_var = None

    def outputs(p):
        own = {name.removeprefix("net."): value for name, value in p.items()}
        return torch.cat([torch.func.functional_call(net.net.train(), own, (x,)) for x in inputs])

    def loss(found):
        parts = iter(found.split(N))
        net.net.forward = lambda x: next(parts)
        return net.loss(batch)

    jacobian = torch.cat(
        [j.flatten(2).flatten(0, 1) for j in torch.func.jacrev(outputs)(params).values()], 1
    )
    found = outputs(params).detach()
    values_of_h, vectors = torch.linalg.eigh(
        torch.func.hessian(loss)(found).reshape(found.numel(), -1)
    )
    hessian = vectors @ values_of_h.clamp(min=0).diag() @ vectors.T
    trace = float(torch.trace(jacobian.T @ hessian @ jacobian))
    assert values.rows[0]["ggn_trace"] == pytest.approx(trace, rel=0.1)


@pytest.mark.parametrize("quantity", ["hessian_trace", "hessian_max_eigenvalue"])
def test_hessians_take_no_samples_apart(quantity):
    values = run(Contrastive, CurvatureCallback([quantity]), batches=1)
    assert quantity in values.rows[0]
    assert not values.said


def test_what_was_named_is_an_error_before_the_first_step():
    net = Normed()
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(NotImplementedError, match=r"batch_norm.*needs this for norm_test"):
        run(net, CurvatureCallback(["default", "norm_test"], every_n_steps=50), batches=1)
    for p, q in zip(net.parameters(), before):
        assert torch.equal(p, q)
    values = run(
        Normed,
        CurvatureCallback(["default", "norm_test"], every_n_steps=50, strict=False),
        batches=1,
    )
    assert "norm_test" in values.said[0].partition("leaves out")[2]


def test_the_warning_comes_before_the_first_step_and_not_at_the_first_logged_one():
    values = run(Normed, CurvatureCallback(every_n_steps=50), batches=1)
    assert len(values.said) == 1
    assert not values.rows[0]


@pytest.mark.parametrize(
    ("owner", "quantities"), [(BatchL2Grad, "default"), (GradientJacobian, "all")]
)
def test_an_unforeseen_error_of_ours_does_not_end_the_run(monkeypatch, owner, quantities):
    plain = run(Quantiles)
    monkeypatch.setattr(owner, "evaluate", fail)
    values = run(Quantiles, CurvatureCallback(quantities))
    assert_same_parameters(plain.net, values.net)
    assert sum("unforeseen" in text for text in values.said) == 1
    assert "grad_norm" in values.rows[-1]


def fail(*args, **kwargs):
    raise RuntimeError("unforeseen")


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Measurement, "signal"),
        (report, "measure"),
        (Observation, "look"),
        (report.Report, "follow_updates"),
    ],
)
def test_errors_between_the_passes_do_not_end_the_run_either(monkeypatch, owner, name):
    plain = run(Quantiles)
    monkeypatch.setattr(owner, name, property(fail) if owner is Measurement else fail)
    values = run(Quantiles, CurvatureCallback(["default", "update_size"], strict=False))
    assert_same_parameters(plain.net, values.net)
    assert sum("unforeseen" in text for text in values.said) == 1


@pytest.mark.parametrize("name", ["note_roots", "record_unknown", "record_call"])
def test_errors_of_recording_do_not_end_a_forward_pass(monkeypatch, name):
    """The user's step goes on, and what needs no record of it is still logged."""
    plain = run(Quantiles)
    monkeypatch.setattr(record_module, name, fail)
    values = run(Quantiles, CurvatureCallback())
    assert_same_parameters(plain.net, values.net)
    assert any("unforeseen" in text for text in values.said)
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="the user's own"), lenient_record():
        torch.empty(3).apply_(lambda _: user_error())


def user_error():
    raise RuntimeError("the user's own")


def test_what_has_run_is_not_run_again(monkeypatch):
    monkeypatch.setattr(record_module, "note_roots", fail)
    counter = torch.zeros(3)
    with lenient_record() as recording:
        counter.add_(1)
        counter.add_(1)
    assert counter.tolist() == [2, 2, 2]
    assert "unforeseen" in str(recording.failure)


def test_a_formula_that_fails_is_left_out_alone(monkeypatch):
    broken = replace(QUANTITIES["grad_signal"], formula=fail)
    monkeypatch.setitem(QUANTITIES, "grad_signal", broken)
    values = run(Quantiles, CurvatureCallback())
    assert sum("stops logging grad_signal: unforeseen" in text for text in values.said) == 1
    assert {"grad_norm", "grad_variance"} <= values.rows[-1].keys()
    assert "grad_signal" not in values.rows[-1]


ADVICE = [
    "Run the forward pass inside `curvature(...)` or `record()`, or `extend` the model.",
    "Run the forward pass inside `curvature(..., output=module)` or `record(output=module)`, or `extend` the module;",
    "outside of `curvature(...)`, run it inside or `extend` the model.",
    "Pass `batch_size=` if their number is another one.",
    "Leave `output=` out: all outputs are then found.",
]


@pytest.mark.parametrize("advice", ADVICE)
def test_advice_is_for_those_who_have_a_trainer(advice):
    text = for_trainers(UnsupportedError(f"Expected one, found another. {advice}"))
    assert text != advice
    assert not re.search(r"`curvature\(|record\(|extend|(?<!\()`batch_size=|`output=", text)
    assert re.search(r"`training_step`|`CurvatureCallback\((batch_size|output)=", text)
    assert str(for_optimizers(UnsupportedError(advice))) == for_trainers(UnsupportedError(advice))


@pytest.mark.parametrize("advice", ADVICE)
def test_that_is_what_the_engine_says(advice):
    files = sorted(Path(lightning_curv.__file__).parent.rglob("*.py"))
    texts = [re.sub(r'"\s+f?"', "", file.read_text()) for file in files]
    assert any(advice in text for text in texts)


def test_other_errors_of_optimizers_are_not_changed():
    memory = torch.OutOfMemoryError("out of memory")
    assert for_optimizers(memory) is memory
