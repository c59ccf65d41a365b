"""One op at a time: a table of layers and shapes, and the laws that every quantity obeys."""

import contextlib
import copy
import warnings
from functools import partial

import oracle
import pytest
import torch
from losses_table import LOSS
from torch import nn
from torch.nn import functional as F
from zoo import QUANTITIES, Problem, assert_close, assert_fields, compute

from lightning_curv import curvature
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
from lightning_curv.rules import Rule, registry
from lightning_curv.rules.fallback import FallbackWarning

IMAGE = (4, 5, 4)
LAYER = {"d_model": 4, "nhead": 2, "dim_feedforward": 3, "dropout": 0.0}


class Attention(nn.Module):
    """Attention of x to itself, or to another sequence: its keys (``"memory"``), its keys and values (``"three"``)."""

    def __init__(self, other=None, mask=None, weights=False, **options):
        super().__init__()
        self.other, self.mask, self.weights = other, mask, weights
        self.attention = nn.MultiheadAttention(4, 2, **{"batch_first": True, **options})

    def forward(self, x):  # [N, 3, 4]
        keys = values = x
        if self.other is not None:
            keys = values = x[:, :2, : self.attention.kdim].sin()
        if self.other == "three":
            values = x[:, 1:, : self.attention.vdim].cos()
        first = self.attention.batch_first
        triple = [z if first else z.transpose(0, 1) for z in (x, keys, values)]
        triple = (
            [triple[0]] * 3
            if self.other is None
            else triple
            if self.other == "three"
            else [*triple[:2], triple[1]]
        )
        masks = {
            None: {},
            "causal": {"attn_mask": torch.ones(3, 3, dtype=torch.bool).triu(1)},
            "padding": {
                "key_padding_mask": torch.tensor(
                    [[0, 0, 1], [0, 0, 0], [0, 1, 1]], dtype=torch.bool
                )
            },
        }
        out, weights = self.attention(*triple, need_weights=self.weights, **masks[self.mask])
        out = out if first else out.transpose(0, 1)
        return out + weights.sum(-1, keepdim=True) if self.weights else out


class Transformer(nn.Module):
    """A layer or stack of nn.Transformer*, with a memory where it takes one."""

    def __init__(self, inner, memory=True, batch_first=True):
        super().__init__()
        self.inner, self.memory, self.batch_first = inner, memory, batch_first

    def forward(self, x):  # [N, 3, 4]
        x = x if self.batch_first else x.transpose(0, 1)
        out = (
            self.inner(x, x[:2].sin() if not self.batch_first else x[:, :2].sin())
            if self.memory
            else self.inner(x)
        )
        return (out if self.batch_first else out.transpose(0, 1)).mean(1)


class Pair(nn.Module):
    """A bilinear map of two parts of the input."""

    def __init__(self, **options):
        super().__init__()
        self.bilinear = nn.Bilinear(3, 2, 4, **options)

    def forward(self, x):
        return self.bilinear(x[..., :3], x[..., 2:])


class Expression(nn.Module):
    """A function of the input and one parameter."""

    def __init__(self, function, *shape):
        super().__init__()
        self.function, self.W = function, nn.Parameter(torch.zeros(shape))

    def forward(self, x):
        return self.function(x, self.W)


def read_places(x, W, **options):
    """What a table holds at the places `x [N, P, 2]`, all of which are places of one image."""
    return F.grid_sample(W, x[None], **options)[0].permute(1, 2, 0)


