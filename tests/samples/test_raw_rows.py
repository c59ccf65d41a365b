"""Rows of the raw batch that are moved before the first parameter: whose they are is known all the same."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from lightning_curv import curvature, record
from lightning_curv.extensions import BatchDiagGGNExact, BatchGrad
from lightning_curv.recording.provenance import roots_of
from lightning_curv.rules.fallback import FallbackWarning

N, T, D, C = 4, 3, 5, 3
LENGTHS = torch.tensor([2, 3, 1, 3])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(D, D), nn.Linear(D, C)

    def forward(self, x):
        return self.head(self.a(x).tanh())


def masked(x, y, lengths):
    mask = torch.arange(T) < lengths[:, None]
    yield x[mask], y[mask]


def masked_select_of_scaled(x, y, lengths):
    mask = torch.arange(T) < lengths[:, None]
    yield (2 * x)[mask] - 1, y[mask]


def numbered(x, y, lengths):
    mask = torch.arange(T) < lengths[:, None]
    index = mask.flatten().nonzero().squeeze(1)
    yield x.flatten(0, 1)[index], y.flatten().index_select(0, index)


def time_major(x, y, lengths):
    yield x.transpose(0, 1).reshape(-1, D), y.T.reshape(-1)


def time_major_first_steps(x, y, lengths):
    yield x.permute(1, 0, 2)[:2].flatten(0, 1), y.T[:2].flatten()


def views(x, y, lengths):
    yield torch.cat([x[:, 0], 0.9 * x[:, 1]]), torch.cat([y[:, 0], y[:, 1]])


def noisy_views(x, y, lengths):
    yield torch.cat([x[:, 0], x[:, 0] * 0.5]), y[:, 0].repeat(2)


def stacked_views(x, y, lengths):
    yield torch.stack([x[:, 0], x[:, 2]]).flatten(0, 1), torch.stack([y[:, 0], y[:, 2]]).flatten()


def stacked_inside(x, y, lengths):
    yield (
        torch.stack([x[:, 0], x[:, 2]], 1).flatten(0, 1),
        torch.stack([y[:, 0], y[:, 2]], 1).flatten(),
    )


def repeated(x, y, lengths):
    yield x[:, 0].repeat(2, 1), y[:, 0].repeat(2)


def repeated_in_place(x, y, lengths):
    yield x[:, 0].repeat_interleave(2, 0), y[:, 0].repeat_interleave(2)


def flipped(x, y, lengths):
    yield x[:, 0].flip(0), y[:, 0].flip(0)


def rolled(x, y, lengths):
    yield x.roll(1, 0).flatten(0, 1), y.roll(1, 0).flatten()


def unequal(x, y, lengths):
    index = (
        torch.tensor([3, 0, 0, 2, 1, 3, 3])[: 2 * len(x)]
        if len(x) == N
        else torch.zeros(0, dtype=torch.long)
    )
    index = index if len(x) == N else torch.zeros(COUNTS[int(y[0, 0])], dtype=torch.long)
    yield x[:, 0].index_select(0, index), y[:, 0].index_select(0, index)


COUNTS = {0: 2, 1: 1, 2: 1, 3: 3}


def ragged_cat(x, y, lengths):
    yield (
        torch.cat([x[i, :length] for i, length in enumerate(lengths.tolist())]),
        torch.cat([y[i, :length] for i, length in enumerate(lengths.tolist())]),
    )


def one_by_one(x, y, lengths):
    for i in range(len(x)):
        yield x[i : i + 1, 0], y[i : i + 1, 0]


def one_by_one_sequences(x, y, lengths):
    for i in range(len(x)):
        yield x[i], y[i]


def unbatched(x, y, lengths):
    yield from zip(x[:, 0], y[:, 0])


def unbound(x, y, lengths):
    for row, target in zip(x.unbind(), y.unbind()):
        yield row[:2], target[:2]


def chunks(x, y, lengths):
    yield from zip(x[:, 0].chunk(2), y[:, 0].chunk(2))


def splits(x, y, lengths):
    sizes = [1, 3] if len(x) == N else [len(x)]
    yield from zip(x.split(sizes), y.split(sizes))


def reversed_chunks(x, y, lengths):
    yield from reversed(list(zip(x[:, 1].tensor_split(2), y[:, 1].tensor_split(2))))


def vmapped(x, y, lengths):
    yield torch.func.vmap(lambda row: 2 * row[0])(x), y[:, 0]


def vmapped_moved(x, y, lengths):
    yield torch.func.vmap(lambda row: 2 * row[0])(x.flip(0)), y[:, 0].flip(0)


def moved_after_vmap(x, y, lengths):
    yield torch.func.vmap(lambda row: 2 * row[0])(x).flip(0), y[:, 0].flip(0)


def exchanged_in_place(x, y, lengths):
    rows, targets = x[:, 0].clone(), y[:, 0].clone()
    half = len(x) // 2
    rows[:half], targets[:half] = x[len(x) - half :, 0], y[len(x) - half :, 0]
    rows[len(x) - half :], targets[len(x) - half :] = x[:half, 0], y[:half, 0]
    yield rows, targets


def copied_as_they_are(x, y, lengths):
    yield x.contiguous().to(x.dtype).flip(0)[:, 0], y.contiguous().flip(0)[:, 0]


def shifted_by_a_step(x, y, lengths):
    rows, targets = torch.zeros_like(x), torch.zeros_like(y)
    rows[:, 1:], targets[:, 1:] = x[:, :-1], y[:, :-1]
    yield rows, targets


def with_an_end(x, y, lengths):
    mask = torch.arange(T + 1) <= lengths[:, None]
    end, last = x.new_ones(len(x), 1, D), y.new_zeros(len(y), 1)
    yield torch.cat([x, end], 1)[mask], torch.cat([y, last], 1)[mask]


CASES: dict[str, Callable] = {
    function.__name__: function
    for function in (
        masked,
        masked_select_of_scaled,
        numbered,
        time_major,
        time_major_first_steps,
        views,
        noisy_views,
        stacked_views,
        stacked_inside,
        repeated,
        repeated_in_place,
        flipped,
        rolled,
        unequal,
        ragged_cat,
        one_by_one,
        one_by_one_sequences,
        unbatched,
        unbound,
        chunks,
        splits,
        reversed_chunks,
        vmapped,
        vmapped_moved,
        moved_after_vmap,
        exchanged_in_place,
        copied_as_they_are,
        shifted_by_a_step,
        with_an_end,
    )
}


def cross_entropy(z, y):
    return F.cross_entropy(z.reshape(-1, C), y.reshape(-1), reduction="sum")


def by_hand(z, y):
    return -z.log_softmax(-1).gather(-1, y[..., None]).sum()


def squares(z, y):
    return (z - F.one_hot(y, C)).square().sum()


LOSSES = {"cross_entropy": cross_entropy, "by_hand": by_hand, "squares": squares}


def draw() -> tuple[Model, Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    y = torch.arange(N)[:, None].repeat(1, T)  # tells `unequal` whose row it is; C classes below
    return Model().double(), torch.randn(N, T, D, dtype=torch.float64), y, LENGTHS


def total(name, loss, model, x, y, lengths):
    """The sum over the pieces that the case runs."""
    return sum(
        LOSSES[loss](model(rows), targets % C) for rows, targets in CASES[name](x, y, lengths)
    )


def gradients(scalar, model):
    found = torch.autograd.grad(scalar, list(model.parameters()), retain_graph=True)
    return dict(zip(dict(model.named_parameters()), found))


@pytest.mark.filterwarnings("ignore::lightning_curv.rules.fallback.FallbackWarning")
@pytest.mark.parametrize("size", [N, None])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_each_row_of_the_batch(name, loss, size):
    model, x, y, lengths = draw()
    with curvature(BatchGrad(), batch_size=size):
        (total(name, loss, model, x, y, lengths) / N).backward()
    alone = [
        total(name, loss, model, x[n : n + 1], y[n : n + 1], lengths[n : n + 1]) / N
        for n in range(N)
    ]
    rows = [gradients(scalar, model) for scalar in alone]
    for key, p in model.named_parameters():
        torch.testing.assert_close(
            p.grad_batch, torch.stack([row[key] for row in rows]), msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize(
    "name", ["masked", "time_major", "views", "unequal", "one_by_one", "splits"]
)
def test_ggn_diagonals_are_those_of_each_row_of_the_batch(name):
    model, x, y, lengths = draw()
    with curvature(BatchDiagGGNExact(), batch_size=N):
        (total(name, "cross_entropy", model, x, y, lengths) / N).backward()
    for n in range(N):
        expected = {key: torch.zeros_like(p) for key, p in model.named_parameters()}
        for rows, _ in CASES[name](x[n : n + 1], y[n : n + 1], lengths[n : n + 1]):
            z = model(rows)
            for row in z.flatten(0, -2):
                p = row.detach().softmax(-1)
                H = (p.diag() - p.outer(p)) / N
                columns = [gradients(entry, model) for entry in row]
                for key in expected:
                    J = torch.stack([column[key].flatten() for column in columns])
                    expected[key] += torch.einsum("cp,cd,dp->p", J, H, J).reshape(
                        expected[key].shape
                    )
        for key, p in model.named_parameters():
            torch.testing.assert_close(p.diag_ggn_exact_batch[n], expected[key])


def test_rows_that_another_batch_moves_otherwise_are_assigned_anew():
    """Nothing in the graph tells two orders of the raw rows apart."""
    model, x, y, _ = draw()
    for _ in range(3):
        index = torch.randperm(2 * N) % N
        with curvature(BatchGrad(), batch_size=N):
            by_hand(
                model(x[:, 0].index_select(0, index)), y[:, 0].index_select(0, index) % C
            ).backward()
        for n in range(N):
            alone = gradients(2 * by_hand(model(x[n, 0]), y[n, 0] % C), model)
            for key, p in model.named_parameters():
                torch.testing.assert_close(p.grad_batch[n], alone[key])


def test_loops_over_pieces_warn_of_nothing(recwarn):
    model, x, y, lengths = draw()
    with curvature(BatchGrad(), batch_size=N):
        total("one_by_one", "cross_entropy", model, x, y, lengths).backward()
    assert not [w for w in recwarn if issubclass(w.category, FallbackWarning)]


def test_rows_that_an_op_moves_by_values_are_not_guessed():
    model, x, y, _ = draw()
    with curvature(BatchGrad(), batch_size=N):
        rows = model(x[:, :2].flatten(0, 1).sort(0).values)
        loss = cross_entropy(rows, y[:, :2].flatten().sort(0).values % C)
        with pytest.raises(NotImplementedError, match="sample"):
            loss.backward()


def test_the_rest_of_a_constant_is_not_guessed_from_single_rows():
    """Of rows that are written one by one nobody knows whose those are that follow."""
    model, x, y, lengths = draw()
    with curvature(BatchGrad(), batch_size=N):
        rows, targets = torch.zeros_like(x), torch.zeros_like(y)
        for i, length in enumerate(lengths.tolist()):
            place = (i + 1) % N
            rows[place, :length], targets[place, :length] = x[i, :length], y[i, :length]
        loss = by_hand(model(rows), targets % C)
        with pytest.raises(NotImplementedError, match="sample"):
            loss.backward()


def exchanged(x):
    rows = x.clone()
    rows[:2] = x[2:]
    rows[2:].add_(x[2:])
    return rows


def added_in_place(x):
    rows = x.clone()
    rows[:2].add_(rows[2:])
    return rows


WHITENED = torch.randn(D, D, dtype=torch.float64)
POOLED: dict[str, Callable[[Tensor], Tensor]] = {
    "centred": lambda x: x - x.mean(0),
    "scaled": lambda x: x / x.abs().max(),
    "standardized": lambda x: (x - x.mean()) / x.std(),
    "ranked": lambda x: x.softmax(0),
    "accumulated": lambda x: x.cumsum(0),
    "related": lambda x: (x[:, 0] @ x[:, 0].T) @ x[:, 0],
    "whitened": lambda x: x[:, 0] @ (x[:, 0].T @ x[:, 0]),
    "distances": lambda x: torch.cdist(x[:, 0], x[:, 0]) @ x[:, 0],
    "normalized": lambda x: F.batch_norm(x[:, 0], None, None, training=True),
    "most": lambda x: x[:, 0] - x[:, 0].amax(0, keepdim=True),
    "stand-in": lambda x: torch.where(x[:, 0] > 0, x[:, 0], x[:, 0].mean(0)),
    "beside the first": lambda x: x - x[0],
    "beside the next": lambda x: x[:, 0] - torch.stack([x[1, 0], x[2, 0], x[3, 0], x[0, 0]]),
    "mean of a list": lambda x: x - sum(x) / len(x),
    "copied and centred": lambda x: x.contiguous() - x.contiguous().mean(0),
    "above the mean": lambda x: torch.where(x > x.mean(), x, -x),
    "numbered": lambda x: torch.unique(x[:, 0].round(), return_inverse=True)[1].double(),
    "ranks": lambda x: x[:, 0].argsort(0).argsort(0).double(),
    "binned": lambda x: torch.bucketize(x[:, 0], x[:, 0, 0].sort().values).double(),
    "differences": lambda x: torch.diff(x, dim=0, append=x[:1]),
    "differences from zero": lambda x: torch.diff(x, dim=0, prepend=0 * x[:1].detach()),
    "einsum": lambda x: torch.einsum("nd,md,mk->nk", x[:, 0], x[:, 0], x[:, 0]),
    "frequencies": lambda x: torch.fft.fft(x, dim=0).real,
    "spread": lambda x: x / torch.linalg.vector_norm(x, dim=0),
    "largest": lambda x: x[:, 0].topk(4, 0)[0],
    "quantile": lambda x: x - torch.quantile(x, 0.5, dim=0),
    "singular vectors": lambda x: torch.linalg.svd(x[:, 0], full_matrices=False)[0] @ WHITENED[:4],
    "several products": lambda x: torch.linalg.multi_dot([x[:, 0], x[:, 0].T, x[:, 0]]),
    "summed by index": lambda x: (
        x - x.new_zeros(1, T, D).index_add(0, torch.zeros(N, dtype=torch.long), x)
    ),
    "summed in place": lambda x: x.clone().index_add_(0, torch.tensor([0, 1]), x[2:]),
    "written in place": lambda x: exchanged(x),
    "added in place": lambda x: added_in_place(x),
    "smoothed": lambda x: F.conv1d(x[:, 0].T[:, None], torch.ones(1, 1, 3).to(x), padding=1)[
        :, 0
    ].T.contiguous(),
    "inside of vmap": lambda x: torch.func.vmap(lambda row: row - x.mean(0))(x),
    "rows inside of vmap": lambda x: torch.func.vmap(lambda row: (row - x).sum(0))(x),
}
APART: dict[str, Callable[[Tensor], Tensor]] = {
    "centred": lambda x: x - x.mean(1, keepdim=True),
    "scaled": lambda x: x / x.flatten(1).abs().amax(1)[:, None, None],
    "mean of time-major": lambda x: x.transpose(0, 1).mean(0),
    "ranked": lambda x: x.softmax(-1),
    "accumulated": lambda x: x.cumsum(1),
    "related": lambda x: (x @ x.mT) @ x,
    "whitened": lambda x: x @ WHITENED,
    "normalized": lambda x: F.layer_norm(x, (D,)),
    "stand-in for nothing": lambda x: torch.where(x.abs() >= 0, x, x.mean((0, 1))),
    "stand-in for all": lambda x: torch.where(x.abs() < 0, x.mean(), x),
    "differences": lambda x: torch.diff(x, dim=1, prepend=0 * x[:, :1].detach()),
    "einsum": lambda x: torch.einsum("ntd,nsd,nsk->ntk", x, x, x),
    "frequencies": lambda x: torch.fft.fft(x, dim=1).real,
    "spread": lambda x: F.normalize(x, dim=-1),
    "largest": lambda x: x.topk(2, 1)[0],
    "ranks": lambda x: x.argsort(1).double(),
    "centres": lambda x: torch.cdist(x[:, 0], WHITENED),
    "inside of vmap": lambda x: torch.func.vmap(lambda row: row - row.mean(0))(x),
    "evaluated": lambda x: F.batch_norm(
        x[:, 0], torch.zeros(D).to(x), torch.ones(D).to(x), training=False
    ),
}


@pytest.mark.parametrize("name", POOLED)
def test_statistics_of_the_raw_batch_are_refused(name):
    model, x, y, _ = draw()
    with curvature(BatchGrad(), batch_size=N):
        loss = squares(
            z := model(POOLED[name](x)),
            y[:, 0].reshape(-1, *[1] * (z.ndim - 2)).expand(z.shape[:-1]) % C,
        )
        with pytest.raises(NotImplementedError, match="the batch"):
            loss.backward()


@pytest.mark.parametrize(
    "mix", [lambda x: x - x.mean(1, keepdim=True), lambda x: x[0] - x[0].mean(0)]
)
def test_statistics_of_a_batch_that_is_second_are_refused(mix):
    model, x, y, _ = draw()
    with curvature(BatchGrad(), batch_size=N):
        loss = squares(model(mix(x[None, :, 0])).reshape(N, C), y[:, 0] % C)
        with pytest.raises(NotImplementedError, match="the batch"):
            loss.backward()


def test_a_model_that_is_mapped_over_a_statistic_of_the_batch_is_refused():
    model, x, y, _ = draw()
    with curvature(BatchGrad(), batch_size=N):
        loss = cross_entropy(
            torch.func.vmap(lambda row: model(row - x[:, 0].mean(0)))(x[:, 0]), y[:, 0] % C
        )
        with pytest.raises(NotImplementedError, match="the batch"):
            loss.backward()


def test_rows_that_a_model_is_mapped_over_are_those_of_the_batch():
    """The targets tell, in whatever order they are."""
    model, x, y, _ = draw()
    order = torch.tensor([2, 0, 3, 1])
    with curvature(BatchGrad(), batch_size=N):
        cross_entropy(torch.func.vmap(model)(x[:, 0])[order], y[order, 0] % C).backward()
    for n in range(N):
        alone = gradients(cross_entropy(model(x[n, 0]), y[n, 0] % C), model)
        for key, p in model.named_parameters():
            torch.testing.assert_close(p.grad_batch[n], alone[key])


def test_functions_of_others_are_called_once():
    model, x, y, _ = draw()
    calls = []

    def halved(rows):
        if has_torch_function((rows,)):
            return handle_torch_function(halved, (rows,), rows)
        calls.append(rows)
        return rows / 2

    with curvature(BatchGrad(), batch_size=N):
        cross_entropy(model(halved(x[:, 0])), y[:, 0] % C).backward()
    assert len(calls) == 1


def test_trials_leave_random_numbers_as_they_are():
    model, x, _, _ = draw()
    torch.manual_seed(3)
    plain = F.gumbel_softmax(x, dim=-1), torch.rand(3)
    torch.manual_seed(3)
    with curvature(BatchGrad(), batch_size=N):
        noisy, after = F.gumbel_softmax(x, dim=-1), torch.rand(3)
        torch.diff(x, dim=0)
        model(noisy).square().sum().backward()
    torch.testing.assert_close((noisy, after), plain)
    assert len(model.a.weight.grad_batch) == N


@pytest.mark.parametrize("name", APART)
def test_statistics_of_single_rows_are_not_refused(name):
    model, x, _, _ = draw()
    with curvature(BatchGrad(), batch_size=N):
        model(APART[name](x)).square().sum().backward()
    for n in range(N):
        alone = gradients(model(APART[name](x[n : n + 1])).square().sum(), model)
        for key, p in model.named_parameters():
            torch.testing.assert_close(p.grad_batch[n], alone[key])


SQUARE = torch.rand(4, 4, 2)  # as many samples as steps: which axis moved shows in numbers alone


@pytest.mark.parametrize(
    ("reads", "move", "plain"),
    [
        (torch.rand(N, 1, D), lambda x: x.flatten(1), True),
        (torch.rand(N, T, D), lambda x: x.reshape(N, -1), False),  # the batch may be second
        (torch.rand(N, D), lambda x: x.unsqueeze(1), True),
        (torch.rand(N, D), lambda x: x.flip(1), True),
        (torch.rand(N, D), lambda x: x.flip(0), False),
        (torch.rand(N, T, D), lambda x: x.flatten(0, 1), False),
        (torch.rand(N, T, D), lambda x: x.transpose(0, 1), False),
        (SQUARE, lambda x: x.transpose(0, 1), False),
        (SQUARE, lambda x: x.transpose(1, 2).flip(1).flatten(0, 1), False),
        (torch.rand(N, D), lambda x: x.roll(1, 0).flatten(1), False),
        (torch.rand(N, D), lambda x: x.roll(1, 0).roll(-1, 0), False),
    ],
)
def test_rows_have_numbers_of_their_own_only_where_something_moved_them(reads, move, plain):
    for _ in range(2):  # the second time from memory
        with record():
            moved = move(reads.clone())
        assert (roots_of(moved).numbers is None) == plain
