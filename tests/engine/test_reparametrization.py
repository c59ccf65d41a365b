"""Parameters behind a transform: re-indexings keep the structure of their terms, everything else is exact."""

import oracle
import pytest
import torch
import torch.nn.functional as F
from losses_table import LOSS
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from zoo import QUANTITIES, Problem, assert_close, assert_fields, compute

from lightning_curv.extensions import (
    KFLR,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    SqrtGGNExact,
)


class Expression(nn.Module):
    """tanh of a function of the input and one parameter."""

    def __init__(self, function, *shape):
        super().__init__()
        self.function, self.W = function, nn.Parameter(torch.randn(shape))

    def forward(self, x):  # [N, 3, 4]
        return torch.tanh(self.function(x, self.W)).flatten(1)


def problem(model, N=3, T=3) -> Problem:
    torch.manual_seed(0)
    model, X = model.double(), torch.randn(N, T, 4, dtype=torch.float64)
    with torch.no_grad():
        return Problem(model, X, LOSS["mse_sum"].target(model(X).shape), LOSS["mse_sum"])


def assert_everything_right(case):
    compute(case, *[extension() for extension, _, _ in QUANTITIES], SqrtGGNExact(), check=True)
    for _, field, naive in QUANTITIES:
        assert_fields(case, field, naive(case))


# function, shape of W, shapes of the Kronecker factors (None: no Kronecker structure)
REINDEXED = {
    "linear_t": (lambda x, W: F.linear(x, W.t()), (4, 2), [4, 2]),
    "matmul_T": (lambda x, W: x @ W.T, (2, 4), [2, 4]),
    "matmul_mT": (lambda x, W: x @ W.mT, (2, 4), [2, 4]),
    "transpose_negative": (lambda x, W: x @ W.transpose(-1, -2), (2, 4), [2, 4]),
    "transpose_twice": (lambda x, W: F.linear(x, W.T.contiguous().mT), (2, 4), [2, 4]),
    "clone": (lambda x, W: F.linear(x, W.clone()), (2, 4), [2, 4]),
    "flat_storage": (lambda x, W: F.linear(x, W.view(2, 4)), (8,), [2, 4]),
    "stacked_storage": (lambda x, W: F.linear(x, W.squeeze(0).flatten(0, 1)), (1, 2, 3, 4), [6, 4]),
    "unsqueezed": (lambda x, W: F.conv1d(x.mT, W.unsqueeze(-1)), (2, 4), [2, 4]),
    "convolution_transposed": (lambda x, W: F.conv1d(x, W.transpose(0, 1)), (3, 2, 2), [2, 6]),
    "convolution_permuted": (lambda x, W: F.conv1d(x, W.permute(-1, 0, 1)), (3, 2, 2), [6, 2]),
    "convolution_reversed_axes": (lambda x, W: F.conv1d(x, W.permute(2, 1, 0)), (2, 3, 2), None),
    "rows": (lambda x, W: F.linear(x, W[1:3]), (5, 4), [5, 4]),
    "columns": (lambda x, W: F.linear(x, W[:, -5:-1]), (2, 6), [2, 6]),
    "strided_columns": (lambda x, W: F.linear(x[..., :2], W[:, 1::2]), (2, 4), [2, 4]),
    "narrow": (lambda x, W: F.linear(x, W.narrow(0, 1, 2)), (4, 4), [4, 4]),
    "chunk": (lambda x, W: F.linear(x, W.chunk(3)[1]), (6, 4), [6, 4]),
    "split": (lambda x, W: F.linear(x, W.split([1, 2, 2])[2]), (5, 4), [5, 4]),
    "chunks_of_one_matrix": (
        lambda x, W: F.linear(x, W.chunk(2)[0]) + F.linear(x.sin(), W.chunk(2)[1]),
        (4, 4),
        [4, 4],
    ),
    "row_of_a_transpose": (lambda x, W: F.linear(x, W.T[1:3]), (4, 3), [4, 3]),
    "offset": (lambda x, W: F.linear(x[:, :2], torch.ones(2, 4).to(x), W[1:3]), (4,), [4]),
    "position_table": (lambda x, W: x + W[:, :3], (1, 5, 4), None),
    "channels_from_storage": (lambda x, W: x * W.view(3, 1), (3,), None),
    "table_of_tokens": (lambda x, W: F.embedding((x[..., 0] > 0).long(), W.T), (2, 3), None),
}


@pytest.mark.parametrize("name", REINDEXED)
def test_reindexings_keep_the_structure(name):
    function, shape, sizes = REINDEXED[name]
    case = problem(Expression(function, *shape))
    assert_everything_right(case)
    compute(case, KFLR())
    factors = case.model.W.kflr
    assert [f.shape for f in factors] == (
        [(case.model.W.numel(),)] if sizes is None else [(size, size) for size in sizes]
    )


MATRICES = [
    name
    for name, (_, shape, sizes) in REINDEXED.items()
    if sizes is not None and not name.startswith(("convolution", "unsqueezed", "chunks", "stacked"))
]


@pytest.mark.parametrize("name", MATRICES)
def test_their_kronecker_product_is_exact_for_one_datum(name):
    """In the row-major order of the parameter, whatever the order of the transformed value."""
    function, shape, _ = REINDEXED[name]
    case = problem(Expression(function, *shape), N=1, T=1)
    compute(case, KFLR())
    factors = case.model.W.kflr
    product = torch.kron(*factors) if len(factors) == 2 else factors[0]
    assert_close(product, oracle.ggn(case)["W"].sum(0))