OPS = {
    "linear": (partial(nn.Linear, 4, 3), (4,)),
    "linear_wide_few_positions": (partial(nn.Linear, 20, 16), (2, 20)),
    "linear_narrow_many_positions": (partial(nn.Linear, 2, 2), (3, 4, 2)),
    "conv1d": (partial(nn.Conv1d, 4, 2, 3), (4, 7)),
    "conv1d_stride_padding": (partial(nn.Conv1d, 4, 2, 3, stride=3, padding=2), (4, 6)),
    "conv1d_depthwise": (partial(nn.Conv1d, 4, 8, 2, groups=4), (4, 6)),
    "conv1d_circular": (partial(nn.Conv1d, 4, 2, 3, padding=2, padding_mode="circular"), (4, 6)),
    "conv1d_same_even": (partial(nn.Conv1d, 4, 2, 4, padding="same"), (4, 6)),
    "conv1d_same_reflect": (
        partial(nn.Conv1d, 4, 2, 4, padding="same", padding_mode="reflect"),
        (4, 6),
    ),
    "conv2d": (partial(nn.Conv2d, 4, 2, (2, 3)), IMAGE),
    "conv2d_valid": (partial(nn.Conv2d, 4, 2, 2, padding="valid", stride=2), IMAGE),
    "conv2d_one_pixel": (partial(nn.Conv2d, 4, 3, 1, bias=False), IMAGE),
    "conv2d_whole_image": (partial(nn.Conv2d, 4, 3, (5, 4)), IMAGE),
    "conv2d_stride_leaves_rest": (partial(nn.Conv2d, 4, 2, 2, stride=(2, 3)), IMAGE),
    "conv2d_dilation": (partial(nn.Conv2d, 4, 2, (3, 2), dilation=(2, 3)), IMAGE),
    "conv2d_groups": (partial(nn.Conv2d, 4, 6, 2, groups=2, padding=1), IMAGE),
    "conv2d_depthwise": (partial(nn.Conv2d, 4, 4, 3, groups=4, padding=(1, 2)), IMAGE),
    "conv2d_same": (partial(nn.Conv2d, 4, 2, (2, 3), padding="same", dilation=(1, 2)), IMAGE),
    "conv2d_circular": (
        partial(nn.Conv2d, 4, 2, 3, padding=(2, 1), padding_mode="circular"),
        IMAGE,
    ),
    "conv2d_reflect_groups": (
        partial(nn.Conv2d, 4, 2, 3, padding=1, padding_mode="reflect", groups=2),
        IMAGE,
    ),
    "conv2d_replicate": (
        partial(nn.Conv2d, 4, 2, 3, padding=(0, 2), stride=2, padding_mode="replicate"),
        IMAGE,
    ),
    "conv3d": (partial(nn.Conv3d, 2, 4, (2, 1, 2), groups=2, stride=(1, 2, 1)), (2, 3, 3, 2)),
    "conv3d_same": (partial(nn.Conv3d, 2, 2, 2, padding="same"), (2, 2, 3, 2)),
    "conv3d_circular": (
        partial(nn.Conv3d, 2, 2, 2, padding=1, padding_mode="circular"),
        (2, 2, 2, 2),
    ),
    "deconv1d": (partial(nn.ConvTranspose1d, 4, 2, 3), (4, 5)),
    "deconv1d_all_options": (
        partial(
            nn.ConvTranspose1d, 4, 6, 3, stride=3, padding=2, output_padding=1, groups=2, dilation=2
        ),
        (4, 3),
    ),
    "deconv1d_output_padding_beyond_stride": (
        partial(nn.ConvTranspose1d, 4, 2, 2, dilation=3, output_padding=2),
        (4, 3),
    ),
    "deconv1d_depthwise": (partial(nn.ConvTranspose1d, 4, 4, 2, groups=4, bias=False), (4, 5)),
    "deconv2d": (
        partial(nn.ConvTranspose2d, 4, 2, (2, 3), stride=(2, 1), padding=(1, 0)),
        (4, 3, 2),
    ),
    "deconv2d_groups": (
        partial(nn.ConvTranspose2d, 4, 2, 2, stride=2, output_padding=1, groups=2),
        (4, 2, 3),
    ),
    "deconv2d_crops_all": (partial(nn.ConvTranspose2d, 4, 2, 3, padding=2), (4, 4, 3)),
    "deconv3d": (
        partial(nn.ConvTranspose3d, 2, 4, (2, 1, 2), stride=(1, 2, 1), groups=2),
        (2, 2, 1, 2),
    ),
    "prelu": (nn.PReLU, (3, 4)),
    "prelu_flat": (partial(nn.PReLU, 4), (4,)),
    "prelu_channels": (partial(nn.PReLU, 4), IMAGE),
    "bilinear": (Pair, (4,)),
    "bilinear_positions": (partial(Pair, bias=False), (3, 2, 4)),
    "instance_norm": (partial(nn.InstanceNorm2d, 4, affine=True), IMAGE),
    "instance_norm_eval": (
        lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True).eval(),
        (4, 5),
    ),
    "attention": (Attention, (3, 4)),
    "attention_sequence_first": (partial(Attention, batch_first=False, bias=False), (3, 4)),
    "attention_weights": (partial(Attention, weights=True, mask="padding"), (3, 4)),
    "attention_causal": (partial(Attention, mask="causal"), (3, 4)),
    "attention_extra_keys": (partial(Attention, add_bias_kv=True, add_zero_attn=True), (3, 4)),
    "attention_to_memory": (partial(Attention, "memory"), (3, 4)),
    "attention_to_memory_sequence_first": (
        partial(Attention, "memory", batch_first=False, add_bias_kv=True),
        (3, 4),
    ),
    "attention_of_three": (partial(Attention, "three"), (3, 4)),
    "attention_of_three_widths": (
        partial(Attention, "three", kdim=3, vdim=2, batch_first=False),
        (3, 4),
    ),
    "encoder_layer": (
        lambda: Transformer(nn.TransformerEncoderLayer(**LAYER, batch_first=True), memory=False),
        (3, 4),
    ),
    "encoder_layer_eval": (
        lambda: Transformer(
            nn.TransformerEncoderLayer(**LAYER, batch_first=True).eval(), memory=False
        ),
        (3, 4),
    ),
    "encoder_sequence_first": (
        lambda: Transformer(
            nn.TransformerEncoder(
                nn.TransformerEncoderLayer(**LAYER, norm_first=True), 2, enable_nested_tensor=False
            ),
            memory=False,
            batch_first=False,
        ),
        (3, 4),
    ),
    "decoder_layer": (
        lambda: Transformer(nn.TransformerDecoderLayer(**LAYER, batch_first=True)),
        (3, 4),
    ),
    "decoder_norm_first": (
        lambda: Transformer(
            nn.TransformerDecoder(nn.TransformerDecoderLayer(**LAYER, norm_first=True), 1),
            batch_first=False,
        ),
        (3, 4),
    ),
    "transformer": (
        lambda: Transformer(
            nn.Transformer(
                4, 2, 1, 1, dim_feedforward=3, dropout=0.0, activation="gelu", batch_first=True
            )
        ),
        (3, 4),
    ),
    "product_with_vector": (lambda: Expression(lambda x, W: (x @ W)[:, None], 4), (3, 4)),
    "einsum": (lambda: Expression(lambda x, W: torch.einsum("ntd,dk->nkt", x, W), 4, 2), (3, 4)),
    "einsum_heads": (
        lambda: Expression(lambda x, W: torch.einsum("thk, nth", W, x).T, 3, 4, 2),
        (3, 4),
    ),
    "einsum_groups": (
        lambda: Expression(lambda x, W: torch.einsum("ntd,tdk->ntk", x, W), 3, 4, 2),
        (3, 4),
    ),
    "einsum_diagonal": (
        lambda: Expression(lambda x, W: torch.einsum("ntd,td->nd", x, W), 3, 4),
        (3, 4),
    ),
    "einsum_sum_of_parameter": (
        lambda: Expression(lambda x, W: torch.einsum("ntd,dk->nt", x, W), 4, 2),
        (3, 4),
    ),
    "einsum_of_three": (
        lambda: Expression(lambda x, W: torch.einsum("ntd,dk,ntd->nk", x, W, x), 4, 2),
        (3, 4),
    ),
    "bmm_experts": (
        lambda: Expression(lambda x, W: torch.bmm(x.transpose(0, 1), W).transpose(0, 1), 3, 4, 2),
        (3, 4),
    ),
    "bmm_from_the_left": (
        lambda: Expression(lambda x, W: W.bmm(x.permute(1, 2, 0)).permute(2, 0, 1), 3, 2, 4),
        (3, 4),
    ),
    "matmul_experts": (
        lambda: Expression(lambda x, W: (x.transpose(0, 1) @ W).transpose(0, 1), 3, 4, 2),
        (3, 4),
    ),
    "baddbmm": (lambda: Expression(lambda x, W: torch.baddbmm(W, x, x.mT), 3, 3), (3, 4)),
    "baddbmm_members": (
        lambda: Expression(
            lambda x, W: torch.baddbmm(
                x.transpose(0, 1)[..., :2], x.transpose(0, 1), W, beta=2, alpha=0.5
            ).transpose(0, 1),
            3,
            4,
            2,
        ),
        (3, 4),
    ),
    "baddbmm_from_the_left": (
        lambda: Expression(
            lambda x, W: torch.baddbmm(W[:, :, :1], W, x.permute(1, 2, 0), alpha=2).permute(
                2, 0, 1
            ),
            3,
            2,
            4,
        ),
        (3, 4),
    ),
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
    **{
        f"grid_sample_{name}": (
            partial(Expression, partial(read_places, **options), 1, 2, 3, 4),
            (5, 2),
        )
        for name, options in {
            "bilinear": {"align_corners": False},
            "nearest_border": {"mode": "nearest", "padding_mode": "border", "align_corners": False},
            "bicubic_reflection": {
                "mode": "bicubic",
                "padding_mode": "reflection",
                "align_corners": True,
            },
        }.items()
    },
    "grid_sample_steps_first": (
        lambda: Expression(
            lambda x, W: F.grid_sample(W, x.transpose(0, 1)[None], align_corners=False)[0].permute(
                2, 1, 0
            ),
            1,
            2,
            3,
            4,
        ),
        (5, 2),
    ),
    "grid_sample_volume": (
        lambda: Expression(
            lambda x, W: F.grid_sample(W, x[None, :, :, None], align_corners=False)[0].transpose(
                0, 1
            ),
            1,
            2,
            3,
            2,
            2,
        ),
        (4, 3),
    ),
    "grid_sample_image_per_sample": (
        lambda: Expression(
            lambda x, W: F.grid_sample(W.expand(len(x), -1, -1, -1), x, align_corners=False),
            1,
            2,
            3,
            4,
        ),
        (2, 3, 2),
    ),
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


