"""One op at a time: a table of layers and shapes, and the laws that every quantity obeys."""

from functools import partial

import oracle
import pytest
import torch
from losses_table import LOSS
from torch import nn
from zoo import Problem, assert_close, assert_fields, compute

from lightning_curv.extensions import (
    KFLR,
    BatchDiagGGNExact,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    SqrtGGNExact,
    SumGradSquared,
    Variance,
)

IMAGE = (4, 5, 4)
OPS = {
    "linear": (partial(nn.Linear, 4, 3), (4,)),
    "linear_wide_few_positions": (partial(nn.Linear, 20, 16), (2, 20)),
    "linear_narrow_many_positions": (partial(nn.Linear, 2, 2), (3, 4, 2)),
    "conv1d": (partial(nn.Conv1d, 4, 2, 3), (4, 7)),
    "conv1d_stride_padding": (partial(nn.Conv1d, 4, 2, 3, stride=3, padding=2), (4, 6)),
    "conv1d_depthwise": (partial(nn.Conv1d, 4, 8, 2, groups=4), (4, 6)),
    "conv1d_circular": (partial(nn.Conv1d, 4, 2, 3, padding=2, padding_mode="circular"), (4, 6)),
    "conv1d_same_even": (partial(nn.Conv1d, 4, 2, 4, padding="same"), (4, 6)),
    "conv1d_same_reflect": (partial(nn.Conv1d, 4, 2, 4, padding="same", padding_mode="reflect"), (4, 6)),
    "conv2d": (partial(nn.Conv2d, 4, 2, (2, 3)), IMAGE),
    "conv2d_valid": (partial(nn.Conv2d, 4, 2, 2, padding="valid", stride=2), IMAGE),
    "conv2d_one_pixel": (partial(nn.Conv2d, 4, 3, 1, bias=False), IMAGE),
    "conv2d_whole_image": (partial(nn.Conv2d, 4, 3, (5, 4)), IMAGE),
    "conv2d_stride_leaves_rest": (partial(nn.Conv2d, 4, 2, 2, stride=(2, 3)), IMAGE),
    "conv2d_dilation": (partial(nn.Conv2d, 4, 2, (3, 2), dilation=(2, 3)), IMAGE),
    "conv2d_groups": (partial(nn.Conv2d, 4, 6, 2, groups=2, padding=1), IMAGE),
    "conv2d_depthwise": (partial(nn.Conv2d, 4, 4, 3, groups=4, padding=(1, 2)), IMAGE),
    "conv2d_same": (partial(nn.Conv2d, 4, 2, (2, 3), padding="same", dilation=(1, 2)), IMAGE),
    "conv2d_circular": (partial(nn.Conv2d, 4, 2, 3, padding=(2, 1), padding_mode="circular"), IMAGE),
    "conv2d_reflect_groups": (partial(nn.Conv2d, 4, 2, 3, padding=1, padding_mode="reflect", groups=2), IMAGE),
    "conv2d_replicate": (partial(nn.Conv2d, 4, 2, 3, padding=(0, 2), stride=2, padding_mode="replicate"), IMAGE),
    "conv3d": (partial(nn.Conv3d, 2, 4, (2, 1, 2), groups=2, stride=(1, 2, 1)), (2, 3, 3, 2)),
    "conv3d_same": (partial(nn.Conv3d, 2, 2, 2, padding="same"), (2, 2, 3, 2)),
    "conv3d_circular": (partial(nn.Conv3d, 2, 2, 2, padding=1, padding_mode="circular"), (2, 2, 2, 2)),
    "layer_norm": (partial(nn.LayerNorm, 4), (4,)),
    "layer_norm_positions": (partial(nn.LayerNorm, 4), (3, 2, 4)),
    "layer_norm_axes": (partial(nn.LayerNorm, (2, 4)), (3, 2, 4)),
    "rms_norm": (partial(nn.RMSNorm, 4), (3, 4)),
    "group_norm": (partial(nn.GroupNorm, 2, 4), IMAGE),
    "group_norm_flat": (partial(nn.GroupNorm, 2, 4), (4,)),
    "batch_norm1d_eval": (lambda: nn.BatchNorm1d(4).eval(), (4,)),
    "batch_norm1d_eval_positions": (lambda: nn.BatchNorm1d(4).eval(), (4, 3)),
    "batch_norm2d_eval": (lambda: nn.BatchNorm2d(4).eval(), IMAGE),
    "batch_norm3d_eval": (lambda: nn.BatchNorm3d(2).eval(), (2, 2, 3, 2)),
}


