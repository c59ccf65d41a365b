"""Situations that break hook-based curvature: each is right, or an error that says what to do."""

import copy
import pickle
import warnings

import oracle
import pytest
import torch
import torch.nn.functional as F
from losses_table import LOSS
from torch import nn
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils.checkpoint import checkpoint
from zoo import ROW, Problem, assert_close, assert_fields, compute, reference

from lightning_curv import curvature, disable, extend, record, rule
from lightning_curv.extensions import (
    KFAC,
    KFLR,
    BatchDiagGGNExact,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagGGNMC,
    SqrtGGNExact,
    SumGradSquared,
    Variance,
)
from lightning_curv.rules import RULES
from lightning_curv.terms import Term

FIELDS = ["grad_batch", "diag_ggn_exact"]
ORACLES = {"grad_batch": oracle.grad_batch, "diag_ggn_exact": oracle.diag_ggn}


def both():
    return BatchGrad(), DiagGGNExact()


def problem(seed=0, name="mlp_sigmoid") -> Problem:
    """A row of the zoo with a batch of its own for every seed."""
    row = ROW[name].make()
    torch.manual_seed(seed)
    row.X, row.y = torch.randn_like(row.X), row.y.roll(seed)
    return row


def assert_right(case: Problem) -> None:
    for field, naive in ORACLES.items():
        assert_fields(case, field, naive(case))


def assert_untouched(model: nn.Module) -> None:
    for p in model.parameters():
        assert not any(hasattr(p, field) for field in FIELDS)


# --- where the forward, the loss and the backward run ----------------------------------------------------------------


def test_everything_inside_the_context():
    case = problem()
    with curvature(*both()):
        case.compute_loss().backward()
    assert_right(case)


def test_backward_only_inside_the_context_of_an_extended_model():
    case = problem()
    model, criterion = extend(case.model), extend(nn.CrossEntropyLoss())
    assert model is case.model
    loss = criterion(model(case.X), case.y)
    with curvature(*both()):
        loss.backward()
    assert_right(case)


def test_backward_only_inside_the_context_after_record():
    case = problem()
    with record():
        loss = case.compute_loss()
    with curvature(*both()):
        loss.backward()
    assert_right(case)


def test_extended_model_with_functional_loss_inside_the_context():
    case = problem()
    extend(case.model)
    with curvature(*both()):
        F.cross_entropy(case.model(case.X), case.y).backward()
    assert_right(case)


def test_extended_model_with_functional_loss_outside_the_context():
    """Gradients need no loss record; curvature says what is missing."""
    case = problem()
    extend(case.model)
    loss = F.cross_entropy(case.model(case.X), case.y)
    with curvature(BatchGrad()):
        loss.backward(retain_graph=True)
    assert_fields(case, "grad_batch", oracle.grad_batch(case))
    with (
        pytest.raises((RuntimeError, NotImplementedError, ValueError), match=r"extend|record"),
        curvature(DiagGGNExact()),
    ):
        loss.backward()


def test_forward_that_nobody_recorded_is_an_error():
    case = problem()
    loss = case.compute_loss()
    with pytest.raises((RuntimeError, NotImplementedError), match=r"extend|record"), curvature(BatchGrad()):
        loss.backward()


def test_extended_submodule_in_an_unrecorded_model_names_what_is_missing():
    case = problem()
    extend(case.model[0])
    loss = case.compute_loss()
    with pytest.raises((RuntimeError, NotImplementedError), match=r"extend|record"), curvature(BatchGrad()):
        loss.backward()


def test_extending_twice_is_extending_once():
    case = problem()
    extend(extend(case.model))
    extend(case.model[0])
    compute(case, *both())
    assert_right(case)


def test_extended_model_copies_pickles_and_keeps_its_state_dict():
    case = problem()
    keys = list(case.model.state_dict())
    extend(case.model)
    assert list(case.model.state_dict()) == keys
    for clone in (copy.deepcopy(case.model), pickle.loads(pickle.dumps(case.model))):
        other = Problem(clone, case.X, case.y, case.loss)
        loss = extend(nn.CrossEntropyLoss())(clone(case.X), case.y)
        with curvature(*both()):
            loss.backward()
        assert_right(other)
    assert_untouched(case.model)