def test_kronecker_factors_of_a_permuted_convolution():
    case = problem(Expression(REINDEXED["convolution_permuted"][0], 3, 2, 2))
    plain = problem(Expression(lambda x, W: F.conv1d(x, W), 2, 3, 2))
    plain.model.W.data = case.model.W.detach().permute(-1, 0, 1).contiguous()
    for each in (case, plain):
        compute(each, KFLR())
    A, B = case.model.W.kflr
    assert_close(A, plain.model.W.kflr[1])
    assert_close(B, plain.model.W.kflr[0])


def test_nothing_is_dense_behind_a_transpose():
    """Squared norms of `x @ W.T` take Gram matrices: no [N, out, in] anywhere."""
    N, T, D = 16, 2, 512

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.W = nn.Parameter(torch.randn(D, D) / D)

        def forward(self, x):
            return (x @ self.W.T).mean(1)

    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            tensors = [
                t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)
            ]
            largest = max([largest, *(t.numel() for t in tensors)])
            return out

    model, X = Wide(), torch.randn(N, T, D)
    case = Problem(model, X, torch.randn(N, D), LOSS["mse_sum"])
    with Watch():
        compute(case, BatchL2Grad())
    assert largest <= 2 * D * D


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_casts_keep_the_structure_and_the_precision_of_the_parameter(dtype):
    """A weight stored in `dtype` and used in another; results are in float32 or better, never in bfloat16."""
    torch.manual_seed(0)
    used = torch.float32 if dtype is torch.bfloat16 else torch.float64

    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.W = nn.Parameter(torch.randn(2, 4).to(dtype))

        def forward(self, x):
            return torch.tanh(F.linear(x, self.W.to(used)))

    X = torch.randn(5, 4, dtype=used)
    case = Problem(Cast(), X, torch.randn(5, 2, dtype=used), LOSS["mse_sum"])
    compute(case, BatchGrad(), DiagGGNExact(), KFLR())
    W = case.model.W
    assert [f.shape for f in W.kflr] == [(2, 2), (4, 4)]
    assert {t.dtype for t in (W.grad_batch, W.diag_ggn_exact, *W.kflr)} == {torch.float32}
    precise = Problem(Cast(), X.double(), case.y.double(), case.loss)
    precise.model.W.data = W.detach().double()
    precise.model.forward = lambda x: torch.tanh(F.linear(x, precise.model.W))
    for field, naive in {
        "grad_batch": oracle.grad_batch,
        "diag_ggn_exact": oracle.diag_ggn,
    }.items():
        torch.testing.assert_close(
            getattr(W, field).double(), naive(precise)["W"], rtol=1e-5, atol=1e-6
        )


# --- parametrizations: pulled back densely ---------------------------------------------------------------------------


class Symmetric(nn.Module):
    def forward(self, W):
        return W.triu() + W.triu(1).T


class Exponential(nn.Module):
    def forward(self, W):
        return W.exp()


class LowRank(nn.Module):
    """A frozen matrix and a trainable update."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(4, 1)), nn.Parameter(torch.randn(1, 4))

    def forward(self, W):
        return W + self.up @ self.down


def parametrized(module, *parametrizations_, name="weight"):
    for each in parametrizations_:
        parametrize.register_parametrization(module, name, each)
    return module


def low_rank():
    layer = nn.Linear(4, 4)
    layer.weight.requires_grad_(False)
    return parametrized(layer, LowRank())


PARAMETRIZED = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(4, 2)),
    "weight_norm_of_all": lambda: parametrizations.weight_norm(nn.Linear(4, 2), dim=None),
    "weight_norm_convolution": lambda: parametrizations.weight_norm(nn.Conv1d(3, 2, 2)),
    "weight_norm_deconvolution": lambda: parametrizations.weight_norm(
        nn.ConvTranspose1d(3, 2, 2), dim=1
    ),
    "old_weight_norm": lambda: nn.utils.weight_norm(nn.Linear(4, 2)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 2)).eval(),
    "spectral_norm_training": lambda: parametrizations.spectral_norm(nn.Linear(4, 1)),
    "old_spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(4, 2)).eval(),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 2)),
    "symmetric": lambda: parametrized(nn.Linear(4, 4), Symmetric()),
    "chained": lambda: parametrized(nn.Linear(4, 4), Symmetric(), Exponential()),
    "bias": lambda: parametrized(nn.Linear(4, 2), Exponential(), name="bias"),
    "low_rank_update": low_rank,
    "pruned": lambda: prune.l1_unstructured(nn.Linear(4, 2), "weight", 0.5),
    "pruned_bias": lambda: prune.random_unstructured(nn.Conv1d(3, 2, 2), "bias", 1),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", PARAMETRIZED)
def test_parametrization_equals_brute_force(name):
    torch.manual_seed(0)
    assert_everything_right(problem(nn.Sequential(PARAMETRIZED[name](), nn.Tanh(), nn.Flatten())))


@pytest.mark.parametrize("cached", [False, True])
def test_parametrized_weight_used_twice(cached):
    """`parametrize.cached()` computes the weight once for both uses."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = parametrized(nn.Linear(4, 4), Symmetric())

        def forward(self, x):
            if not cached:
                return self.layer(torch.tanh(self.layer(x))).flatten(1)
            with parametrize.cached():
                return self.layer(torch.tanh(self.layer(x))).flatten(1)

    assert_everything_right(problem(Twice()))


def test_one_tensor_in_several_ops():
    """A matrix as weight of `F.linear`, as right factor, as transposed weight, and its row as an offset."""
    function = lambda x, W: F.linear(F.linear(x, W) @ W, W.T.T)[..., :2] + x @ W.T[:, :2] + W[0, :2]  # noqa: E731
    assert_everything_right(problem(Expression(function, 3, 4)))