class Net(nn.Module):
    """An elementwise stem with parameters, so that cotangents pass through the op, then the op."""

    def __init__(self, op):
        super().__init__()
        self.gain, self.op = nn.Parameter(torch.tensor([1.3])), op

    def forward(self, x):
        return torch.tanh(self.op(torch.sin(self.gain * x))).flatten(1)


def op_problem(name, loss="mse_sum", N=3) -> Problem:
    torch.manual_seed(len(name))
    make, shape = OPS[name]
    model = Net(make()).double()
    for p in model.parameters():
        nn.init.normal_(p)
    X = torch.randn(N, *shape, dtype=torch.float64)
    with torch.no_grad():
        return Problem(model, X, LOSS[loss].target(model(X).shape), LOSS[loss])


QUANTITIES = [
    (BatchGrad, "grad_batch", oracle.grad_batch),
    (BatchL2Grad, "batch_l2", oracle.batch_l2),
    (SumGradSquared, "sum_grad_squared", oracle.sum_grad_squared),
    (Variance, "variance", oracle.variance),
    (DiagGGNExact, "diag_ggn_exact", oracle.diag_ggn),
    (BatchDiagGGNExact, "diag_ggn_exact_batch", oracle.diag_ggn_batch),
]
FIELDS = [field for _, field, _ in QUANTITIES]


@pytest.mark.parametrize("name", OPS)
def test_op_equals_brute_force(name):
    problem = op_problem(name)
    compute(problem, *[extension() for extension, _, _ in QUANTITIES], SqrtGGNExact(), check=True)
    for _, field, naive in QUANTITIES:
        assert_fields(problem, field, naive(problem))
    for key, p in problem.parameters().items():
        V = p.sqrt_ggn_exact.reshape(*p.sqrt_ggn_exact.shape[:2], -1)
        assert_close(torch.einsum("vnp,vnq->npq", V, V), oracle.ggn(problem)[key], label=key)


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", [name for name in OPS if name.startswith(("linear", "conv"))])
def test_kronecker_factors_of_op(name, weight_sharing):
    problem = op_problem(name)
    compute(problem, KFLR(weight_sharing=weight_sharing))
    for key, factors in oracle.kronecker(problem, weight_sharing).items():
        for actual, expected in zip(problem.parameters()[key].kflr, factors):
            assert_close(actual, expected, label=key)


# --- laws ------------------------------------------------------------------------------------------------------------

SOME = pytest.mark.parametrize("name", ["linear_narrow_many_positions", "conv2d_groups", "layer_norm_positions"])


def fields_of(problem, *extensions) -> dict[str, dict[str, torch.Tensor]]:
    compute(problem, *extensions)
    return {
        field: {key: getattr(p, field) for key, p in problem.parameters().items()}
        for field in [extension.savefield for extension in extensions]
    }


def half(problem, keep) -> Problem:
    return Problem(problem.model, problem.X[keep], problem.y[keep], problem.loss)


