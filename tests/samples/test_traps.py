"""Situations that break hook-based curvature: each is right, or an error that says what to do."""

import copy
import pickle

import oracle
import pytest
import torch
import torch.nn.functional as F
from losses_table import LOSS
from torch import nn
from trap_problems import ORACLES, assert_right, assert_untouched, both, problem
from zoo import ROW, Problem, assert_close, assert_fields, compute

from lightning_curv import curvature, disable, extend, record
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
    """Gradients need no loss record, and curvature finds that of a loss which is not recorded by differentiation."""
    case = problem()
    extend(case.model)
    loss = F.cross_entropy(case.model(case.X), case.y)
    with curvature(BatchGrad()):
        loss.backward(retain_graph=True)
    assert_fields(case, "grad_batch", oracle.grad_batch(case))
    with curvature(DiagGGNExact()):
        loss.backward()
    assert_fields(case, "diag_ggn_exact", oracle.diag_ggn(case))


def test_forward_that_nobody_recorded_is_an_error():
    case = problem()
    loss = case.compute_loss()
    with (
        pytest.raises((RuntimeError, NotImplementedError), match=r"extend|record"),
        curvature(BatchGrad()),
    ):
        loss.backward()


def test_extended_submodule_in_an_unrecorded_model_names_what_is_missing():
    case = problem()
    extend(case.model[0])
    loss = case.compute_loss()
    with (
        pytest.raises((RuntimeError, NotImplementedError), match=r"extend|record"),
        curvature(BatchGrad()),
    ):
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
    [
        lambda loss: 3 * loss,
        lambda loss: loss / (1 / 3),
        lambda loss: loss + loss + loss,
        lambda loss: loss.mul(3) + 1,
    ],
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
        assert_close(
            p.variance,
            9 * oracle.variance(case)[key],
            rounding=1e-14 * p.grad.square().max().item(),
        )
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


@pytest.mark.parametrize(
    "activation", [nn.ReLU, nn.ELU, nn.SiLU, nn.Hardtanh, nn.LeakyReLU, nn.Hardswish]
)
def test_in_place_activations(activation):
    case = problem()
    inplace = activation(inplace=True)
    case.model = nn.Sequential(
        nn.Linear(5, 6), inplace, nn.Dropout(0.0, inplace=True), nn.Linear(6, 3)
    ).double()
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
    model = nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)
    ).double()
    return Problem(
        model, torch.randn(4, 1, 3, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0]), LOSS["ce"]
    )


@pytest.mark.parametrize(
    "extension",
    [
        BatchGrad,
        BatchL2Grad,
        SumGradSquared,
        Variance,
        DiagGGNExact,
        BatchDiagGGNExact,
        SqrtGGNExact,
        DiagGGNMC,
    ],
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


def test_batchnorm_of_the_data_themselves_is_refused():
    """What a sample is turned into depends on the others, though nothing is differentiated there."""
    case = problem()
    norm = nn.BatchNorm1d(5, affine=False).double()
    case.model = nn.Sequential(norm, *case.model)
    with pytest.raises(NotImplementedError, match="statistic"):
        compute(case, BatchGrad())
    norm.eval()
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


def test_embedding_of_one_token_per_sample():
    case = problem()
    case.model = nn.Sequential(
        nn.Embedding(5, 4, padding_idx=1), nn.Tanh(), nn.Linear(4, 3)
    ).double()
    case.X = torch.tensor([0, 1, 4, 4])
    compute(case, *both(), KFLR())
    assert_right(case)
