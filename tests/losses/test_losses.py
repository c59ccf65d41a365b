"""Every loss, as function and as module, against brute force on one small network."""

from dataclasses import replace

import oracle
import pytest
import torch
import torch.nn.functional as F
from estimates import RUNS, assert_unbiased
from losses_table import (
    LOSS,
    LOSSES,
    counts,
    elementwise_summand,
    labels,
    probabilities,
    real,
    soft_bits,
)
from oracle import gradient
from small_networks import N, small_problem
from torch import nn
from zoo import QUANTITIES, Problem, assert_close, assert_fields, compute

from lightning_curv import curvature, extend
from lightning_curv.errors import UnsupportedError
from lightning_curv.extensions import (
    GGNMP,
    KFLR,
    PCHMP,
    BatchDiagHessian,
    BatchGrad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    SqrtGGNExact,
)
from lightning_curv.extensions.spectrum import MaxEigenvalue
from lightning_curv.losses import LOSSES as REGISTERED
from lightning_curv.losses import PARTS
from lightning_curv.losses.categorical import Categorical, _classes
from lightning_curv.terms.owners import BatchAxis

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")  # kl_div


def by_function(problem):
    return problem.compute_loss


def by_module(problem):
    criterion = problem.loss.module()
    return lambda: criterion(problem.model(problem.X), problem.y)


@pytest.mark.parametrize("form", [by_function, by_module])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_quantities_equal_brute_force(loss, form):
    problem = small_problem(loss)
    with curvature(*[extension() for extension, _, _ in QUANTITIES], check=True):
        form(problem)().backward()
    for _, field, naive in QUANTITIES:
        assert_fields(problem, field, naive(problem))


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_square_root_equals_brute_force(loss):
    problem = small_problem(loss)
    compute(problem, SqrtGGNExact())
    blocks = oracle.ggn(problem)
    for key, p in problem.parameters().items():
        V = p.sqrt_ggn_exact
        assert V.shape == (3 * torch.Size(loss.extra).numel() * loss.calls, N, *p.shape)
        V = V.reshape(*V.shape[:2], -1)
        assert_close(torch.einsum("vnp,vnq->npq", V, V), blocks[key], label=key)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_kronecker_factors_equal_brute_force(loss):
    problem = small_problem(loss)
    compute(problem, KFLR())
    params = problem.parameters()
    for key, factors in oracle.kronecker(problem, "expand").items():
        for actual, expected in zip(params[key].kflr, factors):
            assert_close(actual, expected, label=key)


