"""Recurrent builtins: their rule against brute force and against the same network written out step by step."""

import contextlib
import copy
from functools import partial
from itertools import product

import oracle
import pytest
import torch
import torch.nn.functional as F
from losses_table import LOSS
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence
from zoo import QUANTITIES, Problem, assert_close, assert_fields, compute

from lightning_curv import curvature, record
from lightning_curv.extensions import (
    KFLR,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagHessian,
    SqrtGGNExact,
    SumGradSquared,
)
from lightning_curv.recording.records import marks
from lightning_curv.rules import RULES, Call, cells, recurrent
from lightning_curv.rules.packed_outputs import rows
from lightning_curv.terms import ghost_norms
from lightning_curv.terms.jacobian import Jacobian

NETWORKS = {
    "lstm": nn.LSTM,
    "lstm_two_layers_both_directions": partial(nn.LSTM, num_layers=2, bidirectional=True),
    "lstm_projected": partial(nn.LSTM, proj_size=2, num_layers=2, bidirectional=True),
    "lstm_projected_without_bias": partial(nn.LSTM, proj_size=2, bias=False),
    "gru": nn.GRU,
    "gru_three_layers_without_bias": partial(nn.GRU, num_layers=3, bias=False),
    "gru_both_directions": partial(nn.GRU, bidirectional=True),
    "rnn_tanh": partial(nn.RNN, num_layers=2),
    "rnn_relu_both_directions": partial(nn.RNN, nonlinearity="relu", bidirectional=True),
}
CELLS = {
    "lstm_cell": nn.LSTMCell,
    "lstm_cell_without_bias": partial(nn.LSTMCell, bias=False),
    "gru_cell": nn.GRUCell,
    "rnn_cell_tanh": nn.RNNCell,
    "rnn_cell_relu": partial(nn.RNNCell, nonlinearity="relu"),
}


def final_states(final, count):
    """[N, ...] from h or (h, c) of shape [layers, N, ...]."""
    states = final if isinstance(final, tuple) else (final,)
    return torch.cat([state.transpose(0, 1).flatten(1) for state in states], 1)


class Network(nn.Module):
    """A recurrent network behind an elementwise stem; its outputs, final states or both are the network's output."""

    def __init__(self, make, batch_first, used):
        super().__init__()
        self.gain, self.rnn = nn.Parameter(torch.tensor([1.3])), make(4, 3, batch_first=batch_first)
        self.batch_first, self.used = batch_first, used

    def forward(self, x):  # [N, T, 4]
        x = torch.sin(self.gain * x)
        outputs, final = self.rnn(x if self.batch_first else x.transpose(0, 1))
        outputs = (outputs if self.batch_first else outputs.transpose(0, 1))[:, :, 0]
        return {
            "outputs": lambda: outputs,
            "states": lambda: final_states(final, len(x))[:, ::2],
            "both": lambda: outputs.sum(1, keepdim=True) + final_states(final, len(x))[:, 1::3],
        }[self.used]()


class Steps(nn.Module):
    """A cell applied to a learned initial state."""

    def __init__(self, make):
        super().__init__()
        self.cell, self.initial = make(4, 3), nn.Parameter(torch.rand(1, 3))

    def forward(self, x):
        state = self.initial.expand(len(x), -1)
        state = (state, state.sin()) if isinstance(self.cell, nn.LSTMCell) else state
        for x_t in x.unbind(1):
            state = self.cell(x_t, state)
        return torch.cat(state, 1) if isinstance(state, tuple) else state


def problem(model, X=None) -> Problem:
    torch.manual_seed(0)
    model = model.double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.7)
    X = torch.randn(3, 2, 4, dtype=torch.float64) if X is None else X
    with torch.no_grad():
        return Problem(model, X, LOSS["mse_sum"].target(model(X).shape), LOSS["mse_sum"])


def assert_everything_right(case):
    compute(case, *[extension() for extension, _, _ in QUANTITIES], SqrtGGNExact(), check=True)
    for _, field, naive in QUANTITIES:
        assert_fields(case, field, naive(case))
    ggn = oracle.ggn(case)
    for key, p in case.parameters().items():
        V = p.sqrt_ggn_exact.flatten(2)
        assert_close(torch.einsum("vnp,vnq->npq", V, V), ggn[key], label=key)


