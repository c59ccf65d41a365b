"""Ops without a rule, precision, shapes and devices: right, or an error that says what to do."""

import copy
import warnings

import oracle
import pytest
import torch
import torch.nn.functional as F
from losses_table import LOSS
from torch import nn
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils.checkpoint import checkpoint
from trap_problems import assert_right, both, problem
from zoo import ROW, Problem, assert_close, assert_fields, compute, reference

from lightning_curv import curvature, extend, record, rule
from lightning_curv.extensions import (
    KFAC,
    KFLR,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagGGNMC,
    SumGradSquared,
    Variance,
)
from lightning_curv.recording.records import marks
from lightning_curv.rules import RULES
from lightning_curv.terms.term import Term

# --- ops that nobody knows -------------------------------------------------------------------------------------------


class Scale(torch.autograd.Function):
    """An op of the user's own, invisible to recording."""

    @staticmethod
    def forward(ctx, x, gain):
        ctx.save_for_backward(x, gain)
        return x * gain

    @staticmethod
    def backward(ctx, g):
        x, gain = ctx.saved_tensors
        return g * gain, (g * x).sum(0)


class Keeps(torch.autograd.Function):
    """An op that leaves a tensor at its node under the name that the nodes of leaves have for theirs."""

    @staticmethod
    def forward(ctx, x, kept):
        ctx.variable = kept
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g, None


class Custom(nn.Module):
    def __init__(self, twice=False):
        super().__init__()
        self.body, self.gain, self.twice = nn.Linear(5, 3), nn.Parameter(torch.rand(3)), twice

    def forward(self, x):
        h = self.body(x)
        if self.twice:
            h = h * self.gain  # one use that is recorded and one that is not
        return Scale.apply(h, self.gain)


@pytest.mark.parametrize("trainable", [False, True])
def test_a_tensor_at_the_node_of_a_custom_function_makes_it_no_leaf(trainable):
    torch.manual_seed(0)
    layer, kept = (
        nn.Linear(5, 3).double(),
        nn.Parameter(torch.rand(4).double(), requires_grad=trainable),
    )
    x, y = torch.randn(4, 5).double(), torch.randn(4, 3).double()
    with curvature(BatchGrad()):
        F.mse_loss(Keeps.apply(layer(x), kept), y).backward()
    expected = [
        torch.autograd.grad(F.mse_loss(2 * layer(x[n]), y[n]) / 4, [*layer.parameters()])
        for n in range(4)
    ]
    for parameter, gradients in zip(layer.parameters(), zip(*expected)):
        torch.testing.assert_close(parameter.grad_batch, torch.stack(gradients))


@pytest.mark.parametrize("twice", [False, True], ids=["only_use", "second_use"])
@pytest.mark.parametrize("extensions", [both(), [Variance(), KFLR()]])
def test_custom_function_is_right_and_names_parameter_op_and_price(extensions, twice):
    case = problem()
    case.model = extend(Custom(twice).double())
    with pytest.warns(UserWarning, match="gain") as caught, curvature(*extensions):
        case.compute_loss().backward()
    messages = " ".join(str(warning.message) for warning in caught)
    assert "Scale" in messages
    assert "rule" in messages
    for extension in extensions:
        if not isinstance(extension, KFLR):
            name = {
                "grad_batch": "grad_batch",
                "diag_ggn_exact": "diag_ggn",
                "variance": "variance",
            }
            naive = getattr(oracle, name[extension.savefield])
            assert_fields(case, extension.savefield, naive(case))


class Exotic(nn.Module):
    """A parameter in an op that has no rule and batches over its first axis."""

    def __init__(self):
        super().__init__()
        self.body, self.p = nn.Linear(5, 3), nn.Parameter(torch.rand(3))

    def forward(self, x):
        return torch.atan2(self.body(x), self.p)


def test_exact_fallback_warns_once_that_it_is_slow():
    case = problem()
    case.model = Exotic().double()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")  # Python's own: once per place
        for _ in range(2):
            with curvature(*both()):
                case.compute_loss().backward()
    assert_right(case)
    (warning,) = [w for w in caught if "slow" in str(w.message)]
    assert "atan2" in str(warning.message)


@pytest.mark.parametrize("penalised", ["0.weight", "4.bias"])
def test_weight_penalty_is_found_by_the_check(penalised):
    case = problem()
    extend(case.model)
    p = dict(case.model.named_parameters())[penalised]
    finds = pytest.raises(
        (RuntimeError, AssertionError, NotImplementedError), match=penalised.replace(".", r"\.")
    )
    with finds, curvature(BatchGrad(), check=True):
        (case.compute_loss() + 0.1 * (p**2).sum()).backward()