STACKED = (
    "bmm_experts",
    "bmm_from_the_left",
    "matmul_experts",
    "baddbmm_members",
    "baddbmm_from_the_left",
)


@pytest.mark.parametrize("name", STACKED)
def test_a_batch_of_one_sample_has_it_where_the_rule_has_samples(name):
    problem = op_problem(name, N=1)
    compute(problem, *[extension() for extension, _, _ in QUANTITIES])
    for _, field, naive in QUANTITIES:
        assert_fields(problem, field, naive(problem))


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

SOME = pytest.mark.parametrize(
    "name", ["linear_narrow_many_positions", "conv2d_groups", "layer_norm_positions"]
)


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
            assert_close(
                torch.cat([first[field][key], second[field][key]]), whole[field][key], label=field
            )


@SOME
@pytest.mark.parametrize("size", [1, 1000], ids=["one_sample", "uneven"])
def test_invariant_to_chunking(name, size, monkeypatch):
    extensions = [extension() for extension, _, _ in QUANTITIES]
    plain = fields_of(op_problem(name, N=5), *extensions)
    monkeypatch.setattr("lightning_curv.terms.jacobian.CHUNK_BYTES", size)
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


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_a_position_table_is_interpolated_for_images_of_different_sizes(mode):
    """Patches of all images are rows of one image for `grid_sample`, as in GLM-4V."""
    torch.manual_seed(0)
    sizes = [(2, 3), (1, 2), (3, 3)]
    table = nn.Parameter(torch.randn(4 * 4, 5).double())
    embed, head = nn.Linear(3, 5).double(), nn.Linear(5, 4).double()
    patches = [torch.randn(h * w, 3).double() for h, w in sizes]
    places = [
        torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).double() * 2
        - 1
        for h, w in sizes
    ]
    y = torch.tensor([2, 0, 1])

    def logits(chosen):
        image = torch.repeat_interleave(
            torch.arange(len(chosen)), torch.tensor([len(patches[n]) for n in chosen])
        )
        grid = torch.cat([places[n] for n in chosen])[None, :, None]
        positions = F.grid_sample(
            table.view(4, 4, 5).permute(2, 0, 1)[None], grid, mode, "border", align_corners=False
        )
        rows = embed(torch.cat([patches[n] for n in chosen])) + positions[0, :, :, 0].T
        return head(torch.zeros(len(chosen), 5).double().index_add(0, image, rows.tanh()))

    with curvature(BatchGrad(), Variance(), DiagGGNExact(), check=True):
        F.cross_entropy(logits([0, 1, 2]), y).backward()
    alone = torch.stack(
        [
            torch.autograd.grad(F.cross_entropy(logits([n]), y[n : n + 1]) / 3, table)[0]
            for n in range(3)
        ]
    )
    assert_close(table.grad_batch, alone)
    assert_close(table.variance, alone.var(0, unbiased=False))
    z = logits([0, 1, 2])
    hessians = torch.func.vmap(torch.func.hessian(F.cross_entropy))(z.detach(), y) / 3
    rows = [
        torch.stack([torch.autograd.grad(z[n, c], table, retain_graph=True)[0] for c in range(4)])
        for n in range(3)
    ]
    diagonal = sum(torch.einsum("cip,cd,dip->ip", J, H, J) for J, H in zip(rows, hessians))
    assert_close(table.diag_ggn_exact, diagonal)


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