def test_failing_forward_leaves_no_mode_behind():
    model = extend(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(RuntimeError, match="mat1"):
        model(torch.ones(1, 3))
    assert torch._C._len_torch_function_stack() == 0


def test_exception_inside_the_context_ends_it():
    case = problem()
    with pytest.raises(KeyError), curvature(*both()):
        raise KeyError
    assert torch._C._len_torch_function_stack() == 0
    case.compute_loss().backward()
    assert_untouched(case.model)


def test_outside_the_context_nothing_happens():
    case = problem()
    extend(case.model)
    loss = extend(nn.CrossEntropyLoss())(case.model(case.X), case.y)
    loss.backward()
    assert_untouched(case.model)


def test_disable():
    case = problem()
    with curvature(*both()):
        with disable():
            case.compute_loss().backward()
        assert_untouched(case.model)
        case.compute_loss().backward()
    assert_right(case)


def test_without_gradients_the_context_is_transparent():
    case = problem()
    with curvature(*both()), torch.no_grad():
        out = case.model(case.X)
    assert not out.requires_grad
    assert_untouched(case.model)


# --- several forwards and backwards ----------------------------------------------------------------------------------


def test_older_loss_uses_the_older_inputs():
    case, newer = problem(0), problem(1)
    newer.model = case.model
    assert not torch.equal(case.X, newer.X)
    with curvature(*both()):
        old_loss, new_loss = case.compute_loss(), newer.compute_loss()
        old_loss.backward()
        assert_right(case)
        new_loss.backward()
        assert_right(newer)


def test_older_loss_of_an_extended_model_uses_the_older_inputs():
    case, newer = problem(0), problem(1)
    newer.model = extend(case.model)
    criterion = extend(nn.CrossEntropyLoss())
    old_loss, new_loss = (criterion(c.model(c.X), c.y) for c in (case, newer))
    with curvature(*both()):
        new_loss.backward()
        assert_right(newer)
        old_loss.backward()
    assert_right(case)


def test_evaluation_between_forward_and_backward_changes_nothing():
    case = problem()
    with curvature(*both()):
        loss = case.compute_loss()
        with torch.no_grad():
            case.model(torch.randn(7, 5, dtype=torch.float64))
        case.model(torch.randn(3, 5, dtype=torch.float64))
        loss.backward()
    assert_right(case)


def test_fields_overwrite_and_gradients_accumulate():
    case = problem()
    for backwards in (1, 2):
        with curvature(*both(), KFLR()):
            case.compute_loss().backward()
        assert_right(case)
        p = case.model[0].weight
        assert_close(p.grad, backwards * p.grad_batch.sum(0))
        assert_close(p.kflr[0], oracle.kronecker(case, "expand")["0.weight"][0])


def test_several_backward_calls_on_one_graph():
    case = problem()
    with curvature(*both()):
        loss = case.compute_loss()
        for _ in range(3):
            loss.backward(retain_graph=True)
            assert_right(case)
    p = case.model[0].weight
    assert_close(p.grad, 3 * p.grad_batch.sum(0))


def test_the_graph_is_freed_as_without_monitoring():
    case = problem()
    with curvature(*both()):
        loss = case.compute_loss()
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()


def test_zero_grad_leaves_the_fields():
    case = problem()
    compute(case, *both())
    case.model.zero_grad()
    assert_right(case)


def test_seed_of_the_backward_pass_scales_everything():
    """A seed of 3 is a loss of 3ℓ."""
    case, tripled = problem(), problem()
    compute(case, *both())
    with curvature(*both()):
        loss = tripled.compute_loss()
        loss.backward(torch.full_like(loss, 3.0))
    for p, q in zip(case.model.parameters(), tripled.model.parameters()):
        assert_close(q.grad_batch, 3 * p.grad_batch)
        assert_close(q.diag_ggn_exact, 3 * p.diag_ggn_exact)


@pytest.mark.parametrize(
    "scaled",
    [lambda loss: 3 * loss, lambda loss: loss / (1 / 3), lambda loss: loss + loss + loss, lambda loss: loss.mul(3) + 1],
    ids=["factor", "quotient", "sum", "affine"],
)
def test_what_multiplies_the_loss_multiplies_everything(scaled):
    case = problem()
    with curvature(*both(), BatchL2Grad(), SumGradSquared(), Variance(), SqrtGGNExact(), KFLR()):
        scaled(case.compute_loss()).backward()
    kron = oracle.kronecker(case, "expand")
    for key, p in case.parameters().items():
        assert_close(p.grad_batch, 3 * oracle.grad_batch(case)[key])
        assert_close(p.diag_ggn_exact, 3 * oracle.diag_ggn(case)[key])
        assert_close(p.batch_l2, 9 * oracle.batch_l2(case)[key])
        assert_close(p.sum_grad_squared, 9 * oracle.sum_grad_squared(case)[key])
        assert_close(p.variance, 9 * oracle.variance(case)[key], rounding=1e-14 * p.grad.square().max().item())
        assert_close((p.sqrt_ggn_exact**2).sum((0, 1)), 3 * oracle.diag_ggn(case)[key])
        assert_close(p.kflr[0], 3 * kron[key][0])
        if len(kron[key]) == 2:
            assert_close(p.kflr[1], kron[key][1])


def test_loss_unpacked_by_a_metric_first():
    """`loss.item()`, `.detach()` and another metric on the output leave the records alone."""
    case = problem()
    with curvature(*both()):
        output = case.model(case.X)
        loss = F.cross_entropy(output, case.y)
        F.mse_loss(output.softmax(1), torch.rand_like(output)).item()
        loss.detach().exp()
        loss.backward()
    assert_right(case)


# --- architectures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ELU, nn.SiLU, nn.Hardtanh, nn.LeakyReLU, nn.Hardswish])
def test_in_place_activations(activation):
    case = problem()
    inplace = activation(inplace=True)
    case.model = nn.Sequential(nn.Linear(5, 6), inplace, nn.Dropout(0.0, inplace=True), nn.Linear(6, 3)).double()
    compute(case, *both())
    out_of_place = copy.deepcopy(case)
    out_of_place.model[1].inplace = False
    for field, naive in ORACLES.items():
        assert_fields(case, field, naive(out_of_place))


def test_in_place_activation_on_a_view():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, x):
            h = self.a(x)
            torch.relu_(h[:, 2:])
            return self.b(h)

    case = problem()
    case.model = Net().double()
    compute(case, *both())
    assert_right(case)


