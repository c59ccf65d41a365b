"""Every quantity that `CurvatureCallback` logs, against brute force on its formula in float64."""

import math

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_curv import CurvatureCallback
from lightning_curv.callbacks.monitoring.quantities import DEFAULT, QUANTITIES

pytestmark = pytest.mark.filterwarnings(
    "ignore:At step .* are too small:UserWarning"
)  # they are, for speed
LR, SIZE = 0.1, 6
SETTINGS = {
    "max_epochs": 1,
    "accelerator": "cpu",
    "precision": "64-true",
    "log_every_n_steps": 1,
    "enable_progress_bar": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
}


class Net(pl.LightningModule):
    """A small classifier that remembers parameters and batch of every training step."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        self.seen = []

    def loss(self, batch, params=None):
        x, y = batch
        output = self.net(x) if params is None else torch.func.functional_call(self, params, (x,))
        return F.cross_entropy(output, y)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        step = self.trainer.fit_loop.epoch_loop._batches_that_stepped
        self.seen.append((step, flat(self.parameters()).clone(), batch))
        return self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=LR, momentum=0.9)


def data(size=24):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, 4, dtype=torch.float64, generator=generator)
    return TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 1).long())


def fit(net, *callbacks, **settings):
    trainer = pl.Trainer(callbacks=list(callbacks), **{**SETTINGS, "logger": False, **settings})
    torch.manual_seed(2)
    trainer.fit(net, DataLoader(data(), batch_size=SIZE))
    return trainer


def logged(tmp_path, callback, net=None, **settings):
    """{series: {step: value}} of all scalars."""
    net = net or Net()
    fit(net, callback, logger=TensorBoardLogger(tmp_path, name="", version=""), **settings)
    accumulator = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in accumulator.Tags()["scalars"] if tag.startswith("curvature")]
    return {tag: {event.step: event.value for event in accumulator.Scalars(tag)} for tag in tags}


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


class Truth:
    """Per-sample gradients, Hessian and GGN of one optimizer step, the naive way."""

    def __init__(self, net, step):
        seen = [s for s in net.seen if s[0] == step]
        self.params = seen[0][1]
        self.x, self.y = (torch.cat(parts) for parts in zip(*(s[2] for s in seen)))
        names, shapes = zip(*((name, p.shape) for name, p in net.named_parameters()))

        def tree(vector):
            parts = vector.split([shape.numel() for shape in shapes])
            return {name: part.view(shape) for name, part, shape in zip(names, parts, shapes)}

        def loss(vector, x=self.x, y=self.y):
            return net.loss((x, y), tree(vector))

        def output(vector):
            return torch.func.functional_call(net, tree(vector), (self.x,))

        gradient = torch.func.grad(loss)
        self.g = torch.stack(
            [gradient(self.params, x[None], y[None]) for x, y in zip(self.x, self.y)]
        )
        self.mean, self.loss = self.g.mean(0), loss(self.params)
        self.hessian = torch.func.hessian(loss)(self.params)
        jacobian, p = torch.func.jacrev(output)(self.params), output(self.params).softmax(1)
        curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        self.ggn = torch.einsum("ncp,ncd,ndq->pq", jacobian, curvature, jacobian) / len(p)


def square(vector):
    return vector @ vector


def noise(t):
    return t.g.var(0).sum()


EXACT = {
    "grad_norm": lambda t: t.mean.norm(),
    "grad_mean": lambda t: t.mean.mean(),
    "grad_std": lambda t: t.mean.std(),
    "grad_max": lambda t: t.mean.abs().max(),
    "sparsity": lambda t: (t.mean == 0).double().mean(),
    "sample_norm_median": lambda t: t.g.norm(dim=1).quantile(0.5),
    "sample_norm_p5": lambda t: t.g.norm(dim=1).quantile(0.05),
    "sample_norm_p95": lambda t: t.g.norm(dim=1).quantile(0.95),
    "sample_norm_max": lambda t: t.g.norm(dim=1).max(),
    "grad_variance": noise,
    "grad_signal": lambda t: square(t.mean) - noise(t) / len(t.g),
    "ggn_trace_exact": lambda t: t.ggn.trace(),
    "ggn_max_eigenvalue": lambda t: torch.linalg.eigvalsh(t.ggn)[-1],
    "hessian_max_eigenvalue": lambda t: torch.linalg.eigvalsh(t.hessian)[-1],
    "mean_gsnr": lambda t: (t.mean.square() / t.g.var(0)).mean(),
    "early_stopping": lambda t: 1 - len(t.g) * (t.mean.square() / t.g.var(0)).mean(),
    "grad_diversity": lambda t: t.g.square().sum() / square(t.g.sum(0)),
    "norm_test": lambda t: (noise(t) / len(t.g)).sqrt() / t.mean.norm(),
    "inner_product_test": lambda t: ((t.g @ t.mean).var() / len(t.g)).sqrt() / square(t.mean),
    "orthogonality_test": lambda t: (
        (
            (t.g - (t.g @ t.mean)[:, None] * t.mean / square(t.mean)).square().sum()
            / (len(t.g) - 1)
            / len(t.g)
        ).sqrt()
        / t.mean.norm()
    ),
    "cabs": lambda t: LR * noise(t) / t.loss,
}
SAMPLED = {
    "ggn_trace": lambda t: t.ggn.trace(),
    "hessian_trace": lambda t: t.hessian.trace(),
    "tic_trace": lambda t: t.g.square().sum(1).mean() / t.ggn.trace(),
    "tic_diag": lambda t: (t.g.square().mean(0) / t.ggn.diagonal()).sum(),
}
OF_THE_COURSE = {
    "noise_scale",
    "noise_scale_norm_layers",
    "suggested_batch_size",
    "update_size",
    "distance",
    "alpha",
}
TOLERANCE = {
    "ggn_max_eigenvalue": 2e-3,
    "hessian_max_eigenvalue": 2e-3,
}  # of Lanczos' stopping criterion


def test_every_quantity_has_a_test():
    series = {name for quantity in QUANTITIES.values() for name in quantity.series}
    assert series == EXACT.keys() | SAMPLED.keys() | OF_THE_COURSE


@pytest.mark.parametrize("accumulate", [1, 2])
def test_exact_quantities_equal_brute_force(tmp_path, accumulate):
    net = Net()
    found = logged(tmp_path, CurvatureCallback("all"), net, accumulate_grad_batches=accumulate)
    for step in range(4 // accumulate):
        truth = Truth(net, step)
        for name, formula in EXACT.items():
            if (
                accumulate == 1 or name not in TOLERANCE
            ):  # eigenvalues are averaged over the micro-batches
                value = found[f"curvature/{name}"][step]
                assert value == pytest.approx(
                    formula(truth).item(), rel=TOLERANCE.get(name, 1e-6)
                ), name


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_quantities_converge(tmp_path, name):
    net = Net()
    found = logged(
        tmp_path, CurvatureCallback([name], mc_samples=2000), net, accumulate_grad_batches=2
    )
    for step, value in found[f"curvature/{name}"].items():
        assert value == pytest.approx(SAMPLED[name](Truth(net, step)).item(), rel=0.08)


def test_quantities_of_the_course_equal_brute_force(tmp_path):
    net = Net()
    found = logged(
        tmp_path, CurvatureCallback(["update_size", "distance", "alpha"]), net, max_epochs=2
    )
    steps = [params for _, params, _ in net.seen] + [flat(net.parameters())]
    for t in range(8):
        assert found["curvature/update_size"][t] == pytest.approx(
            (steps[t + 1] - steps[t]).norm().item(), rel=1e-6
        )
        assert found["curvature/distance"][t] == pytest.approx(
            (steps[t + 1] - steps[0]).norm().item(), rel=1e-6
        )
    assert list(found["curvature/alpha"]) == list(range(1, 8))
    for t, value in found["curvature/alpha"].items():
        update = steps[t] - steps[t - 1]
        slopes = [Truth(net, s).mean @ update for s in (t - 1, t)]
        assert value == pytest.approx((-slopes[1] / slopes[0]).item(), rel=1e-5)


@pytest.mark.parametrize(("lr", "alpha"), [(0.25, -0.5), (0.5, 0.0), (1.0, 1.0)])
def test_alpha_of_a_quadratic(lr, alpha):
    """The loss (θ - 1)² / 2 · 2: a step of 1/2 reaches the minimum, a step of 1 its mirror image."""

    class Quadratic(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3, dtype=torch.float64))

        def training_step(self, batch, batch_idx):
            return (self.w - 1).square().sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=lr)

    trainer = fit(Quadratic(), CurvatureCallback("alpha"), max_steps=2)
    assert trainer.callback_metrics["curvature/alpha"].item() == pytest.approx(alpha, abs=1e-12)


def test_alpha_needs_the_step_before_a_logged_one_only(tmp_path):
    net = Net()
    found = logged(tmp_path, CurvatureCallback("alpha", every_n_steps=3), net, max_epochs=2)
    assert list(found["curvature/alpha"]) == [2, 5]


def test_noise_scale_of_a_simulation_with_known_truth(tmp_path):
    """The samples are x ~ N(0, I) and the loss is |w - x|² / 2, so that G = w and tr Σ = d."""

    class Mean(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.full((1, 50), 0.15, dtype=torch.float64))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

        def training_step(self, batch, batch_idx):
            return 25 * F.mse_loss(
                F.linear(torch.ones(16, 1, dtype=torch.float64), self.w.t()), batch[0]
            )

    net = Mean()
    samples = torch.randn(
        16 * 600, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    callback = CurvatureCallback(
        ["noise_scale", "suggested_batch_size", "grad_variance"], ema=0.998
    )
    trainer = pl.Trainer(callbacks=[callback], logger=False, **SETTINGS)
    trainer.fit(net, DataLoader(TensorDataset(samples), batch_size=16))
    assert trainer.callback_metrics["curvature/noise_scale"].item() == pytest.approx(
        1 / 0.15**2, rel=0.1
    )
    assert trainer.callback_metrics["curvature/suggested_batch_size"] in (32.0, 64.0)
    assert trainer.callback_metrics["curvature/grad_variance"].item() == pytest.approx(50, rel=0.2)


def test_default_is_at_most_ten_scalars_and_no_per_sample_gradient():
    series = [name for quantity in DEFAULT for name in QUANTITIES[quantity].series]
    assert len(series) == 10
    fields = {field for quantity in DEFAULT for field in QUANTITIES[quantity].fields}
    assert fields == {"batch_l2", "ggn_trace_mc"}


def test_gradient_quantities_need_no_recording(tmp_path):
    class Unsupported(Net):
        def __init__(self):
            super().__init__()
            self.net.insert(1, nn.BatchNorm1d(5))

    names = ["grad_norm", "update_size", "distance", "alpha"]
    found = logged(tmp_path, CurvatureCallback(names), Unsupported())
    assert found.keys() == {f"curvature/{name}" for name in names}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantities": ["noise_scal"]}, "found 'noise_scal'; did you mean 'noise_scale'"),
        ({"quantities": "ggn_trac"}, "did you mean 'ggn_trace' or 'ggn_trace_exact'"),
        ({"quantities": ["?"]}, "did you mean 'grad_norm' or 'sample_norms'"),
        ({"layers": "("}, "`layers` must be a bool, 'topk' or a regular expression, found '\\('"),
        ({"max_layers": 0}, "`max_layers` must be positive, found 0"),
        (
            {"prog_bar": ["noise_scal"]},
            "`prog_bar` must name logged series, found 'noise_scal'; did you mean 'noise",
        ),
    ],
)
def test_bad_settings_name_the_nearest_valid_ones(settings, message):
    with pytest.raises(ValueError, match=message):
        CurvatureCallback(**settings)


def test_output_must_be_a_submodule():
    with pytest.raises(
        ValueError, match="`output` must be a submodule, found 'nett'; did you mean 'net'"
    ):
        fit(Net(), CurvatureCallback(output="nett"))


def test_output_gives_the_curvature_of_a_hand_written_loss(tmp_path):
    class ByHand(Net):
        def loss(self, batch, params=None):
            x, y = batch
            output = (
                self.net(x) if params is None else torch.func.functional_call(self, params, (x,))
            )
            return -output.log_softmax(1)[torch.arange(len(y)), y].mean()

    net = ByHand()
    found = logged(tmp_path, CurvatureCallback(["ggn_trace_exact", "norm_test"], output="net"), net)
    for step, value in found["curvature/ggn_trace_exact"].items():
        truth = Truth(net, step)
        assert value == pytest.approx(truth.ggn.trace().item(), rel=1e-6)
        assert found["curvature/norm_test"][step] == pytest.approx(
            EXACT["norm_test"](truth).item(), rel=1e-6
        )


def test_no_series_is_ever_nan_or_infinite(tmp_path):
    for series in logged(
        tmp_path, CurvatureCallback("all", layers=True), accumulate_grad_batches=2
    ).values():
        assert all(math.isfinite(value) for value in series.values())


def test_callbacks_with_different_outputs_side_by_side():
    body, head = (
        CurvatureCallback("ggn_trace_exact", output="net"),
        CurvatureCallback("grad_variance", output="net.0"),
    )
    trainer = fit(Net(), body, head)
    assert trainer.callback_metrics["curvature/ggn_trace_exact"] > 0
    assert trainer.callback_metrics["curvature/grad_variance"] > 0