BAGS = {
    "mean": {},
    "sum": {"mode": "sum", "padding_idx": -3},
    "max": {"mode": "max"},
    "max_padding": {"mode": "max", "padding_idx": 1},
    "mean_padding": {"padding_idx": 1},
    "max_norm": {"mode": "sum", "max_norm": 1.0},
}


def table_problem(model, tokens) -> Problem:
    model = model.double()
    nn.init.normal_(model[0].weight)
    with torch.no_grad():
        return Problem(model, tokens, LOSS["mse_sum"].target(model(tokens).shape), LOSS["mse_sum"])


def assert_all_right(problem):
    compute(problem, *[extension() for extension, _, _ in QUANTITIES], check=True)
    for _, field, naive in QUANTITIES:
        assert_fields(problem, field, naive(problem))


@pytest.mark.parametrize("name", BAGS)
def test_embedding_bag(name):
    """Tokens repeat; one bag has nothing but the padding index."""
    tokens = torch.tensor([[0, 1, 0], [1, 1, 1], [3, 2, 2], [3, 3, 0]])
    torch.manual_seed(0)
    assert_all_right(
        table_problem(nn.Sequential(nn.EmbeddingBag(4, 3, **BAGS[name]), nn.Tanh()), tokens)
    )


@pytest.mark.parametrize("last", [False, True], ids=["starts", "with_end"])
@pytest.mark.parametrize("mode", ["sum", "mean", "max", "weighted"])
def test_embedding_bag_with_offsets(mode, last):
    """Bags of different length, one of them empty; the weights of the tokens may be computed."""

    class Bags(nn.EmbeddingBag):
        def forward(self, x):  # [4, 2]: only the number of bags matters
            offsets = torch.tensor([0, 2, 2, 5] + [7] * last)
            weights = torch.linspace(-1, 2, 7, dtype=x.dtype) if mode == "weighted" else None
            return super().forward(torch.tensor([0, 1, 0, 3, 3, 2, 1]), offsets, weights)

    torch.manual_seed(0)
    model = Bags(4, 3, mode=mode.replace("weighted", "sum"), include_last_offset=last)
    assert_all_right(
        table_problem(nn.Sequential(model, nn.Tanh()), torch.zeros(4, 2, dtype=torch.float64))
    )