def test_unused_parameters_carry_no_field():
    case = ROW["unused_branch"].make()
    compute(case, *both(), KFLR())
    for branch in (case.model.idle, case.model.side):
        for p in branch.parameters():
            assert p.grad is None
            assert not hasattr(p, "kflr")
            assert_untouched(branch)
    assert_right(case)


def test_parameter_frozen_between_two_steps_is_left_alone():
    case = problem()
    with curvature(BatchGrad()):
        case.model[0].weight.requires_grad_(False)
        case.compute_loss().backward()
    assert not hasattr(case.model[0].weight, "grad_batch")
    assert_fields(case, "grad_batch", oracle.grad_batch(case))


def test_updating_parameters_between_forward_and_backward_is_an_error():
    """As in PyTorch: the backward pass would mix two parameter values."""
    case = problem()
    with curvature(*both()):
        loss = case.compute_loss()
        with torch.no_grad():
            case.model[2].weight.add_(1.0)
        with pytest.raises(RuntimeError, match=r"in-?place"):
            loss.backward()


def batchnorm_case():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).double()
    return Problem(model, torch.randn(4, 1, 3, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0]), LOSS["ce"])


@pytest.mark.parametrize(
    "extension",
    [BatchGrad, BatchL2Grad, SumGradSquared, Variance, DiagGGNExact, BatchDiagGGNExact, SqrtGGNExact, DiagGGNMC],
)
def test_batchnorm_in_training_mode_is_refused(extension):
    case = batchnorm_case()
    with pytest.raises((RuntimeError, NotImplementedError), match="GroupNorm"):
        compute(case, extension())


