"""What nobody promised: right, or refused."""

import copy

import oracle
import pytest
import torch
import torch.nn.functional as F
from losses_table import LOSS
from torch import nn
from trap_problems import ORACLES, assert_right, both, problem
from zoo import ROW, Problem, assert_close, assert_fields, compute, reference

from lightning_curv import curvature
from lightning_curv.extensions import (
    KFLR,
    BatchGrad,
    SumGradSquared,
)


def refused(run) -> bool:
    """Whether `run` said that it cannot do this; any other exception is an accident."""
    try:
        run()
    except NotImplementedError:
        return True
    return False


class PerSampleTable(nn.Module):
    """A parameter with one row per sample; the other axis has as many entries as there are samples."""

    def __init__(self):
        super().__init__()
        self.inp, self.table = nn.Linear(5, 3), nn.Parameter(torch.rand(4, 1, 3))

    def forward(self, x):
        return (torch.tanh(self.inp(x)) * self.table).mean(1)


class Recurrent(nn.Module):
    def __init__(self, cell, batch_first):
        super().__init__()
        self.cell, self.head, self.batch_first = (
            cell(5, 3, batch_first=batch_first),
            nn.Linear(3, 3),
            batch_first,
        )

    def forward(self, x):
        states, _ = self.cell(x if self.batch_first else x.transpose(0, 1))
        return self.head(states[:, -1] if self.batch_first else states[-1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(5, 1, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x)[0].mean(1))


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.bag((x[:, :, 0] > 0).long() * 3)))


class RowsOfAParameter(nn.Module):
    """Tiled and repeated parameters."""

    def __init__(self):
        super().__init__()
        self.p, self.q, self.head = (
            nn.Parameter(torch.rand(5)),
            nn.Parameter(torch.rand(1, 2, 5)),
            nn.Linear(5, 3),
        )

    def forward(self, x):
        x = x * self.p.repeat(x.shape[0], x.shape[1], 1)
        x = torch.tanh(x + self.q.repeat(1, x.shape[1] // 2, 1))
        return self.head(x.mean(1) + self.p.repeat_interleave(1))


class StackedAlongTheBatch(nn.Module):
    """A parameter is one more row of the batch, removed again later."""

    def __init__(self):
        super().__init__()
        self.row, self.inp = nn.Parameter(torch.rand(1, 5)), nn.Linear(5, 3)

    def forward(self, x):
        return self.inp(torch.cat([self.row, x.mean(1)]))[1:] + self.row[0, :3]


class Doubled(nn.Module):
    """Two augmented views of every sample as one batch of 2N."""

    def __init__(self):
        super().__init__()
        self.inp, self.head = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        a, b = self.inp(torch.cat([x.mean(1), x[:, 0]])).tanh().chunk(2)
        return self.head(a * b)


class LatentQueries(nn.Module):
    """Learned queries pass through layers alone, with a batch axis of one, before they meet the data (Perceiver)."""

    def __init__(self, expand_first):
        super().__init__()
        self.latents = nn.Parameter(torch.rand(1, 2, 5))
        self.norm, self.query, self.head = nn.LayerNorm(5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.expand_first = expand_first

    def forward(self, x):  # [N, T, 5]
        latents = self.latents.expand(len(x), -1, -1) if self.expand_first else self.latents
        q = self.query(self.norm(latents))
        return self.head((torch.softmax(q @ x.mT, -1) @ x).mean(1))


class ConstantTokens(nn.Module):
    """Constants pass through a layer and are then put beside the data."""

    def __init__(self, leading):
        super().__init__()
        self.register_buffer("constants", torch.rand(*leading, 2, 3))
        self.embed, self.head = nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, x):
        tokens = self.embed(self.constants).expand(len(x), -1, -1)
        return self.head(torch.tanh(torch.cat([tokens, x], 1)).mean(1))


class Spectral(nn.Module):
    """A Fourier layer: a real parameter holds complex weights."""

    def __init__(self):
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.rand(4, 2, 3, 2)), nn.Linear(5, 3)

    def forward(self, x):
        modes = torch.einsum("nik,iok->nok", torch.fft.rfft(x), torch.view_as_complex(self.weight))
        return self.head(torch.fft.irfft(modes, n=5).mean(1))


class Phases(nn.Module):
    """Complex numbers between real layers."""

    def __init__(self):
        super().__init__()
        self.inp, self.head = nn.Linear(5, 4), nn.Linear(2, 3)

    def forward(self, x):
        return self.head(
            torch.view_as_complex(self.inp(x.mean(1)).unflatten(1, (2, 2))).square().abs()
        )


class Routed(nn.Module):
    """Every token goes to one expert; an expert may get none."""

    def __init__(self, spare):
        super().__init__()
        self.gate, self.head = nn.Linear(5, 2 + spare), nn.Linear(5, 3)
        self.experts = nn.ModuleList(nn.Linear(5, 5) for _ in range(2 + spare))
        if spare:
            nn.init.constant_(self.gate.bias, 9.0)
            nn.init.constant_(self.gate.bias[2:], -9.0)

    def forward(self, x):
        tokens = x.flatten(0, 1)
        chances = self.gate(tokens).softmax(1)
        mixed = torch.zeros_like(tokens)
        for k, expert in enumerate(self.experts):
            rows = chances.argmax(1) == k
            mixed[rows] = expert(tokens[rows]) * chances[rows, k, None]
        return self.head((x + mixed.view_as(x)).mean(1))


class Alone(Routed):
    """One of two experts gets everything."""

    def __init__(self):
        super().__init__(0)
        nn.init.constant_(self.gate.bias[:1], 9.0)
        nn.init.constant_(self.gate.bias[1:], -9.0)


class Rounded(nn.Module):
    """Float64 layers with a cast to float32 between them."""

    def __init__(self):
        super().__init__()
        self.inp, self.head = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.inp(x.mean(1))).float().double())