@pytest.mark.parametrize("make", [nn.Embedding, partial(nn.EmbeddingBag, mode="sum")])
def test_sparse_gradients(make):
    tokens = torch.tensor([[0, 1], [1, 1], [3, 2], [0, 3]])
    torch.manual_seed(0)
    problem = table_problem(nn.Sequential(make(4, 3, sparse=True), nn.Flatten(), nn.Tanh()), tokens)
    compute(problem, *[extension() for extension, _, _ in QUANTITIES], check=True)
    dense = Problem(copy.deepcopy(problem.model), tokens, problem.y, problem.loss)
    dense.model[0].sparse = False
    problem.model[0].weight.grad = problem.model[0].weight.grad.to_dense()
    for _, field, naive in QUANTITIES:
        assert_fields(problem, field, naive(dense))


@pytest.mark.parametrize("make", [nn.Embedding, nn.EmbeddingBag])
def test_frequencies_of_the_batch_are_refused(make):
    tokens = torch.tensor([[0, 1], [1, 1]])
    problem = table_problem(
        nn.Sequential(make(4, 3, scale_grad_by_freq=True), nn.Flatten()), tokens
    )
    with pytest.raises(NotImplementedError, match="scale_grad_by_freq"):
        compute(problem, BatchGrad())


def test_embedding_with_max_norm():
    tokens = torch.tensor([[0, 1], [1, 1], [3, 2], [0, 3]])
    torch.manual_seed(0)
    assert_all_right(
        table_problem(
            nn.Sequential(nn.Embedding(4, 3, max_norm=0.7), nn.Flatten(), nn.Tanh()), tokens
        )
    )