def test_frozen_batchnorm_in_training_mode_still_couples_samples():
    case = batchnorm_case()
    case.model[1].requires_grad_(False)
    with pytest.raises((RuntimeError, NotImplementedError), match="GroupNorm"):
        compute(case, BatchGrad())


def test_batchnorm_above_all_parameters_couples_nothing():
    """A normalisation of the data itself, below every trainable parameter, does no harm."""
    case = problem()
    norm = nn.BatchNorm1d(5, affine=False).double()
    case.model = nn.Sequential(norm, *case.model)
    compute(case, BatchGrad())
    for p in case.model.parameters():
        assert_close(p.grad_batch.sum(0), p.grad)


@pytest.mark.parametrize("extension", [KFAC, KFLR])
def test_batchnorm_in_training_mode_is_allowed_for_kronecker_factors(extension):
    case = batchnorm_case()
    compute(case, extension())
    for layer, width in ((case.model[0], 4), (case.model[4], 8)):
        B, A = getattr(layer.weight, extension().savefield)
        assert A.shape == (width, width)
        assert B.shape == (layer.weight.shape[0],) * 2
        assert B.trace() > 0


def test_functional_batchnorm_in_training_mode_is_refused():
    case = problem()
    layer = case.model[0]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = layer, nn.Linear(6, 3).double()

        def forward(self, x):
            return self.head(F.batch_norm(self.layer(x), None, None, training=True))

    case.model = Net()
    with pytest.raises((RuntimeError, NotImplementedError), match="GroupNorm"):
        compute(case, Variance())


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


class Custom(nn.Module):
    def __init__(self, twice=False):
        super().__init__()
        self.body, self.gain, self.twice = nn.Linear(5, 3), nn.Parameter(torch.rand(3)), twice

    def forward(self, x):
        h = self.body(x)
        if self.twice:
            h = h * self.gain  # one use that is recorded and one that is not
        return Scale.apply(h, self.gain)


@pytest.mark.parametrize("twice", [False, True], ids=["only_use", "second_use"])
@pytest.mark.parametrize("extension", [BatchGrad, Variance, DiagGGNExact, KFLR])
def test_custom_function_names_parameter_op_and_way_out(extension, twice):
    case = problem()
    case.model = extend(Custom(twice).double())
    with pytest.raises((RuntimeError, NotImplementedError)) as caught:
        compute(case, extension())
    message = str(caught.value)
    assert "gain" in message
    assert "Scale" in message
    assert "rule" in message or "fallback" in message


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
    finds = pytest.raises((RuntimeError, AssertionError, NotImplementedError), match=penalised.replace(".", r"\."))
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
    @rule(scale, slots=("gain",))
    def _(call, g, x, gain):
        return {"gain": Term("d", "d", "d", g, 2 * x)}

    case = problem()
    case.model = Scaled().double()
    with curvature(*both(), KFLR(), check=True):
        case.compute_loss().backward()
    assert_right(case)


def test_wrong_rule_is_found_by_the_check(registry):
    @rule(scale, slots=("gain",))
    def _(call, g, x, gain):
        return {"gain": Term("d", "d", "d", g, x)}

    case = problem()
    case.model = Scaled().double()
    with pytest.raises((RuntimeError, AssertionError), match="gain"), curvature(BatchGrad(), check=True):
        case.compute_loss().backward()


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
    case = Problem(model, torch.zeros(0, 5, dtype=torch.float64), torch.zeros(0, dtype=torch.long), LOSS["ce_sum"])
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
        torch.testing.assert_close(p.grad_batch.sum(0), p.grad, rtol=2**-6, atol=2**-6 * p.grad.abs().max().item())
    precise = copy.deepcopy(case)
    compute(precise, *both())
    for p, q in zip(model.parameters(), precise.model.parameters()):
        largest = q.diag_ggn_exact.max().item()
        torch.testing.assert_close(p.diag_ggn_exact, q.diag_ggn_exact, rtol=0.05, atol=0.05 * largest)


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
    case.model = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3)).double()
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