@pytest.mark.parametrize("used", ["outputs", "states", "both"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_network_equals_brute_force(name, batch_first, used):
    assert_everything_right(problem(Network(NETWORKS[name], batch_first, used)))


@pytest.mark.parametrize("name", CELLS)
def test_cell_equals_brute_force(name):
    assert_everything_right(problem(Steps(CELLS[name])))


def no_replay(*_):
    raise AssertionError("the recurrence was written out")


@pytest.mark.parametrize("name", [*NETWORKS, *CELLS])
def test_closed_form_serves_every_quantity_that_is_no_derivative_of_its_cotangents(
    name, monkeypatch
):
    """Blocks of one step at a time; the replay is there for the Hessian alone."""
    monkeypatch.setattr(recurrent._Network, "replayed", no_replay)
    monkeypatch.setattr(cells, "BLOCK_BYTES", 1)
    X = torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = Network(NETWORKS[name], True, "both") if name in NETWORKS else Steps(CELLS[name])
    case = problem(model, X)
    compute(case, BatchGrad(), SqrtGGNExact(), check=True)
    ggn, gradients = oracle.ggn(case), oracle.grad_batch(case)
    for key, p in case.parameters().items():
        V = p.sqrt_ggn_exact.flatten(2)
        assert_close(torch.einsum("vnp,vnq->npq", V, V), ggn[key], label=key)
        assert_close(p.grad_batch, gradients[key].reshape(p.grad_batch.shape), label=key)


@pytest.mark.parametrize("name", NETWORKS)
def test_output_changed_in_place(name):
    """Where the builtin allows it; the closed form would read the changed output."""

    class Changed(Network):
        def forward(self, x):
            outputs, final = self.rnn(torch.sin(self.gain * x))
            return torch.cat([outputs.mul_(2)[:, :, 0], final_states(final, len(x))], 1)

    assert_everything_right(problem(Changed(NETWORKS[name], True, "both")))


@pytest.mark.parametrize("batch_first", [True, False])
def test_as_many_steps_as_samples(batch_first):
    X = torch.randn(3, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_everything_right(problem(Network(nn.GRU, batch_first, "both"), X))


def test_one_sample_and_one_step():
    assert_everything_right(
        problem(Network(nn.LSTM, True, "both"), torch.ones(1, 1, 4, dtype=torch.float64))
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_batch_without_samples(name):
    """As Poisson sampling may draw."""
    rnn = NETWORKS[name](4, 3, batch_first=True)
    with curvature(SumGradSquared(), batch_size=0):
        output, _ = rnn(torch.randn(0, 5, 4))
        F.mse_loss(output, torch.zeros_like(output), reduction="sum").backward()
    assert not any(p.sum_grad_squared.any() for p in rnn.parameters())


def test_states_from_another_layer():
    """Initial states that are learned, and that depend on the input."""

    class Conditioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.h = (
                nn.LSTM(4, 2, num_layers=2, batch_first=True),
                nn.Parameter(torch.rand(2, 1, 2)),
            )
            self.to_c = nn.Linear(4, 4)

        def forward(self, x):
            h = self.h.repeat(1, len(x), 1)
            c = self.to_c(x[:, 0]).unflatten(1, (2, 2)).transpose(0, 1).contiguous()
            outputs, (h, c) = self.rnn(x, (h, c))
            return torch.cat([outputs[:, -1], h[0], c[1]], 1)

    assert_everything_right(problem(Conditioned()))


@pytest.mark.parametrize(
    "frozen", [["weight_ih_l0"], ["weight_hh_l0", "bias_ih_l0"], ["bias_ih_l0", "bias_hh_l0"]]
)
def test_frozen_weights(frozen):
    case = problem(Network(nn.LSTM, True, "outputs"))
    for name in frozen:
        case.model.rnn.get_parameter(name).requires_grad_(False)
    assert_everything_right(case)
    for name in frozen:
        assert not hasattr(case.model.rnn.get_parameter(name), "grad_batch")


def test_frozen_network_passes_gradients_on():
    case = problem(Network(nn.GRU, True, "outputs"))
    case.model.rnn.requires_grad_(False)
    assert_everything_right(case)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_derived_weights():
    case = problem(
        Network(
            lambda *a, **k: nn.utils.weight_norm(nn.LSTM(*a, **k), "weight_hh_l0"), True, "states"
        )
    )
    assert_everything_right(case)


# --- packed sequences -------------------------------------------------------------------------------------------------

BUILTIN = {
    "LSTM": torch.lstm,
    "GRU": torch.gru,
    "RNN_TANH": torch.rnn_tanh,
    "RNN_RELU": torch.rnn_relu,
}


def packed_call(name, lengths):
    """The function, its arguments and their numbers of parameters, for random sequences, states and weights."""
    torch.manual_seed(0)
    rnn = NETWORKS[name](4, 3).double()
    packed = pack_sequence([torch.randn(length, 4, dtype=torch.float64) for length in lengths])
    layers = rnn.num_layers * (1 + rnn.bidirectional)
    sizes = [rnn.proj_size or 3, *([3] if rnn.mode == "LSTM" else [])]
    states = [torch.randn(layers, len(lengths), size, dtype=torch.float64) for size in sizes]
    hx = states if len(states) > 1 else states[0]
    options = rnn.bias, rnn.num_layers, 0.0, True, rnn.bidirectional
    return BUILTIN[rnn.mode], (packed.data, packed.batch_sizes, hx, rnn._flat_weights, *options)


def packed_terms(function, args, g, replayed=False):
    """What the rule makes of cotangents of all rows, and what the rows are."""
    rule = RULES[function]
    arguments, outputs = rule.bind(args, {}), function(*args)
    whole, owner = rows(outputs, rule.outputs(arguments)), rule.groups(arguments)
    output = None if replayed else (outputs[0].detach(), outputs[0]._version)
    detached = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    call = Call(whole.shape, tuple(k for k in arguments if k.startswith("params")))
    g = torch.randn(g, *whole.shape, dtype=torch.float64)
    return whole, owner, g, rule.function(call, g, **detached, output=output)


@pytest.mark.parametrize("replayed", [False, True], ids=["closed", "replayed"])
@pytest.mark.parametrize("lengths", [[4, 2, 2, 1], [3, 3], [1], [5, 4, 1]], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_terms_of_packed_sequences_are_those_of_every_sequence(name, lengths, replayed):
    """Rows of the output step by step, then of the final states; every sequence's own rows make its gradient."""
    function, args = packed_call(name, lengths)
    whole, owner, g, terms = packed_terms(function, args, 2, replayed)
    assert owner.shape == whole.shape[:1]
    assert owner[: sum(lengths)].bincount().tolist() == lengths
    for k, weight in enumerate(args[3]):
        J = Jacobian(weight, [terms[f"params{k}"]]).per_sample()
        assert J.shape[:2] == (2, len(lengths))
        for v, n in product(range(2), range(len(lengths))):
            (expected,) = torch.autograd.grad(
                whole, weight, g[v] * (owner == n)[:, None], retain_graph=True
            )
            assert_close(J[v, n], expected, label=f"params{k}")


@pytest.mark.parametrize("replayed", [False, True], ids=["closed", "replayed"])
@pytest.mark.parametrize("name", ["lstm_projected", "gru_both_directions"])
def test_kronecker_factors_of_packed_sequences(name, replayed):
    """The inputs are zero where a sequence has no step: A is their sum over the steps that are there."""
    lengths = [4, 2, 1]
    function, args = packed_call(name, lengths)
    *_, terms = packed_terms(function, args, 1, replayed)
    found = KFLR().evaluate(Jacobian(args[3][0], [terms["params0"]]))[1]
    assert_close(found, args[0].T @ args[0] / (len(lengths) * max(lengths)))
    for k in range(len(args[3])):
        x = terms[f"params{k}"].x
        if x is not None:
            beyond = torch.arange(4) >= torch.tensor(lengths)[:, None]
            assert not x[beyond].any()
            assert not terms[f"params{k}"].g[:, beyond].any()


class Packed(Network):
    """The same network, its input packed."""

    def forward(self, x):
        x = torch.sin(self.gain * x)
        packed = pack_padded_sequence(x, [x.shape[1]] * len(x), batch_first=True)
        outputs, final = self.rnn(packed)
        outputs, _ = pad_packed_sequence(outputs, batch_first=True)
        return outputs[:, :, 0].sum(1, keepdim=True) + final_states(final, len(x))[:, 1::3]


@pytest.mark.parametrize("name", NETWORKS)
def test_packed_sequences_of_one_length_equal_brute_force(name):
    assert_everything_right(problem(Packed(NETWORKS[name], True, "both")))


@pytest.mark.parametrize("name", ["lstm_projected_without_bias", "gru_both_directions"])
def test_packed_sequences_of_one_length_are_padded_ones(name):
    case = problem(Packed(NETWORKS[name], True, "both"))
    padded = copy.deepcopy(case)
    padded.model.__class__ = Network
    for each in (case, padded):
        compute(each, DiagHessian(), KFLR())
    for key, p in padded.parameters().items():
        assert_close(case.parameters()[key].diag_h, p.diag_h, label=key)
        for actual, expected in zip(case.parameters()[key].kflr, p.kflr, strict=True):
            assert_close(actual, expected, label=key)


def test_gradients_of_packed_sequences_are_bit_identical():
    torch.manual_seed(0)
    rnn, head = nn.LSTM(4, 3, 2, bidirectional=True), nn.Linear(6, 2)
    sequences = [torch.randn(length, 4) for length in (5, 2, 2, 1)]

    def run(recorded):
        rnn.zero_grad()
        with record() if recorded else contextlib.nullcontext():
            outputs, (h, c) = rnn(pack_sequence(sequences))
            loss = head(outputs.data).square().sum() + h[1].sum() + c[2].square().sum()
        loss.backward()
        return [outputs.data.detach(), h.detach(), *(p.grad.clone() for p in rnn.parameters())]

    assert all(map(torch.equal, run(False), run(True)))


# --- Kronecker factors -----------------------------------------------------------------------------------------------


class WrittenOut(nn.Module):
    """An LSTM of one layer and one direction as a loop over `F.linear`."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x):
        w_ih, w_hh, b_ih, b_hh = (
            getattr(self.rnn, f"{k}_l0") for k in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        h = c = x.new_zeros(len(x), 3)
        outputs = []
        for x_t in x.unbind(1):
            i, f, g, o = (F.linear(x_t, w_ih, b_ih) + F.linear(h, w_hh, b_hh)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return torch.stack(outputs, 1), (h[None], c[None])


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("used", ["outputs", "states", "both"])
def test_kronecker_factors_equal_those_of_the_loop(used, weight_sharing):
    """The steps are shared positions; the cotangents of all outputs are added before they are squared."""
    case = problem(Network(nn.LSTM, True, used))
    loop = copy.deepcopy(case)
    loop.model.rnn = WrittenOut(loop.model.rnn)
    for each in (case, loop):
        compute(each, KFLR(weight_sharing=weight_sharing))
    for key, p in case.model.rnn.named_parameters():
        for actual, expected in zip(p.kflr, getattr(loop.model.rnn.rnn, key).kflr, strict=True):
            assert_close(actual, expected, label=key)


def test_kronecker_product_is_exact_for_one_datum_and_one_step():
    case = problem(Network(nn.GRU, True, "outputs"), torch.randn(1, 1, 4, dtype=torch.float64))
    compute(case, KFLR())
    block = oracle.ggn(case)["rnn.weight_ih_l0"].sum(0)
    assert_close(torch.kron(*case.model.rnn.weight_ih_l0.kflr), block)


# --- recording changes nothing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_gradients_are_bit_identical(name, batch_first, dtype):
    torch.manual_seed(0)
    model = Network(NETWORKS[name], batch_first, "both").to(dtype)
    X = torch.randn(4, 3, 4, dtype=dtype)

    def run(*extensions):
        model.zero_grad()
        with curvature(*extensions):
            output = model(X)
            F.mse_loss(output, torch.zeros_like(output)).backward()
        return [output.detach(), *(p.grad.clone() for p in model.parameters())]

    assert all(map(torch.equal, run(), run(BatchGrad(), DiagGGNExact(), KFLR())))


def test_outputs_may_be_changed_in_place():
    """Where the builtin allows it; strides and version counters are those of the builtin."""
    torch.manual_seed(0)
    rnn, X = nn.GRU(4, 3, batch_first=True).double(), torch.randn(2, 3, 4, dtype=torch.float64)
    plain, _ = rnn(X)
    with record():
        output, _ = rnn(X)
    assert output.stride() == plain.stride()
    assert output._version == plain._version
    assert not output._is_view() or plain._is_view()
    plain.mul_(2).sum().backward()
    expected = rnn.weight_hh_l0.grad.clone()
    rnn.zero_grad()
    output.mul_(2).sum().backward()
    assert torch.equal(rnn.weight_hh_l0.grad, expected)


def test_replay_equals_the_builtin_in_float32():
    """The sum of the per-sample gradients is the builtin's gradient to rounding."""
    torch.manual_seed(0)
    model, X = Network(nn.LSTM, True, "outputs"), torch.randn(8, 20, 4)
    with curvature(BatchGrad()):
        F.mse_loss(model(X), torch.zeros(8, 20)).backward()
    for p in model.parameters():
        torch.testing.assert_close(
            p.grad_batch.sum(0), p.grad, rtol=1e-4, atol=1e-5 * p.grad.abs().max().item()
        )


def test_terms_are_made_when_the_builtin_has_freed_its_memory(monkeypatch):
    events, backpropagated = [], recurrent._Network.backpropagated
    watched = lambda *args: events.append("terms") or backpropagated(*args)  # noqa: E731
    monkeypatch.setattr(recurrent._Network, "backpropagated", watched)
    rnn = nn.LSTM(4, 3)
    for p in rnn.parameters():
        p.register_hook(lambda g: events.append("gradient"))
    with curvature(BatchGrad()):
        F.mse_loss(rnn(torch.randn(2, 5, 4))[0].transpose(0, 1), torch.zeros(5, 2, 3)).backward()
    assert events == ["gradient", "terms", *["gradient"] * 3]
    torch.testing.assert_close(rnn.weight_hh_l0.grad_batch.sum(0), rnn.weight_hh_l0.grad)


def test_gram_matrices_of_what_both_weights_share_are_made_once(monkeypatch):
    made, gram = [], ghost_norms._gram
    monkeypatch.setattr(ghost_norms, "_gram", lambda x: made.append(x.shape) or gram(x))
    case = problem(Network(lambda i, _, **options: nn.LSTM(i, 10, **options), True, "outputs"))
    compute(case, BatchL2Grad())
    assert sorted(made) == [(3, 4, 2), (3, 10, 2), (3, 40, 2)]
    for key, norms in oracle.batch_l2(case).items():
        assert_close(case.parameters()[key].batch_l2, norms, label=key)


def test_backward_to_some_of_the_weights():
    """The others' quantities are those of the whole pass."""
    case = problem(Network(nn.LSTM, True, "outputs"))
    expected, params = oracle.grad_batch(case), case.parameters()
    with curvature(BatchGrad()):
        case.loss.function(case.model(case.X), case.y).backward(inputs=[params["rnn.bias_hh_l0"]])
    for key in ("rnn.weight_ih_l0", "rnn.weight_hh_l0", "rnn.bias_ih_l0", "rnn.bias_hh_l0"):
        assert_close(
            params[key].grad_batch, expected[key].reshape(params[key].grad_batch.shape), label=key
        )


def test_nothing_recorded_survives_the_backward_pass():
    rnn, X = nn.GRU(4, 3, num_layers=2), torch.randn(2, 5, 4)
    with curvature(BatchGrad(), DiagGGNExact()):
        output, _ = rnn(X.sin())
        alive = StorageWeakRef(output.untyped_storage())
        loss = F.mse_loss(output.transpose(0, 1), torch.zeros(5, 2, 3))
        del output
        loss.backward()
    assert alive.expired()


def test_nothing_is_left_without_trainable_weights():
    rnn = nn.LSTM(4, 3).requires_grad_(False)
    with record():
        output, _ = rnn(torch.randn(2, 3, 4, requires_grad=True))
    assert marks(output.grad_fn) is None or marks(output.grad_fn).use is None
    assert "_Parts" not in output.grad_fn.name()


# --- refused ---------------------------------------------------------------------------------------------------------


def test_dropout_between_layers_is_right():
    """Its masks are hidden in the op: the op itself is passed sample by sample."""
    model = Network(partial(nn.GRU, num_layers=2, dropout=0.5), True, "outputs")
    X = torch.randn(3, 2, 4)
    with curvature(BatchGrad()):
        output = model(X)
        losses = (output - 0.3).square().mean(1)
        losses.mean().backward(retain_graph=True)
    for name, p in model.named_parameters():
        rows = [torch.autograd.grad(loss / 3, p, retain_graph=True)[0] for loss in losses]
        torch.testing.assert_close(p.grad_batch, torch.stack(rows), msg=name)
    assert_everything_right(problem(model.eval()))


def test_input_changed_in_place_is_found():
    rnn, X = nn.GRU(4, 3, batch_first=True), torch.randn(3, 2, 4)
    with curvature(BatchGrad()):
        loss = F.mse_loss(rnn(X)[0][:, -1], torch.zeros(3, 3))
        X.zero_()
        with pytest.raises(RuntimeError, match="in-place"):
            loss.backward()