def sequences(layer):
    return lambda: nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(3))


UNPROMISED = {
    "per_sample_table": PerSampleTable,
    "lstm": lambda: Recurrent(nn.LSTM, True),
    "gru_sequence_first": lambda: Recurrent(nn.GRU, False),
    "rnn": lambda: Recurrent(nn.RNN, True),
    "multihead_attention": Attention,
    "transformer_layer": lambda: sequences(
        nn.TransformerEncoderLayer(5, 1, 6, dropout=0.0, batch_first=True)
    )(),
    "transformer_layer_norm_first": lambda: sequences(
        nn.TransformerEncoderLayer(5, 1, 6, dropout=0.0, batch_first=True, norm_first=True)
    )(),
    "embedding_bag": Bag,
    "instance_norm": lambda: sequences(nn.InstanceNorm1d(4, affine=True))(),
    "spectral_norm": lambda: sequences(
        nn.utils.parametrizations.spectral_norm(nn.Linear(5, 3)).eval()
    )(),
    "orthogonal": lambda: sequences(nn.utils.parametrizations.orthogonal(nn.Linear(5, 3)))(),
    "old_weight_norm": lambda: sequences(nn.utils.weight_norm(nn.Linear(5, 3)))(),
    "transposed_convolution_groups": lambda: sequences(
        nn.ConvTranspose1d(4, 2, 3, stride=2, groups=2)
    )(),
    "prelu": lambda: sequences(nn.PReLU())(),
    "repeats": RowsOfAParameter,
    "stacked_along_the_batch": StackedAlongTheBatch,
    "two_views": Doubled,
    "latent_queries": lambda: LatentQueries(False),
    "latent_queries_expanded": lambda: LatentQueries(True),
    "constant_tokens": lambda: ConstantTokens(()),
    "constant_tokens_leading": lambda: ConstantTokens((1,)),
    "fourier_layer": Spectral,
    "complex_numbers": Phases,
    "routed_tokens": lambda: Routed(0),
    "routed_tokens_and_spare_experts": lambda: Routed(1),
    "routed_to_one_expert": Alone,
    "cast_in_between": Rounded,
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", UNPROMISED)
def test_right_or_refused(name):
    torch.manual_seed(0)
    model = UNPROMISED[name]().double()
    X = torch.randn(4, 4, 5, dtype=torch.float64)
    model(X)
    case = Problem(model, X, torch.tensor([0, 1, 2, 0]), LOSS["ce"])
    if not refused(lambda: compute(case, *both())):
        assert_right(case)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "spelling",
    [
        lambda output, y: F.cross_entropy(output, y, reduction="none").mean(),
        lambda output, y: F.cross_entropy(output, y, reduction="none").sum() / 4,
        lambda output, y: (F.cross_entropy(output, y, reduction="none") * 0.25).sum(),
        lambda output, y: F.cross_entropy(output, y, None, None, -100, None, "mean"),
        lambda output, y: F.cross_entropy(output, y, size_average=False) / 4,
        lambda output, y: F.cross_entropy(output, y, reduce=False).mean(),
        lambda output, y: -output.log_softmax(1).gather(1, y[:, None]).mean(),
        lambda output, y: -(F.one_hot(y, 3) * output.log_softmax(1)).sum(1).mean(),
        lambda output, y: F.nll_loss(output.softmax(1).log(), y),
        lambda output, y: F.nll_loss(torch.log_softmax(output, -1), y),
        lambda output, y: 0.3 * F.cross_entropy(output, y) + 0.7 * F.cross_entropy(output, y),
    ],
)
def test_other_spellings_of_the_loss_are_right_or_refused(spelling):
    case = problem()
    torch.testing.assert_close(spelling(case.model(case.X), case.y), case.compute_loss())
    for extension, (field, naive) in zip(both(), ORACLES.items()):

        def run(extension=extension):
            with curvature(extension):
                spelling(case.model(case.X), case.y).backward()

        if not refused(run):
            assert_fields(case, field, naive(case))


