"""Second derivatives through fused ops that have none in torch, against the ops written out."""

import itertools

import hessian_oracle
import pytest
import torch
from losses_table import LOSS
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from zoo import ROW, Problem, assert_close, compute, raw

from lightning_curv import curvature
from lightning_curv.differentiation.formulas import FORMULAS
from lightning_curv.differentiation.twice import differentiable, fused
from lightning_curv.errors import once_differentiable as refusal
from lightning_curv.extensions import GGNMP, HMP, PCHMP, DiagHessian
from lightning_curv.extensions.spectrum import HessianTraceMC, MaxEigenvalue
from lightning_curv.second_derivatives import local_curvature

N, H, T, S, E = 2, 4, 3, 5, 2


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def some(*shape):
    """A mask in which the second query sees no key."""
    mask = randn(*shape, seed=3) > -0.5
    mask[..., 1, :] = False
    return mask


MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "bool": {"attn_mask": some(T, S)},
    "bool_of_samples": {"attn_mask": randn(N, 1, 1, S, seed=3) > -0.5},
    "float": {"attn_mask": randn(T, S, seed=4)},
    "float_of_heads": {"attn_mask": randn(1, H, T, S, seed=4)},
    "float_of_samples": {"attn_mask": randn(N, 1, T, S, seed=4), "scale": 2.0},
    "minus_infinity": {
        "attn_mask": torch.zeros(T, S).double().masked_fill(~some(T, S), -torch.inf)
    },
    "grouped": {"enable_gqa": True},
    "grouped_causal": {"enable_gqa": True, "is_causal": True},
}


def shares_heads():
    """Whether this version of torch has a fused kernel on CPUs for heads that queries share; 2.6 has none."""
    q, k = randn(1, 2, 3, 2), randn(1, 1, 3, 2)
    try:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            F.scaled_dot_product_attention(q, k, k, enable_gqa=True)
    except RuntimeError:
        return False
    return True


FUSED = [name for name in MASKS if "grouped" not in name or shares_heads()]


