"""Step sizes from curvature along the directions of other optimizers: values, safety, resumption."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_curv import CurvatureStepSize, DPOptimizer, KFACOptimizer, curvature
from lightning_curv.extensions import JacobianExact, JacobianMC
from lightning_curv.extensions.columns import ExactGGN, MonteCarloGGN
from lightning_curv.optimizers import curvature_step_size
from lightning_curv.optimizers.curvature.part import JacobianPart
from lightning_curv.optimizers.step_size.step_length import StepLength, WindowMean, falls_by

OPTIMIZERS = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.1),
}


def problem(samples=24, seed=0, dtype=torch.float64):
    # In bfloat16 versions of torch draw different numbers.
    drawn = torch.promote_types(dtype, torch.float32)
    x = torch.randn(samples, 4, dtype=drawn, generator=torch.Generator().manual_seed(seed)).to(
        dtype
    )
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def wrapped(net, name="adamw", **settings):
    return CurvatureStepSize(OPTIMIZERS[name](net.parameters()), **settings)


def backward(net, optimizer, x, y, loss=F.cross_entropy, seed=0):
    optimizer.zero_grad()
    generator = torch.Generator().manual_seed(seed)
    with curvature(*optimizer.required_extensions(), generator=generator):
        value = loss(net(x), y)
        value.backward()
    return value


def train(net, optimizer, steps, batch=problem, loss=F.cross_entropy, schedule=None):
    """Losses of steps on fresh batches; what is drawn follows from the number of the step alone."""
    losses = []
    for step in steps:
        value = backward(net, optimizer, *batch(seed=step), loss, step)
        optimizer.step(loss=value)
        if schedule is not None:
            schedule.step()
        losses.append(value.item())
    return losses


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def brute_force(net, x, y, d):
    """Slope -gᵀd and curvature dᵀGd of the mean cross-entropy, G by forward-mode differentiation."""
    params = {name: p.detach().clone() for name, p in net.named_parameters()}
    parts = d.split([p.numel() for p in params.values()])
    tangents = {name: part.view(params[name].shape) for name, part in zip(params, parts)}
    logits, change = torch.func.jvp(
        lambda values: torch.func.functional_call(net, values, (x,)), (params,), (tangents,)
    )
    p = logits.softmax(1)
    slope = ((p - F.one_hot(y, 3)) * change).sum(1).mean()
    variance = (p * change**2).sum(1) - (p * change).sum(1) ** 2
    return -float(slope), float(variance.mean())


class Told(StepLength):
    """Keeps what the optimizer finds."""

    def __init__(self):
        super().__init__()
        self.slopes, self.back = [], []

    def next(self, slope, square, loss=None):
        self.slopes.append((slope, self.own.latest * square, square))
        return super().next(slope, square, loss)

    def look_back(self, slope, square, rate):
        self.back.append((slope, self.held_out.latest * square, square))
        super().look_back(slope, square, rate)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_slopes_and_curvatures_are_those_of_brute_force(name):
    """Along the direction on its own batch, and along the last update on the next one."""
    net = network()
    optimizer = wrapped(net, name, curvature="exact")
    told = optimizer.step_length = Told()
    update = None
    for step in range(4):
        x, y = problem(seed=step)
        before = copy.deepcopy(net)
        train(net, optimizer, [step])
        if update is not None:
            slope, curved = brute_force(before, x, y, update)
            found = pytest.approx((slope, curved, float(update @ update)), rel=1e-8)
            assert told.back[-1] == found
        update = flat(net.parameters()) - flat(before.parameters())
        direction = update / optimizer.last_step["learning_rate"]
        slope, curved = brute_force(before, x, y, direction)
        assert told.slopes[-1] == pytest.approx(
            (slope, curved, float(direction @ direction)), rel=1e-8
        )
    assert len(told.back) == 3


def test_directions_are_the_steps_of_the_optimizer_inside_at_learning_rate_one():
    net = network()
    optimizer = wrapped(net, "sgd")
    momentum = 0.0
    for step in range(3):
        before = flat(net.parameters())
        value = backward(net, optimizer, *problem(seed=step))
        momentum = 0.9 * momentum + flat(p.grad for p in net.parameters())
        optimizer.step(loss=value)
        moved = flat(net.parameters()) - before
        torch.testing.assert_close(moved, -optimizer.last_step["learning_rate"] * momentum)


def test_the_curvature_of_a_part_is_that_of_these_samples_as_if_there_were_no_others():
    """The mean over all parts is that of the batch; one part is the GGN of its samples."""
    net, (x, y) = network(), problem()
    d = [torch.randn(p.shape, dtype=torch.float64) for p in net.parameters()]

    def along(extension, x, y, seed=0):
        with curvature(extension, generator=torch.Generator().manual_seed(seed)):
            F.cross_entropy(net(x), y).backward()
        products = sum(getattr(p, extension.savefield).dot(v) for p, v in zip(net.parameters(), d))
        return float(products.square().sum())

    whole = along(JacobianExact(), x, y)
    assert whole == pytest.approx(brute_force(net, x, y, flat(d))[1], rel=1e-9)
    chosen = torch.randperm(24, generator=torch.Generator().manual_seed(3))[:5]
    part = along(JacobianPart(ExactGGN(), 5), x, y, seed=3)
    assert part == pytest.approx(brute_force(net, x[chosen], y[chosen], flat(d))[1], rel=1e-9)
    assert along(JacobianPart(ExactGGN(), 24), x, y) == pytest.approx(whole, rel=1e-12)
    pairs = {
        round(along(JacobianPart(ExactGGN(), 2), x[:3], y[:3], seed), 12) for seed in range(20)
    }
    assert len(pairs) == 3
    whole = along(JacobianExact(), x[:3], y[:3])
    assert sum(pairs) / 3 == pytest.approx(whole, rel=1e-9)


def test_targets_are_drawn_from_the_model_by_the_generator():
    net, (x, y) = network(), problem()
    found = []
    for extension in (JacobianMC(), JacobianPart(MonteCarloGGN(), 64)):
        with curvature(extension, generator=torch.Generator().manual_seed(5)):
            F.cross_entropy(net(x), y).backward()
        jacobian = getattr(net[0].weight, extension.savefield)
        found.append(jacobian.dot(torch.ones(8, 4, dtype=torch.float64)))
    assert torch.equal(*found)


def test_rates_are_those_of_the_mean_models():
    """Spelled out for three steps along directions of squared length 4, with other numbers each."""
    rule = StepLength()
    rule.own.measure(8.0, 4.0)
    first = rule.next(6.0, 4.0)
    assert first == pytest.approx(0.3 * (6 / 4) / (8 / 4))
    square = 4 * first**2
    rule.held_out.measure(3.0 * first**2, square)
    # the slope at the end of the update, uphill
    rule.look_back(-0.4 * 4 * first**2, square, first)
    rule.own.measure(4.0, 4.0)
    second = rule.next(2.0, 4.0)
    own = (6 / 4 + 2 / 4) / (8 / 4 + 4 / 4)
    held_out = first * (3.0 / 4 - 0.4) / (3.0 / 4)
    assert second == pytest.approx(1.3 * (0.1 * own + 0.9 * held_out))
    assert 0.5 * first < second < 1.1 * first
    rule.look_back(-1.0 * second, 4 * second**2, second)
    third = rule.next(2.0, 1.0)  # a direction half as long: the length may fall by half
    assert third == pytest.approx(0.5 * second * 2)


def test_no_step_promises_more_than_the_loss_is_worth():
    rule = StepLength()
    rule.own.measure(1e-30, 1.0)
    assert rule.next(5.0, 1.0, loss=2.0) == pytest.approx(0.3 * 2.0 / 5.0)
    rule.add_loss(7.0)
    rule.held_out.measure(1e-30, 1.0)
    rule.length = 0.8
    rule.look_back(1.0, 1.0, 1.0)
    assert rule.next(20.0, 1.0, loss=-2.0) == pytest.approx(1.3 * 7.0 / 20.0)
    # Of a batch that promises next to nothing the mean of all still does: here 25 / 3.
    rule.length = 1.0
    assert rule.next(1e-9, 1.0, loss=-2.0) == pytest.approx(1.3 * 7.0 / (25.0 / 3))


@pytest.mark.parametrize("worth", [0.0, 0.5, 4.0])
@pytest.mark.parametrize("slope", [0.3, 3.0])
@pytest.mark.parametrize("curvature", [0.0, 1e-3, 2.0])
def test_a_rate_falls_by_no_more_than_a_worth(worth, slope, curvature):
    rate = falls_by(worth, slope, curvature)
    fall = rate * slope - rate**2 * curvature / 2
    if slope**2 >= 2 * curvature * worth:
        assert fall == pytest.approx(worth)
        # The first of the two rates at which it does: before the minimum.
        assert not curvature or rate <= slope / curvature
    else:
        assert fall < worth


def test_a_step_grows_by_a_tenth_at_most_and_never_beyond_its_own_model():
    rule = StepLength()
    rule.own.measure(1.0, 1.0)
    rates = []
    for _ in range(60):
        rates.append(rule.next(1.0, 1.0))
        rule.held_out.measure(1.0, 1.0)
        rule.look_back(100.0, 1.0, rates[-1])
    assert rates[0] == pytest.approx(0.3)
    assert rates[1] == pytest.approx(0.33)
    assert rates[-1] == pytest.approx(1.3)


def test_means_span_all_of_the_first_values_and_half_of_many():
    mean = WindowMean()
    values = [mean.add(float(value)) for value in range(20)]
    assert values == pytest.approx([value / 2 for value in range(20)])
    for _ in range(2000):
        mean.add(7.0)
    assert mean.value == pytest.approx(7.0, abs=1e-3)
    assert mean.count == 2020


def test_curvature_is_measured_in_every_step_of_the_first_two_intervals_and_then_every_interval():
    net = network()
    optimizer = wrapped(net, interval=3)
    asked = []
    for step in range(14):
        asked.append(bool(optimizer.required_extensions()))
        train(net, optimizer, [step])
    assert [step for step, asks in enumerate(asked) if asks] == [0, 1, 2, 3, 4, 5, 6, 9, 12]
    assert optimizer.steps == 14


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_training_needs_no_learning_rate(name, dtype):
    net = network(dtype)
    losses = train(net, wrapped(net, name), range(60), lambda seed: problem(24, seed, dtype))
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])


def test_the_learning_rate_of_the_optimizer_inside_does_not_matter():
    ends = []
    for lr in (1e-4, 10.0):
        net = network()
        train(net, CurvatureStepSize(torch.optim.SGD(net.parameters(), lr=lr)), range(5))
        ends.append(flat(net.parameters()))
    assert torch.equal(*ends)


def test_learning_rates_of_groups_are_weights():
    net = network()
    groups = [{"params": net[0].parameters(), "lr": 1e-4}, {"params": net[2].parameters()}]
    optimizer = CurvatureStepSize(torch.optim.SGD(groups, lr=1e-3))
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 1.0])
    before = [p.detach().clone() for p in net.parameters()]
    train(net, optimizer, [0])
    ratios = [
        ((old - p) / p.grad).mean().item() / optimizer.last_step["learning_rate"]
        for old, p in zip(before, net.parameters())
    ]
    assert ratios == pytest.approx([0.1, 0.1, 1.0, 1.0])


def test_several_optimizers_make_one_direction():
    net = network()
    inner = [
        torch.optim.SGD(net[0].parameters(), lr=1.0, momentum=0.9),
        torch.optim.AdamW(net[2].parameters(), lr=1.0, weight_decay=0.0),
    ]
    optimizer = CurvatureStepSize(inner)
    before = copy.deepcopy(net)
    train(net, optimizer, [0])
    rate = optimizer.last_step["learning_rate"]
    torch.testing.assert_close(net[0].weight, before[0].weight - rate * net[0].weight.grad)
    torch.testing.assert_close(
        net[2].weight, before[2].weight - rate * net[2].weight.grad.sign(), rtol=1e-4, atol=1e-4
    )
    assert inner[0].state is inner[1].state is optimizer.state
    assert [group for one in inner for group in one.param_groups] == optimizer.param_groups
    with pytest.raises(ValueError, match=r"Expected one optimizer inside .*, found 2"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


def test_weight_decay_is_decoupled_and_in_no_direction():
    plain, decayed = network(), network()
    one = CurvatureStepSize(torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9))
    other = CurvatureStepSize(
        torch.optim.SGD(decayed.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5)
    )
    start = flat(plain.parameters())
    train(plain, one, [0])
    train(decayed, other, [0])
    rate = one.last_step["learning_rate"]
    assert other.last_step["learning_rate"] == rate
    torch.testing.assert_close(
        flat(decayed.parameters()), flat(plain.parameters()) - 0.5 * rate * start
    )
    assert other.param_groups[0]["weight_decay"] == 0.5


def test_a_schedule_is_a_factor():
    whole, half = network(), network()
    one, other = wrapped(whole), wrapped(half)
    torch.optim.lr_scheduler.LambdaLR(other, lambda step: 0.5)
    start = flat(whole.parameters())
    train(whole, one, [0])
    train(half, other, [0])
    torch.testing.assert_close(
        flat(half.parameters()) - start, (flat(whole.parameters()) - start) / 2
    )
    assert other.param_groups[0]["lr"] == 0.5


def test_a_cosine_schedule_to_zero_ends_well():
    net = network()
    optimizer = wrapped(net)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    train(net, optimizer, range(25), schedule=schedule)
    assert all(p.isfinite().all() for p in net.parameters())


def test_frozen_and_unused_parameters_stay():
    net = network()
    unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    net[0].bias.requires_grad_(False)
    bias = net[0].bias.clone()
    optimizer = CurvatureStepSize(torch.optim.AdamW([*net.parameters(), unused]))
    train(net, optimizer, range(3))
    net[0].bias.requires_grad_(True)
    assert torch.equal(net[0].bias, bias)
    assert torch.equal(unused, torch.ones(3))
    train(net, optimizer, range(3, 6))  # one more parameter moves now
    assert not torch.equal(net[0].bias, bias)


def test_groups_can_be_added_between_steps():
    net = network()
    optimizer = CurvatureStepSize(torch.optim.SGD(net[2].parameters(), lr=0.1))
    train(net, optimizer, range(2))
    optimizer.add_param_group({"params": list(net[0].parameters()), "lr": 0.5})
    before = net[0].weight.clone()
    train(net, optimizer, range(2, 4))
    assert not torch.equal(net[0].weight, before)
    assert optimizer.optimizers[0].param_groups is optimizer.param_groups


def test_micro_batches_make_the_step_of_their_union():
    whole, parts = network(), network()
    one, other = (wrapped(net, curvature="exact") for net in (whole, parts))
    other.curvature_scale = 3
    for step in range(4):
        x, y = problem(seed=step)
        train(whole, one, [step])
        other.zero_grad()
        for k, rows in enumerate(torch.arange(24).split(8)):
            extensions = other.required_extensions() if k == 2 else other.accumulated_extensions()
            with curvature(*extensions):
                (F.cross_entropy(parts(x[rows]), y[rows]) / 3).backward()
            if k < 2:
                other.accumulate()
        other.step()
    torch.testing.assert_close(flat(whole.parameters()), flat(parts.parameters()))
    assert one.steps == other.steps == 4


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_is_the_same_bit_for_bit(name, tmp_path):
    whole, part = network(torch.float32), network(torch.float32)
    batch = lambda seed: problem(24, seed, torch.float32)  # noqa: E731
    one, other = wrapped(whole, name, interval=2), wrapped(part, name, interval=2)
    train(whole, one, range(7), batch)
    torch.save([whole.state_dict(), one.state_dict()], tmp_path / "checkpoint")
    saved_net, saved = torch.load(tmp_path / "checkpoint", weights_only=True)
    part.load_state_dict(saved_net)
    other.load_state_dict(saved)
    copies = pickle.loads(pickle.dumps((whole, one)))
    expected = train(whole, one, range(7, 16), batch)
    assert train(part, other, range(7, 16), batch) == expected
    assert train(*copies, range(7, 16), batch) == expected
    assert torch.equal(flat(whole.parameters()), flat(part.parameters()))
    assert (
        one.state_dict()["step_size"]["step_length"]
        == (other.state_dict()["step_size"]["step_length"])
    )


def test_a_checkpoint_of_the_optimizer_inside_gives_its_directions():
    net = network()
    plain = OPTIMIZERS["sgd"](net.parameters())
    F.cross_entropy(net(problem()[0]), problem()[1]).backward()
    plain.step()
    optimizer = wrapped(net, "sgd")
    with pytest.warns(RuntimeWarning, match="without the state of CurvatureStepSize"):
        optimizer.load_state_dict(plain.state_dict())
    buffer = plain.state[net[0].weight]["momentum_buffer"]
    assert torch.equal(optimizer.state[net[0].weight]["momentum_buffer"], buffer)
    assert optimizer.param_groups[0]["lr"] == 1.0
    train(net, optimizer, range(3))


def test_gradients_that_are_not_finite_undo_the_step_before():
    net = network()
    optimizer = wrapped(net)
    train(net, optimizer, range(3))
    before = flat(net.parameters())
    train(net, optimizer, [3])
    rate = optimizer.last_step["learning_rate"]
    backward(net, optimizer, *problem(seed=4))
    net[0].weight.grad[0, 0] = float("nan")
    optimizer.step()
    torch.testing.assert_close(flat(net.parameters()), before)
    assert optimizer.last_step == {"learning_rate": 0.0}
    backward(net, optimizer, *problem(seed=5))
    net[0].weight.grad[0, 0] = float("inf")
    with pytest.warns(RuntimeWarning, match=r"inf or NaN in the gradients of .*step is skipped"):
        optimizer.step()
    train(net, optimizer, [6])
    assert 0 < optimizer.last_step["learning_rate"] < 0.7 * rate
    assert optimizer.steps == 5


def test_a_loss_far_above_the_others_undoes_the_step_before():
    net = network()
    optimizer = wrapped(net)
    train(net, optimizer, range(5))
    before = flat(net.parameters())
    train(net, optimizer, [5])
    backward(net, optimizer, *problem(seed=6))
    optimizer.step(closure=lambda: 1e3)
    torch.testing.assert_close(flat(net.parameters()), before)


def test_a_slope_far_steeper_uphill_undoes_the_step_before():
    """A parabola, and a step a hundred times too long."""
    x = nn.Parameter(torch.tensor([[1.0]], dtype=torch.float64))
    optimizer = CurvatureStepSize(torch.optim.SGD([x], lr=1.0), curvature="exact")
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)

    def step():
        optimizer.zero_grad()
        with curvature(*optimizer.required_extensions()):
            F.mse_loss(F.linear(one, x), zero).backward()
        optimizer.step()

    step()
    after_one = x.item()
    assert after_one == pytest.approx(1 - 0.3)
    optimizer.step_length.length *= 100
    step()
    assert abs(x.item()) > 5
    step()
    assert x.item() == pytest.approx(after_one)
    for _ in range(60):
        step()
    assert abs(x.item()) < 1e-3


def test_a_gradient_scaler_skips_and_unscales():
    net = network(torch.float32)
    optimizer = wrapped(net, "adamw")
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    plain = network(torch.float32)
    other = wrapped(plain, "adamw")
    for step in range(4):
        x, y = problem(24, step, torch.float32)
        optimizer.zero_grad()
        optimizer.curvature_scale = 1 / scaler.get_scale()
        generator = torch.Generator().manual_seed(step)
        with curvature(*optimizer.required_extensions(), generator=generator):
            scaler.scale(F.cross_entropy(net(x), y)).backward()
        if step == 2:
            net[0].weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        if step != 2:
            train(plain, other, [step], lambda seed: problem(24, seed, torch.float32))
    assert optimizer.steps == 3
    torch.testing.assert_close(flat(net.parameters()), flat(plain.parameters()))


HOSTILE = {
    "raw targets": (lambda x: x.sum(1, keepdim=True) + 1e4, F.mse_loss, 1.0),
    "raw inputs": (lambda x: x.argmax(1) % 3, F.cross_entropy, 1e3),
    "saturated": (lambda x: torch.zeros(len(x), dtype=torch.long), F.cross_entropy, 1.0),
    "absolute": (lambda x: x.sum(1, keepdim=True), F.l1_loss, 1.0),
}


@pytest.mark.parametrize("samples", [1, 24])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.filterwarnings("ignore:.*empirical Fisher")
def test_nothing_diverges(kind, name, samples):
    target, loss, scale = HOSTILE[kind]
    torch.manual_seed(0)
    outputs = 1 if loss in (F.mse_loss, F.l1_loss) else 3
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, outputs))
    optimizer = wrapped(net, name)

    def batch(seed):
        x, _ = problem(samples, seed, torch.float32)
        return scale * x, target(x)

    x, _ = problem(200, 1000, torch.float32)
    with torch.no_grad():
        before = loss(net(scale * x), target(x))
    train(net, optimizer, range(80), batch, loss)
    # One sample says next to nothing of the others: there the loss may rise, but not explode.
    most = {1: 10 * before, 24: before}[samples]
    with torch.no_grad():
        assert loss(net(scale * x), target(x)) <= most


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_batches_with_rare_heavy_samples_are_learned_from(name, seed):
    """What condemns a step is evidence too: else only batches without such samples would count."""

    def batch(seed):
        x = torch.randn(64, 30, generator=torch.Generator().manual_seed(seed))
        return x, (x[:, :1] > 2.3).float()

    def weighted(logits, y):
        return F.binary_cross_entropy_with_logits(logits, y, pos_weight=torch.tensor(200.0))

    torch.manual_seed(seed)
    hidden = nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()
    net = nn.Sequential(*hidden, nn.Linear(64, 1))
    whole = [torch.cat(parts) for parts in zip(*(batch(1000 + k) for k in range(20)))]
    with torch.no_grad():
        before = weighted(net(whole[0]), whole[1])
    train(net, wrapped(net, name), range(150 * seed, 150 * seed + 150), batch, weighted)
    with torch.no_grad():
        assert weighted(net(whole[0]), whole[1]) < before / 2


def test_samples_that_influence_each_other_are_taken_as_they_are():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = wrapped(net, max_samples=8)
    losses = train(net, optimizer, range(40), lambda seed: problem(24, seed, torch.float32))
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])


def test_without_curvature_a_step_says_what_is_missing():
    net = network()
    optimizer = wrapped(net)
    F.cross_entropy(net(problem()[0]), problem()[1]).backward()
    with pytest.raises(RuntimeError, match="CurvatureStepSize needs new curvature for step 0"):
        optimizer.step()


def test_sharded_parameters_are_refused(monkeypatch):
    """Their inner products are those of the parts of one process."""
    net = network()
    optimizer = wrapped(net)
    backward(net, optimizer, *problem())
    monkeypatch.setattr(curvature_step_size, "is_sharded", lambda param: param.ndim == 2)
    before = flat(net.parameters())
    with pytest.raises(TypeError, match="expects whole parameters in every process, found sharded"):
        optimizer.step()
    assert torch.equal(flat(net.parameters()), before)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda params: torch.optim.LBFGS(params), "needs no closure, found LBFGS"),
        (lambda params: KFACOptimizer(params), "by the gradient alone, found KFACOptimizer"),
        (
            lambda params: DPOptimizer(torch.optim.SGD(params, lr=0.1)),
            "by the gradient alone, found DPOptimizer",
        ),
        (lambda params: params[0], "an optimizer or a sequence of some, found"),
    ],
)
def test_optimizers_without_a_direction_are_refused(build, text):
    with pytest.raises(TypeError, match=text):
        CurvatureStepSize(build(list(network().parameters())))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"interval": 0}, "`interval` must be an integer of at least 1, found 0"),
        ({"max_samples": 0}, "`max_samples` must be an integer of at least 1, found 0"),
        ({"curvature": "none"}, "`curvature` must be one of 'mc', 'exact', found 'none'"),
    ],
)
def test_settings_are_checked(settings, text):
    with pytest.raises(ValueError, match=text):
        wrapped(network(), **settings)