def test_numbered_parameters_of_a_rule():
    """`parameters` may name single arguments, and with one name all numbered ones."""
    assert [Rule(dict, parameters=("w1", "params")).holds(k) for k in ("w1", "w2", "params0", "params")] == [
        True, False, True, True,
    ]  # fmt: skip


def test_fields_of_rules_have_their_names_of_version_0_1_too(monkeypatch):
    monkeypatch.setattr(registry, "RULES", {})
    values = {
        "slots": ("w",),
        "reads": lambda arguments: (),
        "expands": True,
        "couples": lambda arguments: True,
        "accepts": lambda name, tensor, out: True,
        "bulky": True,
    }
    for old, value in values.items():
        new = registry.RENAMED[old]
        with pytest.warns(DeprecationWarning, match=f"`{old}` of a rule is called `{new}`"):
            registry.rule(torch.addcmul, **{old: value})(dict)
        assert registry.RULES[torch.addcmul] == Rule(dict, **{new: value})


SLOW = {"einsum_sum_of_parameter", "einsum_of_three"}


@pytest.mark.parametrize("name", OPS)
def test_only_ops_without_a_rule_warn(name):
    problem = op_problem(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with curvature(BatchGrad()):
            problem.compute_loss().backward()
    slow = any(issubclass(w.category, FallbackWarning) for w in caught)
    assert slow == (name in SLOW)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "name", [name for name in OPS if name.startswith(("attention", "encoder", "decoder", "trans"))]
)
def test_attention_is_bit_identical(name, dtype):
    """Recording looks inside `F.multi_head_attention_forward` and takes no other path through it."""
    problem = op_problem(name)
    model, X = problem.model.to(dtype), problem.X.to(dtype)

    def run(*extensions):
        model.zero_grad()
        with curvature(*extensions) if extensions else contextlib.nullcontext():
            output = model(X)
            nn.functional.mse_loss(output, torch.zeros_like(output)).backward()
        return [output.detach(), *(p.grad.clone() for p in model.parameters())]

    assert all(map(torch.equal, run(), run(BatchGrad(), DiagGGNExact())))


def test_integer_dtypes_of_tokens():
    for dtype in (torch.int32, torch.int64):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 3)).double()
        tokens = torch.tensor([[0, 1], [1, 1], [4, 2], [0, 0]], dtype=dtype)
        problem = Problem(model, tokens, torch.tensor([0, 1, 2, 0]), LOSS["ce"])
        compute(problem, BatchL2Grad())
        assert_fields(problem, "batch_l2", oracle.batch_l2(problem))