@pytest.mark.parametrize(
    "spelling",
    [
        lambda output, y: (
            sum(F.cross_entropy(output[n : n + 1], y[n : n + 1]) for n in range(4)) / 4
        ),
        lambda output, y: (
            F.cross_entropy(output[:2], y[:2]) / 2 + F.cross_entropy(output[2:], y[2:]) / 2
        ),
        lambda output, y: F.cross_entropy(output.T[None], y[None]),
    ],
    ids=["four_losses_of_one", "two_losses_of_two", "positions"],
)
def test_the_batch_decides_what_a_sample_is(spelling):
    """However the loss is cut, the samples are those of the batch."""
    case = problem()
    scale = spelling(case.model(case.X), case.y).item() / case.compute_loss().item()
    with curvature(*both()):
        spelling(case.model(case.X), case.y).backward()
    assert_fields(case, "diag_ggn_exact", {k: scale * v for k, v in oracle.diag_ggn(case).items()})
    assert_fields(case, "grad_batch", {k: scale * v for k, v in oracle.grad_batch(case).items()})


def test_losses_of_two_kinds_add_their_curvature():
    """Multi-task: 0.5·CE + 2·MSE of one output."""
    case, other = problem(), problem(name="mlp_mse")
    other.model, other.X = case.model, case.X
    with curvature(*both(), SumGradSquared()):
        output = case.model(case.X)
        (0.5 * F.cross_entropy(output, case.y) + 2 * F.mse_loss(output, other.y)).backward()
    for key, p in case.parameters().items():
        g = 0.5 * oracle.grad_batch(case)[key] + 2 * oracle.grad_batch(other)[key]
        assert_close(p.grad_batch, g)
        assert_close(p.sum_grad_squared, g.square().sum(0))
        assert_close(
            p.diag_ggn_exact, 0.5 * oracle.diag_ggn(case)[key] + 2 * oracle.diag_ggn(other)[key]
        )


def test_language_model_with_flattened_loss():
    """`cross_entropy(logits.flatten(0, 1), y.flatten())` has N samples, not N·T."""
    case = ROW["language_model"].make()
    with curvature(*both(), KFLR()):
        logits = case.model(case.X).transpose(1, 2)
        F.cross_entropy(logits.flatten(0, 1), case.y.flatten()).backward()
    assert_fields(case, "grad_batch", reference("grad_batch", "language_model"))
    assert_fields(case, "diag_ggn_exact", reference("diag_ggn", "language_model"))
    B, A = case.model.head.weight.kflr
    for actual, expected in zip((B, A), oracle.kronecker(case, "expand")["head.weight"]):
        assert_close(actual, expected)


@pytest.mark.parametrize(
    "mix",
    [
        lambda h: h - h.mean(0),
        lambda h: h / h.norm(),
        lambda h: (h @ h.T).softmax(1) @ h,
        lambda h: h + h.flip(0),
    ],
)
def test_mixing_of_samples_is_found_by_the_check(mix):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.b(mix(self.a(x)))

    case = problem()
    case.model = Mixed().double()
    with pytest.raises((NotImplementedError, RuntimeError), match="sample"):
        compute(case, BatchGrad(), check=True)


def test_backward_to_some_inputs_only():
    case = problem()
    chosen = case.model[2].weight
    with curvature(BatchGrad()):
        case.compute_loss().backward(inputs=[chosen])
    assert_close(chosen.grad_batch, oracle.grad_batch(case)["2.weight"])
    assert case.model[0].weight.grad is None


def test_sparse_embedding_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3)).double()
    case = Problem(
        model,
        torch.tensor([[0, 1], [1, 1], [5, 2], [0, 5]]),
        torch.tensor([0, 1, 2, 1]),
        LOSS["ce"],
    )
    with curvature(*both(), check=True):
        case.compute_loss().backward()
    dense = copy.deepcopy(case)
    dense.model[0].sparse = False
    for field, naive in ORACLES.items():
        for key, expected in naive(dense).items():
            assert_close(getattr(case.parameters()[key], field), expected, label=key)