@pytest.mark.parametrize(
    "loss", [loss for loss in LOSSES if loss.name != "l1"], ids=lambda loss: loss.name
)
def test_sampled_labels_are_unbiased(loss):
    problem = small_problem(loss)
    generator = torch.Generator().manual_seed(0)
    estimates = {key: [] for key in problem.parameters()}
    for _ in range(RUNS // 2):
        compute(problem, DiagGGNMC(mc_samples=16), generator=generator)
        for key, p in problem.parameters().items():
            estimates[key].append(p.diag_ggn_mc)
    # Squared errors and counts are drawn without any spread in the last layer: not even rounding of
    # the oracle would be within the standard error.
    compute(problem, DiagGGNExact())
    for key, p in problem.parameters().items():
        assert_unbiased(torch.stack(estimates[key]), p.diag_ggn_exact, key)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_factor_on_the_loss_scales_gradients_and_curvature(loss):
    plain, tripled = small_problem(loss), small_problem(loss)
    compute(plain, BatchGrad(), DiagGGNExact())
    with curvature(BatchGrad(), DiagGGNExact()):
        (3 * tripled.compute_loss()).backward()
    for p, q in zip(plain.model.parameters(), tripled.model.parameters()):
        assert_close(q.grad_batch, 3 * p.grad_batch)
        assert_close(q.diag_ggn_exact, 3 * p.diag_ggn_exact)


def test_log_softmax_in_the_model_and_extended_nll():
    """`LogSoftmax` as last layer and `NLLLoss` are one cross entropy."""
    loss = next(loss for loss in LOSSES if loss.name == "ce")
    problem = small_problem(loss)
    model = extend(nn.Sequential(problem.model, nn.LogSoftmax(1)))
    criterion = extend(nn.NLLLoss())
    value = criterion(model(problem.X), problem.y)
    with curvature(DiagGGNExact(), BatchGrad()):
        value.backward()
    assert_fields(problem, "diag_ggn_exact", oracle.diag_ggn(problem))
    assert_fields(problem, "grad_batch", oracle.grad_batch(problem))


def test_loss_without_closed_form_serves_gradients():
    """Gradient quantities need no Hessian: any loss will do."""
    problem = small_problem(LOSSES[0])
    with curvature(BatchGrad()):
        (problem.model(problem.X) ** 4).sum().backward()
    for p in problem.model.parameters():
        assert_close(p.grad_batch.sum(0), p.grad)


# --- the likelihoods themselves ---------------------------------------------------------------------------------------

SCALE = torch.linspace(-1, 2, 12, dtype=torch.float64).reshape(4, 3)
LOG_P = torch.linspace(-0.7, 0.9, 12, dtype=torch.float64).reshape(3, 4).T.log_softmax(1)
POSITIVE = LOG_P.exp()

CALLS = {
    "cross_entropy": (F.cross_entropy, LOG_P * 2, labels, {}),
    "nll_loss": (F.nll_loss, LOG_P, labels, {}),
    "kl_div": (F.kl_div, LOG_P, probabilities, {}),
    "mse_loss": (F.mse_loss, LOG_P, real, {}),
    "l1_loss": (F.l1_loss, LOG_P, real, {}),
    "smooth_l1_loss": (F.smooth_l1_loss, LOG_P, real, {"beta": 2.0}),
    "smooth_l1_loss_0": (F.smooth_l1_loss, LOG_P, real, {"beta": 0.0}),
    "huber_loss": (F.huber_loss, LOG_P, real, {"delta": 2.0}),
    "binary_cross_entropy": (F.binary_cross_entropy, POSITIVE, soft_bits, {}),
    "binary_cross_entropy_with_logits": (F.binary_cross_entropy_with_logits, LOG_P, soft_bits, {}),
    "poisson_nll_loss": (F.poisson_nll_loss, LOG_P, counts, {}),
    "poisson_nll_loss_rates": (F.poisson_nll_loss, POSITIVE, counts, {"log_input": False}),
    "gaussian_nll_loss": (F.gaussian_nll_loss, LOG_P, real, {"var": POSITIVE[:, :1]}),
}


def likelihood(function, input, target, options, scale=None):
    """The library's likelihood of a call with reduction "none", and the loss as a function of its input."""
    torch.manual_seed(0)
    y = target(input.shape)
    scale = SCALE if scale is None else scale
    scale = scale[:, 0] if function in (F.cross_entropy, F.nll_loss) else scale
    found = REGISTERED[function](scale, input=input, target=y, reduction="none", **options)
    return found, lambda f: (scale * function(f, y, reduction="none", **options)).sum()


def dense(columns) -> torch.Tensor:
    """Σ ± S Sᵀ per sample, [N, E, E]."""
    total = torch.zeros(4, 3, 3, dtype=torch.float64)
    for column, signs in columns:
        signs = torch.ones(4, dtype=torch.float64) if signs is None else signs
        total += torch.einsum("n,ne,nf->nef", signs, column, column)
    return total


@pytest.mark.parametrize("name", CALLS)
def test_signed_columns_are_the_hessian_of_the_loss(name):
    """At the loss' own input, negative weights included."""
    found, function = likelihood(*CALLS[name])
    whole = torch.autograd.functional.hessian(function, CALLS[name][1])
    exact = torch.stack([whole[n, :, n] for n in range(4)])
    assert_close(dense(found.hessian_columns(BatchAxis(4))), exact, label=name)


@pytest.mark.parametrize("name", CALLS)
def test_columns_products_and_samples_are_one_matrix(name):
    found, _ = likelihood(*CALLS[name], scale=SCALE.abs())
    H = dense((column, None) for column in found.columns(BatchAxis(4)))
    v = torch.randn(4, 3, dtype=torch.float64)
    assert_close(found.product(v), torch.einsum("nef,nf->ne", H, v), label=name)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([found.sample(generator) for _ in range(10_000)])
    if bool(H.any()):
        assert_unbiased(torch.einsum("rne,rnf->rnef", draws, draws), H, name)


@pytest.mark.parametrize("name", CALLS)
def test_fewest_columns_are_a_square_root_of_the_same_matrix(name):
    found, _ = likelihood(*CALLS[name], scale=SCALE.abs())
    every, fewest = list(found.columns(BatchAxis(4))), list(found.fewest_columns(BatchAxis(4)))
    assert_close(
        dense((column, None) for column in fewest),
        dense((column, None) for column in every),
        label=name,
    )
    assert len(fewest) <= len(every)


def test_classes_have_one_column_less_also_where_probabilities_underflow():
    logits = torch.tensor(
        [[0.0, -200.0, 3.0], [200.0, 0.0, 1.0], [-200.0, -300.0, 0.0], [1.0, 2.0, 3.0]]
    )
    found = REGISTERED[F.cross_entropy](
        torch.ones(()), logits, torch.tensor([0, 1, 2, 0]), reduction="sum"
    )
    p = logits.softmax(1).double()
    columns = torch.stack(list(found.fewest_columns(BatchAxis(4)))).double()
    assert len(columns) == 2
    torch.testing.assert_close(
        torch.einsum("vne,vnf->nef", columns, columns), p.diag_embed() - p[:, :, None] * p[:, None]
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_drawn_classes_have_their_probabilities(dtype):
    """Classes without probability are not drawn, wherever they are; NaN draws something."""
    p = torch.tensor([0, 0.25, 0, 0.125, 0.625, 0], dtype=dtype)
    drawn = _classes(p.expand(100, 200, 6), torch.Generator().manual_seed(0))
    share = torch.bincount(drawn.flatten(), minlength=6) / 20_000
    assert drawn.shape == (100, 200, 1)
    assert torch.equal(share > 0, p > 0)
    torch.testing.assert_close(share, p.float(), rtol=0, atol=0.015)  # four standard deviations
    rows = Categorical(torch.full((3, 4), torch.nan), torch.ones(3, 1), 1).sample(torch.Generator())
    assert bool(rows.isnan().all())


@pytest.mark.parametrize("name", CALLS)
def test_rows_of_samples_in_both_orders(name):
    """[N·T, C] and [T·N, C] are the same rows."""
    found, _ = likelihood(*CALLS[name], scale=SCALE.abs())
    rows = dense((column, None) for column in found.columns(BatchAxis(4)))
    pairs = {False: [(0, 1), (2, 3)], True: [(0, 2), (1, 3)]}
    for minor, samples in pairs.items():
        columns = list(found.columns(BatchAxis(2, inner=minor)))
        for own in samples:
            part = torch.stack([column[list(own)].flatten() for column in columns])
            assert_close(part.T @ part, torch.block_diag(*rows[list(own)]), label=name)


class Heteroscedastic(nn.Module):
    """A mean and a variance from one network."""

    def forward(self, output, y):
        return F.gaussian_nll_loss(output[:, :2], y[:, :2], F.softplus(output[:, 2:]))


def expected_summand(output, y, n):
    """Its expectation over the targets of the model at hand: the Hessian is the Fisher information."""
    mean, var = output[:, :2], F.softplus(output[:, 2:])
    return elementwise_summand(
        mean,
        mean.detach(),
        n,
        lambda f, f0: ((f - f0) ** 2 + var.detach()) / (2 * var) + torch.log(var) / 2,
    )


def test_variance_from_the_network_has_the_fisher_information_of_the_normal():
    loss = replace(LOSS["mse"], name="heteroscedastic", function=Heteroscedastic())
    problem = small_problem(loss)
    expected = Problem(problem.model, problem.X, problem.y, replace(loss, summand=expected_summand))
    compute(problem, DiagGGNExact(), BatchGrad(), check=True)
    assert_fields(problem, "diag_ggn_exact", oracle.diag_ggn(expected))
    generator = torch.Generator().manual_seed(0)
    runs = []
    for _ in range(RUNS // 2):
        compute(problem, DiagGGNMC(mc_samples=16), generator=generator)
        runs.append(problem.model[0].weight.diag_ggn_mc)
    assert_unbiased(torch.stack(runs), oracle.diag_ggn(expected)["0.weight"], "0.weight")


def test_sequence_first_rows():
    """Rows [T·N, C] with N = T: no column may hold two rows of one sample."""
    torch.manual_seed(0)
    first, last = nn.Linear(4, 3).double(), nn.Linear(3, 2).double()
    X, y = torch.randn(2, 2, 4, dtype=torch.float64), torch.randn(2, 2, 2, dtype=torch.float64)

    def diagonal(rows):
        with curvature(DiagGGNExact()):
            h = torch.tanh(first(X))
            h = h - h.mean(1, keepdim=True) / 2  # positions of a sample interact
            F.mse_loss(last(rows(h)), rows(y)).backward()
        return first.weight.diag_ggn_exact

    by_sample = diagonal(lambda t: t.flatten(0, 1))
    assert_close(diagonal(lambda t: t.transpose(0, 1).flatten(0, 1)), by_sample)


# --- refusals ---------------------------------------------------------------------------------------------------------


REFUSALS = {
    "negative": (lambda output, y: -F.mse_loss(output, y), "weights ≥ 0, found a negative one"),
    "negative_class": (
        lambda output, y: -F.cross_entropy(output, y.softmax(1)),
        "weights ≥ 0, found a negative one",
    ),
    "subtracted": (
        lambda output, y: F.cross_entropy(output, y.softmax(1)) - 2 * F.mse_loss(output, y),
        "weights ≥ 0, found a negative one.*`HMP`",
    ),
    "negative_sample": (
        lambda output, y: (
            torch.linspace(-1, 1, len(y)).to(output)
            * F.cross_entropy(output, y.argmax(1), reduction="none")
        ).sum(),
        "weights ≥ 0, found a negative one",
    ),
    "nll": (lambda output, y: F.nll_loss(output, y.argmax(1)), "expects log-probabilities"),
    "kl": (
        lambda output, y: F.kl_div(output, y.softmax(1), reduction="sum"),
        "sum to one over 0 axes",
    ),
    "shape": (
        lambda output, y: F.poisson_nll_loss(output, y[:, :1].exp()),
        "input and target of one shape",
    ),
}


@pytest.mark.parametrize(
    "extension",
    [DiagGGNExact(), DiagGGNMC(), GGNMP(), PCHMP(), PCHMP(modify="abs"), MaxEigenvalue("ggn")],
    ids=lambda extension: f"{extension}-{getattr(extension, 'modify', '')}",
)
@pytest.mark.parametrize("name", REFUSALS)
def test_loss_is_refused_for_curvature(name, extension):
    function, message = REFUSALS[name]
    problem = small_problem(replace(LOSS["mse"], function=function))
    with pytest.raises(UnsupportedError, match=message):
        compute(problem, extension)


def test_hessian_of_a_variance_from_the_network_is_refused():
    part = REGISTERED[PARTS[F.gaussian_nll_loss, "var"]]
    found = part(torch.ones(()), input=POSITIVE, var=LOG_P, target=LOG_P)
    with pytest.raises(UnsupportedError, match="mean and variance share a Hessian"):
        list(found.hessian_columns(BatchAxis(4)))


# --- Hessians of mean and variance ------------------------------------------------------------------------------------


class LearnedVariance(nn.Module):
    """A mean from a network, and a variance from it, from parameters of their own or from both."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        self.log_scale = nn.Parameter(torch.tensor(0.3).double())
        self.log_variance = nn.Parameter(torch.randn(1).double())


VARIANCES = {
    "one_parameter": lambda model, outputs: (2 * model.log_scale).exp().expand(len(outputs)),
    "one_entry": lambda model, outputs: model.log_variance.exp().expand(len(outputs)),
    "network": lambda model, outputs: F.softplus(outputs[:, 1]),
    "both": lambda model, outputs: outputs[:, 1].exp() + model.log_scale.exp(),
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", VARIANCES)
def test_hessians_of_a_mean_and_its_variance(name, reduction):
    model, X, y = LearnedVariance(), torch.randn(4, 3).double(), torch.randn(4).double()

    def loss():
        outputs = model.net(X)
        variance = VARIANCES[name](model, outputs)
        return F.gaussian_nll_loss(outputs[:, 0], y, variance, full=True, reduction=reduction)

    params = [*model.parameters()]
    gradients = torch.autograd.grad(loss(), params, create_graph=True, allow_unused=True)
    for extension in (DiagHessian(), BatchDiagHessian()):
        with curvature(extension):
            loss().backward()
        for p, g in zip(params, gradients):
            if g is None:  # another variance's
                continue
            rows = [gradient(entry, [p])[0] for entry in g.flatten()]
            diagonal = torch.stack([row.flatten()[i] for i, row in enumerate(rows)])
            found = getattr(p, extension.savefield)
            found = found if extension.savefield == "diag_h" else found.sum(0)
            assert_close(found, diagonal.reshape(p.shape))