# --- what nobody promised: right, or refused --------------------------------------------------------------------------


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
        self.cell, self.head, self.batch_first = cell(5, 3, batch_first=batch_first), nn.Linear(3, 3), batch_first

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
        self.p, self.q, self.head = nn.Parameter(torch.rand(5)), nn.Parameter(torch.rand(1, 2, 5)), nn.Linear(5, 3)

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


def sequences(layer):
    return lambda: nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(3))


UNPROMISED = {
    "per_sample_table": PerSampleTable,
    "lstm": lambda: Recurrent(nn.LSTM, True),
    "gru_sequence_first": lambda: Recurrent(nn.GRU, False),
    "rnn": lambda: Recurrent(nn.RNN, True),
    "multihead_attention": Attention,
    "transformer_layer": lambda: sequences(nn.TransformerEncoderLayer(5, 1, 6, dropout=0.0, batch_first=True))(),
    "transformer_layer_norm_first": lambda: sequences(
        nn.TransformerEncoderLayer(5, 1, 6, dropout=0.0, batch_first=True, norm_first=True)
    )(),
    "embedding_bag": Bag,
    "instance_norm": lambda: sequences(nn.InstanceNorm1d(4, affine=True))(),
    "spectral_norm": lambda: sequences(nn.utils.parametrizations.spectral_norm(nn.Linear(5, 3)).eval())(),
    "orthogonal": lambda: sequences(nn.utils.parametrizations.orthogonal(nn.Linear(5, 3)))(),
    "old_weight_norm": lambda: sequences(nn.utils.weight_norm(nn.Linear(5, 3)))(),
    "transposed_convolution_groups": lambda: sequences(nn.ConvTranspose1d(4, 2, 3, stride=2, groups=2))(),
    "prelu": lambda: sequences(nn.PReLU())(),
    "repeats": RowsOfAParameter,
    "stacked_along_the_batch": StackedAlongTheBatch,
    "two_views": Doubled,
    "latent_queries": lambda: LatentQueries(False),
    "latent_queries_expanded": lambda: LatentQueries(True),
    "constant_tokens": lambda: ConstantTokens(()),
    "constant_tokens_leading": lambda: ConstantTokens((1,)),
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
    ("samples", "spelling"),
    [
        (1, lambda output, y: sum(F.cross_entropy(output[n : n + 1], y[n : n + 1]) for n in range(4)) / 4),
        (2, lambda output, y: F.cross_entropy(output[:2], y[:2]) / 2 + F.cross_entropy(output[2:], y[2:]) / 2),
        (1, lambda output, y: F.cross_entropy(output.T[None], y[None])),
    ],
    ids=["four_losses_of_one", "two_losses_of_two", "positions"],
)
def test_the_loss_decides_what_a_sample_is(samples, spelling):
    """Rows that share the place in their loss call are positions of one sample; sums over samples do not change."""
    case = problem()
    with curvature(*both()):
        spelling(case.model(case.X), case.y).backward()
    assert_fields(case, "diag_ggn_exact", oracle.diag_ggn(case))
    for p in case.model.parameters():
        assert len(p.grad_batch) == samples
        assert_close(p.grad_batch.sum(0), p.grad)


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
        assert_close(p.diag_ggn_exact, 0.5 * oracle.diag_ggn(case)[key] + 2 * oracle.diag_ggn(other)[key])


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
    [lambda h: h - h.mean(0), lambda h: h / h.norm(), lambda h: (h @ h.T).softmax(1) @ h, lambda h: h + h.flip(0)],
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
    case = Problem(model, torch.tensor([[0, 1], [1, 1], [5, 2], [0, 5]]), torch.tensor([0, 1, 2, 1]), LOSS["ce"])
    with curvature(*both(), check=True):
        case.compute_loss().backward()
    dense = copy.deepcopy(case)
    dense.model[0].sparse = False
    for field, naive in ORACLES.items():
        for key, expected in naive(dense).items():
            assert_close(getattr(case.parameters()[key], field), expected, label=key)
