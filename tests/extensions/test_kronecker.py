"""Kronecker factors against brute force, for KFAC-expand and KFAC-reduce."""

import copy
from functools import partial

import oracle
import pytest
import torch
import torch.nn.functional as F
from estimates import RUNS, assert_unbiased
from losses_table import LOSS
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from zoo import ROW, Problem, assert_close, assert_fields, compute

from lightning_curv import curvature
from lightning_curv.extensions import (
    KFAC,
    KFLR,
    KFRA,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagGGNMC,
    SumGradSquared,
    Variance,
    kronecker,
)
from lightning_curv.terms.chunks import CHUNK_BYTES

NAMES = [
    "mlp_sigmoid",
    "mlp_mse",
    "mlp_bce",
    "one_datum",
    "one_datum_cnn",
    "cnn_inplace_groups",
    "conv1d",
    "conv2d_paddings",
    "conv2d_stride_dilation",
    "conv2d_same_dilated",
    "conv3d",
    "groupnorm_cnn",
    "batchnorm_eval_cnn",
    "sequence_linear",
    "layernorm_axes",
    "embedding_padding",
    "language_model",
    "segmentation_ce",
    "segmentation_mse",
]
SHARING = pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])


@SHARING
@pytest.mark.parametrize("name", NAMES)
def test_kflr_equals_brute_force(name, weight_sharing):
    problem = ROW[name].make()
    compute(problem, KFLR(weight_sharing=weight_sharing))
    params = problem.parameters()
    for key, factors in oracle.kronecker(problem, weight_sharing).items():
        assert len(params[key].kflr) == len(factors), key
        for axis, (actual, expected) in enumerate(zip(params[key].kflr, factors)):
            assert_close(actual, expected, label=f"{key}, factor {axis}")


@SHARING
def test_exact_for_one_datum_without_weight_sharing(weight_sharing):
    problem = ROW["one_datum"].make()
    compute(problem, KFLR(weight_sharing=weight_sharing))
    for key, p in problem.parameters().items():
        product = torch.kron(*p.kflr) if len(p.kflr) == 2 else p.kflr[0]
        assert_close(product, oracle.ggn(problem)[key].sum(0), label=key)


@SHARING
@pytest.mark.parametrize(
    "name", ["mlp_sigmoid", "mlp_mse", "mlp_bce", "cnn_inplace_groups", "segmentation_ce"]
)
def test_kfac_is_unbiased(name, weight_sharing):
    """A has no noise; the mean of B over draws of the labels is the exact B."""
    generator = torch.Generator().manual_seed(0)
    problem = ROW[name].make()
    exact = oracle.kronecker(problem, weight_sharing)
    params = problem.parameters()
    runs = {key: [] for key in exact}
    for _ in range(RUNS):
        compute(problem, KFAC(mc_samples=8, weight_sharing=weight_sharing), generator=generator)
        for key in exact:
            runs[key].append(params[key].kfac)
    for key, run in runs.items():
        assert_unbiased(torch.stack([factors[0] for factors in run]), exact[key][0], key)
        for factors in run[:2]:
            assert_close(factors[1], exact[key][1], label=key) if len(factors) == 2 else None


@pytest.mark.parametrize("name", NAMES)
def test_factors_are_symmetric_and_positive_semidefinite(name):
    problem = ROW[name].make()
    compute(problem, KFLR())
    for key, p in problem.parameters().items():
        for factor in p.kflr:
            if factor.ndim == 1:
                assert (factor >= 0).all(), key
                continue
            assert_close(factor, factor.mT, label=key)
            assert torch.linalg.eigvalsh(factor).min() >= -1e-12 * factor.abs().max(), key