@SOME
def test_additive_over_batches(name):
    """With reduction="sum": batch ∪ batch' adds sums and concatenates per-sample quantities."""
    problem = op_problem(name, N=5)
    extensions = [SumGradSquared(), DiagGGNExact(), BatchGrad(), BatchL2Grad(), BatchDiagGGNExact()]
    whole = fields_of(problem, *extensions)
    first = fields_of(half(problem, slice(0, 2)), *extensions)
    second = fields_of(half(problem, slice(2, 5)), *extensions)
    for key in problem.parameters():
        for field in ("sum_grad_squared", "diag_ggn_exact"):
            assert_close(first[field][key] + second[field][key], whole[field][key], label=field)
        for field in ("grad_batch", "batch_l2", "diag_ggn_exact_batch"):
            assert_close(torch.cat([first[field][key], second[field][key]]), whole[field][key], label=field)


@SOME
@pytest.mark.parametrize("size", [1, 1000], ids=["one_sample", "uneven"])
def test_invariant_to_chunking(name, size, monkeypatch):
    extensions = [extension() for extension, _, _ in QUANTITIES]
    plain = fields_of(op_problem(name, N=5), *extensions)
    monkeypatch.setattr("lightning_curv.jacobian.CHUNK_BYTES", size)
    chunked = fields_of(op_problem(name, N=5), *extensions)
    for field in FIELDS:
        for key, value in plain[field].items():
            assert_close(chunked[field][key], value, label=f"{key}.{field}")


@SOME
def test_scales_with_reduction(name):
    """From "sum" to "mean" the loss shrinks by N·D; gradients and curvature by as much, squares by its square."""
    total, mean = op_problem(name, "mse_sum"), op_problem(name, "mse")
    factor = total.model(total.X).numel()
    extensions = [extension() for extension, _, _ in QUANTITIES]
    a, b = fields_of(total, *extensions), fields_of(mean, *extensions)
    power = {"batch_l2": 2, "sum_grad_squared": 2, "variance": 2}
    for field in FIELDS:
        for key in total.parameters():
            assert_close(b[field][key] * factor ** power.get(field, 1), a[field][key], label=field)


@SOME
def test_follows_a_permutation_of_the_samples(name):
    problem = op_problem(name, N=4)
    order = torch.tensor([2, 0, 3, 1])
    extensions = [BatchGrad(), BatchL2Grad(), BatchDiagGGNExact(), Variance(), DiagGGNExact()]
    plain, permuted = fields_of(problem, *extensions), fields_of(half(problem, order), *extensions)
    for key in problem.parameters():
        for field in ("grad_batch", "batch_l2", "diag_ggn_exact_batch"):
            assert_close(permuted[field][key], plain[field][key][order], label=field)
        for field in ("variance", "diag_ggn_exact"):
            assert_close(permuted[field][key], plain[field][key], label=field)


@pytest.mark.parametrize("name", ["embedding", "embedding_bag_of_positions"])
def test_embedding(name):
    """Tokens repeat within a sample and across samples; one row of the table is never looked up."""

    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(5, 3, padding_idx=2)

        def forward(self, tokens):
            h = torch.tanh(self.table(tokens))
            return h.flatten(1) if name == "embedding" else h.sum((1, 2))

    tokens = torch.tensor([[[0, 0], [1, 2]], [[3, 1], [1, 1]], [[2, 2], [0, 3]], [[3, 3], [3, 3]]])
    torch.manual_seed(0)
    model = Bag().double()
    problem = Problem(model, tokens, LOSS["mse_sum"].target(model(tokens).shape), LOSS["mse_sum"])
    compute(problem, *[extension() for extension, _, _ in QUANTITIES], check=True)
    for _, field, naive in QUANTITIES:
        assert_fields(problem, field, naive(problem))
    assert problem.model.table.weight.grad_batch[:, 4].count_nonzero() == 0


def test_integer_dtypes_of_tokens():
    for dtype in (torch.int32, torch.int64):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 3)).double()
        tokens = torch.tensor([[0, 1], [1, 1], [4, 2], [0, 0]], dtype=dtype)
        problem = Problem(model, tokens, torch.tensor([0, 1, 2, 0]), LOSS["ce"])
        compute(problem, BatchL2Grad())
        assert_fields(problem, "batch_l2", oracle.batch_l2(problem))