def scale(x, gain):
    """An op of the user's own that recording can see."""
    if has_torch_function((x, gain)):
        return handle_torch_function(scale, (x, gain), x, gain)
    return 2 * x * gain


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.gain = nn.Linear(5, 3), nn.Parameter(torch.rand(3))

    def forward(self, x):
        return scale(self.body(x), self.gain)


@pytest.fixture
def registry():
    """Rules registered by a test end with it."""
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


def test_rule_of_the_user(registry):
    @rule(scale, parameters=("gain",))
    def _(call, g, x, gain):
        return {"gain": Term("d", "d", "d", g, 2 * x)}

    case = problem()
    case.model = Scaled().double()
    with curvature(*both(), KFLR(), check=True):
        case.compute_loss().backward()
    assert_right(case)


def test_wrong_rule_is_found_by_the_check(registry):
    @rule(scale, parameters=("gain",))
    def _(call, g, x, gain):
        return {"gain": Term("d", "d", "d", g, x)}

    case = problem()
    case.model = Scaled().double()
    with (
        pytest.raises((RuntimeError, AssertionError), match="gain"),
        curvature(BatchGrad(), check=True),
    ):
        case.compute_loss().backward()


def summed(xs, gain):
    if has_torch_function((*xs, gain)):
        return handle_torch_function(summed, (*xs, gain), xs, gain)
    return sum(xs) * gain


def test_tensors_in_a_list_are_read_too(registry):
    """They may be the only ones of the batch that an op with a rule reads."""

    @rule(summed, parameters=("gain",))
    def _(call, g, xs, gain):
        return {"gain": Term("d", "d", "d", g, sum(xs))}

    gain = nn.Parameter(torch.rand(3))
    with record():
        out = summed([torch.rand(4, 3), torch.rand(4, 3)], gain)
    assert [root.shape for root in marks(out.grad_fn).read.tensors] == [(4, 3), (4, 3)]


def test_check_accepts_what_is_right_and_accumulated():
    case = problem()
    for _ in range(2):
        with curvature(*both(), KFAC(), check=True):
            case.compute_loss().backward()
    assert_right(case)


def test_input_changed_in_place_after_the_forward_is_an_error():
    """The records notice before autograd does, and say what to do."""
    case = problem()
    case.model = nn.Linear(5, 3).double()
    with curvature(*both()):
        loss = case.compute_loss()
        case.X.add_(1.0)
        with pytest.raises(RuntimeError, match=r"in-?place.*clone"):
            loss.backward()


def test_target_changed_in_place_after_the_forward_is_an_error_or_harmless():
    case = problem(name="mlp_mse")
    before = case.y.clone()
    expected = oracle.diag_ggn(case)
    with curvature(DiagGGNExact()):
        loss = F.mse_loss(case.model(case.X), case.y)
        case.y.mul_(2.0)
        with pytest.raises(RuntimeError, match=r"in-?place"):
            loss.backward()
    case.y = before
    compute(case, DiagGGNExact())
    assert_fields(case, "diag_ggn_exact", expected)


# --- precision, shape and device features ----------------------------------------------------------------------------


def test_empty_batch():
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    case = Problem(
        model,
        torch.zeros(0, 5, dtype=torch.float64),
        torch.zeros(0, dtype=torch.long),
        LOSS["ce_sum"],
    )
    compute(case, *both(), BatchL2Grad(), SumGradSquared())
    for p in model.parameters():
        assert p.grad_batch.shape == (0, *p.shape)
        assert p.batch_l2.shape == (0,)
        assert p.sum_grad_squared.count_nonzero() == 0
        assert p.diag_ggn_exact.count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fields_have_the_parameters_dtype(dtype):
    case = problem()
    case.model, case.X = case.model.to(dtype), case.X.to(dtype)
    compute(case, *both(), Variance(), BatchL2Grad(), KFLR())
    for p in case.model.parameters():
        fields = [p.grad_batch, p.diag_ggn_exact, p.variance, p.batch_l2, *p.kflr]
        assert {field.dtype for field in fields} == {dtype}
        assert not any(field.requires_grad for field in fields)