class Attending(nn.Module):
    """Queries of the first T positions, keys and values of all S; two heads of these where they are shared."""

    def __init__(self, **options):
        super().__init__()
        self.options = options
        heads = 2 if options.get("enable_gqa") else H
        self.q, self.k, self.v = (
            nn.Linear(3, H * E),
            nn.Linear(3, heads * E),
            nn.Linear(3, heads * E, bias=False),
        )
        self.head = nn.Linear(H * E, 3)

    def forward(self, x):
        q, k, v = (
            layer(x).unflatten(-1, (-1, E)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q[:, :, :T].contiguous(), k, v, **self.options)
        return self.head(mixed.transpose(1, 2).flatten(2).tanh().mean(1))


def attending(mask):
    torch.manual_seed(0)
    return Problem(
        Attending(**MASKS[mask]).double(), randn(N, S, 3), torch.tensor([2, 0]), LOSS["ce"]
    )


def hessian(problem):
    with sdpa_kernel(SDPBackend.MATH):
        return hessian_oracle.hessian(problem)


def assert_products(problem, field, blocks):
    for name, p in problem.parameters().items():
        block = blocks[name].sum(0)
        units = torch.eye(p.numel()).to(p).reshape(-1, *p.shape)
        assert_close(getattr(p, field)(units).flatten(1), block, label=name, rounding=1e-12)


@pytest.mark.parametrize("mask", FUSED)
def test_attention_is_differentiated_twice(mask):
    problem, reference = attending(mask), attending(mask)
    nodes = fused([problem.compute_loss()])
    assert [node.name() for node in nodes] == ["ScaledDotProductFlashAttentionForCpuBackward0"]
    blocks = hessian(reference)
    compute(problem, HMP(), DiagHessian())
    assert_products(problem, "hmp", blocks)
    for name, p in problem.parameters().items():
        assert_close(p.diag_h.flatten(), blocks[name].sum(0).diagonal(), label=name, rounding=1e-12)


@pytest.mark.parametrize("mask", FUSED)
def test_quantities_are_those_of_the_math_kernel(mask):
    """Products with the GGN, traces and eigenvalues of all parameters."""
    found = []
    for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        problem, generator = attending(mask), torch.Generator().manual_seed(0)
        with sdpa_kernel(kernel):
            extensions = [GGNMP(), HessianTraceMC(3), MaxEigenvalue(), MaxEigenvalue("ggn")]
            compute(problem, *extensions, generator=generator)
        found.append(problem.parameters())
    for name, p in found[0].items():
        q = found[1][name]
        assert_close(
            p.ggnmp(torch.ones_like(p)), q.ggnmp(torch.ones_like(q)), label=name, rounding=1e-12
        )
        for field in ("hessian_trace_mc", "hessian_max_eigenvalue", "ggn_max_eigenvalue"):
            assert_close(getattr(p, field), getattr(q, field), label=field, rounding=1e-12)


@pytest.mark.parametrize("mask", ["causal", "bool", "grouped"])
def test_residual_of_attention_is_that_of_its_matrix(mask, monkeypatch):
    """With residuals as they are, the positive-curvature Hessian is the Hessian; else it is larger."""
    reference, problem = attending(mask), attending(mask)
    compute(reference, PCHMP(), HMP())
    for p in reference.parameters().values():
        units = torch.eye(p.numel()).to(p).reshape(-1, *p.shape)
        larger = p.pchmp(units).flatten(1) - p.hmp(units).flatten(1)
        assert torch.linalg.eigvalsh(larger).min() > -1e-10
    for kind in (local_curvature.DiagonalResidual, local_curvature.EigenResidual):
        monkeypatch.setattr(kind, "positive", lambda self, modify: self)
    compute(problem, PCHMP())
    assert_products(problem, "pchmp", hessian(attending(mask)))


@pytest.mark.parametrize(
    "name", ["vit", "transformer_encoder", "transformer_decoder", "cross_attention"]
)
def test_users_passes_are_bit_identical(name):
    plain, watched = ROW[name].make(), ROW[name].make()
    loss = plain.compute_loss()
    loss.backward()
    with curvature(HMP(), GGNMP(), PCHMP(), DiagHessian(), HessianTraceMC(), MaxEigenvalue()):
        again = watched.compute_loss()
        again.backward(retain_graph=True)
    assert torch.equal(loss, again)
    for p, q in zip(plain.parameters().values(), watched.parameters().values()):
        assert torch.equal(p.grad, q.grad)
        assert q.hmp(torch.ones_like(q)).isfinite().all()
    later = torch.autograd.grad(again, list(watched.parameters().values()), create_graph=True)
    for p, g in zip(plain.parameters().values(), later):
        assert torch.equal(p.grad, g)


def test_attention_that_is_computed_again():
    plain, again = attending("bool"), attending("bool")
    again.model = CheckpointedAttending(again.model)
    for problem in (plain, again):
        compute(
            problem,
            HMP(),
            GGNMP(),
            DiagHessian(),
            MaxEigenvalue(),
            generator=torch.Generator().manual_seed(0),
        )
    for p, q in zip(plain.parameters().values(), again.parameters().values()):
        assert torch.equal(p.grad, q.grad)
        for found, expected in [
            (q.hmp(torch.ones_like(q)), p.hmp(torch.ones_like(p))),
            (q.diag_h, p.diag_h),
        ]:
            assert_close(found, expected, rounding=1e-12)
        assert_close(q.ggnmp(torch.ones_like(q)), p.ggnmp(torch.ones_like(p)), rounding=1e-12)
        assert_close(q.hessian_max_eigenvalue, p.hessian_max_eigenvalue)


class CheckpointedAttending(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


class Latents(nn.Module):
    """Learned queries, and a learned mask: the op is one with parameters."""

    def __init__(self, biased):
        super().__init__()
        self.bias = raw(2, 3, 5) if biased else None
        self.q, self.kv, self.head = raw(1, 2, 3, 2), nn.Linear(4, 8), nn.Linear(4, 3)

    def forward(self, x):
        k, v = self.kv(x).unflatten(-1, (4, 2)).transpose(1, 2).chunk(2, 1)
        mixed = F.scaled_dot_product_attention(self.q.expand(len(x), -1, -1, -1), k, v, self.bias)
        return self.head(mixed.transpose(1, 2).flatten(2).tanh().mean(1))


@pytest.mark.parametrize("biased", [False, True])
def test_learned_queries_and_masks(biased):
    torch.manual_seed(0)
    problem = Problem(Latents(biased).double(), randn(3, 5, 4), torch.tensor([0, 1, 2]), LOSS["ce"])
    blocks = hessian(problem)
    compute(problem, HMP(), DiagHessian())
    assert_products(problem, "hmp", blocks)
    for name, p in problem.parameters().items():
        assert_close(p.diag_h.flatten(), blocks[name].sum(0).diagonal(), label=name, rounding=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types_of_numbers(dtype):
    """Gradients and products are those of float64, up to the rounding of the type."""
    q, k, v, u = (randn(2, 3, 4, 5, seed=seed).to(dtype).double() for seed in range(4))
    results = []
    for kind in (torch.float64, dtype):
        inputs = [x.to(kind).requires_grad_() for x in (q, k, v)]
        loss = F.scaled_dot_product_attention(*inputs).double().square().sum()
        with differentiable(fused([loss])):
            gradients = torch.autograd.grad(loss, inputs, create_graph=True)
        results.append([*gradients, *torch.autograd.grad(gradients, inputs, [u.to(kind)] * 3)])
    for found, expected in zip(*results):
        error = (found - expected.double()).abs().max() / expected.double().abs().max()
        assert error < 16 * torch.finfo(dtype).eps


# --- other ops: a function of [4, 6], and the same in ops with second derivatives ------------------------------------


def embedding_bags(mode, **options):
    tokens, offsets = torch.tensor([1, 2, 0, 3, 3, 2]), torch.tensor([0, 2, 2])

    def op(x):
        return F.embedding_bag(tokens, x, offsets, mode=mode, **options)

    def written_out(x):
        bags = [
            x[tokens[a:b][tokens[a:b] != options.get("padding_idx", -1)]]
            for a, b in [(0, 2), (2, 2), (2, 6)]
        ]
        reduce = {
            "sum": lambda r: r.sum(0),
            "mean": lambda r: r.mean(0),
            "max": lambda r: r.amax(0),
        }[mode]
        return torch.stack([reduce(r) if len(r) else 0 * x[0] for r in bags])

    return op, written_out


def weighted_bags():
    tokens, offsets = torch.tensor([1, 2, 0, 3, 3, 2]), torch.tensor([0, 2])
    return (
        lambda x: F.embedding_bag(tokens, x, offsets, mode="sum", per_sample_weights=x[0].sin()),
        lambda x: torch.stack([r.sum(0) for r in (x[tokens] * x[0].sin()[:, None]).split([2, 4])]),
    )


def distances(p):
    return (
        lambda x: torch.cdist(x[:2], x[1:].square(), p=p),
        lambda x: torch.stack([(row - x[1:].square()).norm(p, -1) for row in x[:2]]),
    )


def pairs(p):
    return lambda x: F.pdist(x, p), lambda x: torch.stack(
        [(x[i] - x[j]).norm(p) for i in range(4) for j in range(i)]
    )


def margins(p, weight=None, reduction="mean"):
    target = torch.tensor([1, 0, 5, 2])

    def written_out(x):
        rows = [
            sum((1 - row[y] + row[j]).clamp(min=0) ** p for j in range(6) if j != y)
            * (1 if weight is None else weight[y])
            / 6
            for row, y in zip(x, target)
        ]
        return {"mean": lambda r: r.mean(), "sum": lambda r: r.sum(), "none": lambda r: r}[
            reduction
        ](torch.stack(rows))

    return lambda x: F.multi_margin_loss(
        x, target, p=p, weight=weight, reduction=reduction
    ), written_out


def label_margins(labels):
    def written_out(x):
        end = labels.index(-1) if -1 in labels else len(labels)
        others = [i for i in range(6) if i not in labels[:end]]
        return torch.stack(
            [
                sum((1 - row[j] + row[i]).clamp(min=0) for j in labels[:end] for i in others) / 6
                for row in x
            ]
        ).mean()

    return lambda x: F.multilabel_margin_loss(x, torch.tensor([labels] * 4)), written_out


def alignments(lengths=((4, 3), (2, 1)), concatenated=False, normal=True, tensors=True):
    """All ways in which four steps make up a word: repeated letters are one, and blanks (0) are left out."""
    words = [[1, 1], [2]] if lengths[1] == (2, 1) else [[], [2]]

    def word(path):
        return [
            letter for i, letter in enumerate(path) if letter and (not i or path[i - 1] != letter)
        ]

    def probabilities(x):
        logits = x.reshape(4, 2, 3)
        return logits.log_softmax(-1) if normal else logits

    def op(x):
        padded = torch.tensor([[*found, 1, 1][:2] for found in words])
        targets = (
            torch.tensor([letter for found in words for letter in found])
            if concatenated
            else padded
        )
        sizes = [torch.tensor(length) for length in lengths] if tensors else lengths
        return F.ctc_loss(probabilities(x), targets, *sizes, reduction="none")

    def written_out(x):
        losses = []
        for n, (log_p, letters) in enumerate(zip(probabilities(x).unbind(1), words)):
            steps = lengths[0][n]
            paths = [p for p in itertools.product(range(3), repeat=steps) if word(p) == letters]
            ways = [sum(log_p[t, letter] for t, letter in enumerate(path)) for path in paths]
            excess = (
                log_p[:steps].exp().sum()
            )  # the gradient of torch is that of normalised probabilities
            losses.append(excess - excess.detach() - torch.stack(ways).logsumexp(0))
        return torch.stack(losses)

    return op, written_out


OPS = {
    "ctc": alignments(),
    "ctc_concatenated": alignments(concatenated=True, tensors=False),
    "ctc_without_labels": alignments(lengths=((4, 2), (0, 1))),
    "ctc_of_scores": alignments(normal=False),
    "hardsigmoid": (lambda x: F.hardsigmoid(3 * x), lambda x: (x / 2 + 0.5).clamp(0, 1)),
    "logit": (lambda x: x.sigmoid().logit(), lambda x: x),
    "logit_clamped": (
        lambda x: x.sigmoid().logit(0.3),
        lambda x: torch.special.logit(x.sigmoid().clamp(0.3, 0.7)),
    ),
    **{f"cdist_{p}": distances(p) for p in (1.0, 2.0, 3.0, torch.inf)},
    **{f"pdist_{p}": pairs(p) for p in (1.0, 2.0, 3.0)},
    "multi_margin": margins(1),
    "multi_margin_squared": margins(2, weight=torch.arange(1.0, 7).double(), reduction="sum"),
    "multi_margin_rows": margins(2, reduction="none"),
    "multilabel_margin": label_margins([3, 0, -1, 2, 2, 2]),
    "multilabel_margin_twice": label_margins([3, 3, 1, -1, 0, 0]),
    **{f"bag_{mode}": embedding_bags(mode) for mode in ("sum", "mean", "max")},
    **{
        f"bag_{mode}_padded": embedding_bags(mode, padding_idx=3) for mode in ("sum", "mean", "max")
    },
    "bag_weighted": weighted_bags(),
}


@pytest.mark.parametrize("name", OPS)
def test_ops_are_differentiated_twice(name):
    x, results = randn(4, 6, seed=1).requires_grad_(), []
    for function in OPS[name]:
        y = function(x.tanh()).flatten().sort().values
        loss = (y * torch.arange(1.0, 1 + y.numel()) + y.square() + y.exp()).sum()
        nodes = fused([loss])
        with differentiable(nodes):
            (g,) = torch.autograd.grad(loss, x, create_graph=True)
        rows = [
            torch.autograd.grad(entry, x, retain_graph=True)[0].flatten() for entry in g.flatten()
        ]
        results.append((loss.detach(), g.detach(), torch.stack(rows)))
        if len(results) == 1:
            assert nodes, "the op is in the graph"
            (plain,) = torch.autograd.grad(loss, x)
            assert_close(g.detach(), plain, rtol=1e-6)
    for found, expected in zip(*results):
        assert_close(found, expected, rounding=1e-10)


def test_hooks_are_gone_after_the_pass():
    x = randn(4, 6).requires_grad_()
    loss = F.hardsigmoid(x).square().sum()
    with differentiable(fused([loss])):
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
    torch.autograd.grad(g.sum(), x, retain_graph=True)
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.autograd.grad(g.sum(), x)


@pytest.mark.parametrize("name", FORMULAS)
def test_nodes_have_saved_what_formulas_read(name):
    """Of kernels on other devices too."""
    kind = getattr(torch._C._functions, name)
    options = ("dropout_p", "is_causal", "scale") if "Attention" in name else ()
    options += ("targets", "input_lengths", "target_lengths", "blank") if "Ctc" in name else ()
    options += ("result",) if "Sparse" in name else ()
    for saved in (*filter(None, FORMULAS[name][1]), *options):
        assert hasattr(kind, f"_saved_{saved}")


def test_piecewise_linear_networks_have_no_residual():
    problem, reference = ROW["mlp_sigmoid"].make(), ROW["mlp_sigmoid"].make()
    torch.manual_seed(0)
    first, last = nn.Linear(5, 4).double(), nn.Linear(4, 3).double()
    problem.model = nn.Sequential(first, nn.Hardsigmoid(), last)
    reference.model = nn.Sequential(first, nn.Sequential(Scaled(), nn.Hardtanh(0, 1)), last)
    blocks = hessian_oracle.hessian(reference)
    compute(problem, HMP(), DiagHessian(), PCHMP(), HessianTraceMC(), MaxEigenvalue())
    assert_products(problem, "hmp", blocks)
    assert_products(problem, "pchmp", blocks)


class Scaled(nn.Module):
    def forward(self, x):
        return x / 6 + 0.5


# --- what has no second derivative -----------------------------------------------------------------------------------


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].exp()


def segments(x):
    return torch.segment_reduce(x.T.contiguous(), "sum", lengths=torch.tensor([2, 1])).T


class Untracked(Once):
    @staticmethod
    def backward(ctx, g):
        return g.detach() * ctx.saved_tensors[0].exp()


ONCE = {
    "once": (Once.apply, "Once"),
    "untracked": (Untracked.apply, "Untracked"),
    "segments": (segments, "segment"),
}


def product_or_value(extension, op):
    layer = nn.Linear(4, 3)
    with curvature(extension):
        out = op(layer(torch.ones(3, 4).cumsum(0)))
        F.mse_loss(out, torch.zeros_like(out)).backward()
    found = getattr(layer.weight, extension.savefield)
    return found(torch.ones(3, 4)) if callable(found) else found


@pytest.mark.parametrize("name", ONCE)
@pytest.mark.parametrize(
    "extension", [DiagHessian, PCHMP, HMP, GGNMP, HessianTraceMC, lambda: MaxEigenvalue("ggn")]
)
def test_refusals_name_the_op_and_give_no_advice_about_another(extension, name):
    """No derivative that torch drops is taken for zero."""
    op, named = ONCE[name]
    with pytest.raises(
        NotImplementedError, match=rf"(?i)found `{named}.*Write it in ops that have one"
    ) as refused:
        product_or_value(extension(), op)
    assert "attention" not in str(refused.value)


def test_refusal_of_dropout_in_a_kernel():
    error = RuntimeError(
        "derivative for aten::_scaled_dot_product_flash_attention_backward is not implemented"
    )
    assert "without dropout in the kernel" in str(
        refusal("_scaled_dot_product_flash_attention", error)
    )