@SHARING
def test_what_a_weight_and_its_bias_share_is_computed_once(weight_sharing, monkeypatch):
    """Two layers in turn, on rows and on sequences: a product for every factor but the biases', which are copies."""
    products = []
    counted = lambda *args: products.append(args[1]) or kronecker_factor(*args)  # noqa: E731
    kronecker_factor = kronecker.kronecker_factor
    monkeypatch.setattr(kronecker, "kronecker_factor", counted)
    model = nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)
    )
    with curvature(KFAC(weight_sharing=weight_sharing)):
        F.mse_loss(model(torch.randn(5, 2, 3)), torch.zeros(5, 2)).backward()
    assert products == ["outputs", "inputs"] * 3
    for layer in (model[0], model[2], model[5]):
        (bias,), B = layer.bias.kfac, layer.weight.kfac[0]
        assert torch.equal(bias, B)
        assert bias.data_ptr() != B.data_ptr()
    assert all(latest._result is None for latest in kronecker._LATEST.values())


def test_unknown_weight_sharing_is_refused():
    with pytest.raises(ValueError, match="expand"):
        KFLR(weight_sharing="shrink")


# --- transposed convolutions -----------------------------------------------------------------------------------------


class Spread(nn.Module):
    """A transposed convolution in steps: zeros between the pixels, the patch that every output sees, their product."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        m, G = self.layer, self.layer.groups
        kernel = m.weight.shape[2:]
        K, out = kernel.numel(), m.weight.shape[1]
        write = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}[x.ndim]
        place = torch.eye(K).to(x).reshape(1, K, *kernel).repeat(x.shape[1], 1, *[1] * len(kernel))
        seen = write(
            x, place, None, m.stride, m.padding, m.output_padding, x.shape[1], m.dilation
        )  # [N, in·K, *out]
        self.inputs = seen.flatten(2).unflatten(1, (G, -1)).permute(0, 3, 1, 2)  # [N, S, G, I·K]
        rows = m.weight.unflatten(0, (G, -1)).transpose(1, 2).flatten(2)  # [G, out, I·K]
        self.products = torch.einsum("nsgi,goi->nsgo", self.inputs, rows)
        z = self.products.permute(0, 2, 3, 1).reshape(len(x), G * out, *seen.shape[2:])
        return z if m.bias is None else z + m.bias.reshape(-1, *[1] * len(kernel))


DECONVOLUTIONS = {
    "1d": (partial(nn.ConvTranspose1d, 2, 3, 2), (2, 4)),
    "1d_groups": (
        partial(nn.ConvTranspose1d, 4, 6, 2, stride=2, padding=1, output_padding=1, groups=2),
        (4, 3),
    ),
    "2d": (
        partial(nn.ConvTranspose2d, 2, 3, (2, 1), stride=(1, 2), dilation=(2, 1), bias=False),
        (2, 2, 3),
    ),
    "3d": (
        partial(nn.ConvTranspose3d, 2, 2, 2, groups=2, output_padding=1, stride=2),
        (2, 1, 2, 2),
    ),
}


def deconvolution_problem(name, N=3) -> Problem:
    torch.manual_seed(0)
    make, shape = DECONVOLUTIONS[name]
    model = nn.Sequential(nn.Tanh(), make(), nn.Tanh(), nn.Flatten()).double()
    X = torch.randn(N, *shape, dtype=torch.float64)
    with torch.no_grad():
        return Problem(model, X, LOSS["mse_sum"].target(model(X).shape), LOSS["mse_sum"])


@SHARING
@pytest.mark.parametrize("name", DECONVOLUTIONS)
def test_transposed_convolution(name, weight_sharing):
    """A from the patches that the pixels of the output see, B from these; row-major order of [out, in, *kernel]."""
    case = deconvolution_problem(name)
    compute(case, KFLR(weight_sharing=weight_sharing))
    explicit = copy.deepcopy(case)
    explicit.model[1] = spread = Spread(explicit.model[1])
    columns, output = oracle.hessian_columns(explicit), explicit.model(explicit.X)
    torch.testing.assert_close(output, case.model(case.X))
    inputs, B = spread.inputs, 0
    A = sum(oracle.outer_products(a, "mean", weight_sharing) for a in inputs) / len(inputs)
    for n, column in columns:
        seed = torch.zeros_like(output)
        seed[n] = column
        (g,) = oracle.gradient(output, [spread.products], seed)
        B = B + oracle.outer_products(g[n], "sum", weight_sharing)
    for actual, expected in zip(case.model[1].weight.kflr, (B, A), strict=True):
        assert_close(actual, expected if case.model[1].groups > 1 else expected[0])


ONE_PIXEL = {  # of the output: what is around it is cut off
    "1d": (partial(nn.ConvTranspose1d, 2, 4, 3, padding=5), (2, 9)),
    "1d_stride": (
        partial(nn.ConvTranspose1d, 2, 3, 4, stride=3, padding=5, output_padding=1),
        (2, 3),
    ),
    "2d": (partial(nn.ConvTranspose2d, 2, 3, 2, padding=2), (2, 4, 4)),
    "2d_dilation": (
        partial(nn.ConvTranspose2d, 2, 3, (2, 1), padding=(2, 0), dilation=(2, 1)),
        (2, 3, 1),
    ),
    "3d": (partial(nn.ConvTranspose3d, 2, 4, 2, padding=3), (2, 6, 6, 6)),
}


@SHARING
@pytest.mark.parametrize("extension", [KFLR, KFRA])
@pytest.mark.parametrize("name", ONE_PIXEL)
def test_transposed_convolution_is_exact_for_one_pixel_of_one_datum(
    name, extension, weight_sharing
):
    torch.manual_seed(0)
    (make, shape), outputs = ONE_PIXEL[name], torch.randn(1, 1, dtype=torch.float64)
    layer = make()
    last = type(layer)(layer.out_channels, 1, 1)
    model = nn.Sequential(layer, nn.Sigmoid(), last, nn.Flatten()).double()
    case = Problem(model, torch.rand(1, *shape, dtype=torch.float64), outputs, LOSS["mse"])
    compute(case, extension(weight_sharing=weight_sharing))
    for key, block in oracle.ggn(case).items():
        p = case.parameters()[key]
        factors, block = getattr(p, extension.savefield), block.sum(0)
        if p.ndim == 1:
            assert_close(factors[0], block, label=key)
            continue
        block = block.reshape(*p.shape, *p.shape).transpose(0, 1).transpose(p.ndim, p.ndim + 1)
        assert_close(torch.kron(*factors), block.reshape(p.numel(), p.numel()), label=key)


# --- diagonal factors ------------------------------------------------------------------------------------------------


@SHARING
def test_parameter_of_different_ops_gets_the_exact_diagonal(weight_sharing):
    """Embedding and output projection in one: one factor, the diagonal of the GGN."""
    problem = ROW["tied_embedding"].make()
    compute(problem, KFLR(weight_sharing=weight_sharing))
    (diagonal,) = problem.model.embedding.weight.kflr
    assert_close(diagonal, oracle.diag_ggn(problem)["embedding.weight"].flatten())


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("looked_up", [True, False])
def test_every_summand_of_a_loss_sees_all_uses_of_a_parameter(looked_up, first):
    """Columns of one loss reach one use only, those of another loss the other one."""
    torch.manual_seed(0)
    W = nn.Parameter(torch.randn(4, 4).double())
    x, y, z = torch.randn(3, 4).double(), torch.tensor([0, 3, 1]), torch.randn(3, 4).double()
    other = torch.randn(3, 4).double()
    with curvature(KFLR(), DiagGGNExact()):
        known = F.cross_entropy(F.linear(x, W), y)
        second = F.embedding(y, W) if looked_up else F.linear(other, W)
        distances = F.mse_loss(second, z)
        (known + distances if first else distances + known).backward()
    if looked_up:
        (diagonal,) = W.kflr
        assert_close(diagonal, W.diag_ggn_exact.flatten())
        return
    B, A = W.kflr
    assert_close(A, (x.T @ x + other.T @ other) / 6)
    p = F.linear(x, W).softmax(1).detach()
    assert_close(B, (torch.diag(p.sum(0)) - p.T @ p) / 3 + torch.eye(4).double() * 2 * 3 / 12)


@SHARING
@pytest.mark.parametrize(
    "name", ["layernorm_axes", "groupnorm_cnn", "batchnorm_eval_cnn", "rmsnorm_matmul"]
)
def test_norms_get_the_exact_diagonal(name, weight_sharing):
    problem = ROW[name].make()
    compute(problem, KFLR(weight_sharing=weight_sharing))
    exact = oracle.diag_ggn(problem)
    norms = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d, nn.RMSNorm)
    for key, module in problem.model.named_modules():
        for kind, p in module.named_parameters(recurse=False):
            if isinstance(module, norms):
                (diagonal,) = p.kflr
                assert_close(diagonal, exact[f"{key}.{kind}"].flatten())


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that was made."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [
            t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.layout is torch.strided
        ]
        self.entries = max(
            [self.entries, *(t.untyped_storage().nbytes() // t.element_size() for t in made)]
        )
        return out


@pytest.mark.parametrize("tied", [False, True], ids=["embedding", "tied"])
def test_large_vocabulary_is_never_dense(tied):
    """Neither [V, V] nor [N, V, d] for V = 5000 tokens: at most one chunk, or one sample."""
    N, T, V, D = 96, 3, 5000, 16

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(V, D), nn.Linear(D, 3)

        def forward(self, tokens):
            h = torch.tanh(self.table(tokens)).mean(1)
            return F.linear(h, self.table.weight) if tied else self.head(h)

    torch.manual_seed(0)
    model = Model()
    tokens, y = torch.randint(V, (N, T)), torch.randint(V if tied else 3, (N,))
    extensions = [
        BatchL2Grad(),
        SumGradSquared(),
        Variance(),
        DiagGGNMC(),
        KFAC(),
        KFAC(weight_sharing="reduce"),
    ]
    with Largest() as largest:
        compute(Problem(model, tokens, y, LOSS["ce"]), *extensions)
    assert largest.entries <= max(CHUNK_BYTES // 4, N * V, 2 * V * D)
    assert N * V * D > CHUNK_BYTES // 4
    assert [f.ndim for f in model.table.weight.kfac] == ([1] if tied else [1, 2])


def test_tied_embedding_with_repeated_tokens_and_padding():
    """One-hot terms and dense terms of one parameter add before they are squared."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(5, 3, padding_idx=2)

        def forward(self, tokens):
            return torch.tanh(self.table(tokens)).mean(1) @ self.table.weight.T

    torch.manual_seed(0)
    tokens = torch.tensor([[0, 0, 2], [1, 3, 1], [2, 2, 2], [4, 0, 3]])
    case = Problem(Model().double(), tokens, torch.tensor([0, 4, 2, 1]), LOSS["ce"])
    compute(
        case, BatchGrad(), BatchL2Grad(), SumGradSquared(), Variance(), DiagGGNExact(), check=True
    )
    for field in ("grad_batch", "batch_l2", "sum_grad_squared", "variance"):
        assert_fields(case, field, getattr(oracle, field)(case))
    assert_fields(case, "diag_ggn_exact", oracle.diag_ggn(case))


def test_factors_of_a_weight_and_its_bias_are_equal_and_apart():
    layer = nn.Linear(3, 4)
    with curvature(KFAC()):
        F.cross_entropy(layer(torch.randn(5, 3)), torch.tensor([0, 1, 2, 3, 0])).backward()
    (outputs, _), (bias,) = layer.weight.kfac, layer.bias.kfac
    torch.testing.assert_close(outputs, bias, rtol=0, atol=0)
    outputs.add_(1)
    torch.testing.assert_close(outputs, bias + 1)


def test_factors_changed_in_place_do_not_come_back():
    layer, x = nn.Linear(3, 2).double(), torch.randn(5, 3).double()
    with curvature(KFAC(mc_samples=1)):
        loss = nn.functional.mse_loss(layer(x), torch.zeros(5, 2).double())
        for _ in range(2):
            loss.backward(retain_graph=True)
            torch.testing.assert_close(layer.weight.kfac[1], x.T @ x / 5)
            layer.weight.kfac[1].zero_()