def test_autocast():
    """bfloat16 activations: per-sample gradients add to the gradient up to bfloat16's eight bits, in float32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    case = Problem(model, torch.randn(5, 1, 3, 3), torch.tensor([0, 1, 2, 1, 0]), LOSS["ce"])
    with curvature(*both()):
        with torch.autocast("cpu", torch.bfloat16):
            loss = case.compute_loss()
        loss.backward()
    for p in model.parameters():
        assert p.grad_batch.dtype == torch.float32
        torch.testing.assert_close(
            p.grad_batch.sum(0), p.grad, rtol=2**-6, atol=2**-6 * p.grad.abs().max().item()
        )
    precise = copy.deepcopy(case)
    compute(precise, *both())
    for p, q in zip(model.parameters(), precise.model.parameters()):
        largest = q.diag_ggn_exact.max().item()
        torch.testing.assert_close(
            p.diag_ggn_exact, q.diag_ggn_exact, rtol=0.05, atol=0.05 * largest
        )


@pytest.mark.parametrize(
    "name", ["vit", "language_model", "transformer_encoder", "transformer_decoder", "products"]
)
def test_autocast_around_what_stays_in_float32(name):
    """Norms, embeddings and products get cotangents that went through bfloat16; batch and time may be equally long."""
    expected, case = reference("grad_batch", name), ROW[name].make()
    model, X = case.model.float(), case.X.float() if case.X.is_floating_point() else case.X
    with curvature(*both()):
        with torch.autocast("cpu", torch.bfloat16):
            output = model(X)
        case.loss.function(
            output.float(), case.y.float() if case.y.is_floating_point() else case.y
        ).backward()
    largest = max(g.abs().max().item() for g in expected.values())
    for key, p in model.named_parameters():
        torch.testing.assert_close(
            p.grad_batch.double(), expected[key], rtol=0.1, atol=0.1 * largest
        )


def test_reentrant_checkpoints_are_refused():
    """They run their ops during the backward pass, where no record of theirs can be found before it."""

    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x):
            return checkpoint(self.b, self.a(x), use_reentrant=True)

    case = problem()
    case.model = Hidden().double()
    with pytest.raises(NotImplementedError, match="use_reentrant=False"), curvature(BatchGrad()):
        case.compute_loss().backward()


def test_activation_checkpointing():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            block = lambda h: torch.tanh(self.b(torch.sigmoid(self.a(h))))  # noqa: E731
            return self.c(checkpoint(block, x, use_reentrant=False) if self.training else block(x))

    case = problem()
    case.model = Net().double()
    compute(case, *both())
    case.model.eval()
    assert_right(case)


def test_dropout_is_the_one_of_the_forward():
    """Σ_n of the terms is the gradient of the very forward pass that was run."""
    case = problem()
    case.model = nn.Sequential(
        nn.Linear(5, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3)
    ).double()
    compute(case, BatchGrad(), DiagGGNMC(), check=True)
    for p in case.model.parameters():
        assert_close(p.grad_batch.sum(0), p.grad)


def test_noncontiguous_and_channels_last_input():
    case = ROW["cnn_inplace_groups"].make()
    case.X = case.X.to(memory_format=torch.channels_last)
    case.model = case.model.to(memory_format=torch.channels_last)
    compute(case, *both())
    assert_fields(case, "grad_batch", reference("grad_batch", "cnn_inplace_groups"))
    assert_fields(case, "diag_ggn_exact", reference("diag_ggn", "cnn_inplace_groups"))


def test_input_that_requires_grad_keeps_its_gradient():
    case, plain = problem(), problem()
    case.X.requires_grad_()
    plain.X.requires_grad_()
    compute(case, *both())
    plain.compute_loss().backward()
    assert torch.equal(case.X.grad, plain.X.grad)
    case.X = case.X.detach()
    assert_right(case)


@pytest.mark.parametrize("name", ["mlp_sigmoid", "cnn_inplace_groups", "vit"])
def test_training_is_bit_identical_with_and_without_monitoring(name):
    """Three SGD steps with dropout drawing from the global generator: same parameters, same random state."""

    def train(monitor):
        case = ROW[name].make()
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1, momentum=0.9)
        extensions = [*both(), Variance(), DiagGGNMC(), KFAC()] if monitor else []
        for _ in range(3):
            optimizer.zero_grad()
            with warnings.catch_warnings(), curvature(*extensions):
                F.cross_entropy(F.dropout(case.model(case.X), 0.3), case.y).backward()
            optimizer.step()
        return [p.detach() for p in case.model.parameters()], torch.get_rng_state()

    (plain, state), (monitored, monitored_state) = train(False), train(True)
    assert all(map(torch.equal, plain, monitored))
    assert torch.equal(state, monitored_state)
