"""What lets samples influence each other, or learns from them beside the private optimizer, is refused by name.

What does neither is let through, whatever random numbers it draws.
"""

import random

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from packages import needs
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from lightning_curv.callbacks import PrivacyCallback
from lightning_curv.callbacks.private_training.equal_randomness import EqualRandomness
from lightning_curv.callbacks.private_training.independence import Gradients, compare
from lightning_curv.optimizers import DPOptimizer

needs("dp_accounting")


class Data(Dataset):
    def __init__(self, size=60, outlier=False):
        generator = torch.Generator().manual_seed(0)
        self.X = torch.randn(size, 4, generator=generator)
        self.X[7] *= 1 + 99 * outlier

    def __len__(self):
        return len(self.X)

    def __getitem__(self, i):
        return self.X[i], i % 3


class Net(pl.LightningModule):
    """A classifier, with hooks for what goes wrong."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def training_step(self, batch, batch_idx):
        return self.loss(*batch)

    def loss(self, x, y):
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        inner = torch.optim.SGD(self.net.parameters(), lr=0.1)
        return DPOptimizer(inner, clip_norm=0.5, noise_multiplier=1.0, noise_seed=0)


def fit(module, *callbacks, loader=None, **settings):
    callback = PrivacyCallback(**{"delta": 1e-3, "seed": 1, **settings})
    callback.accountant.epsilon = lambda delta: 0.0  # takes long, and is not what this is about
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[callback, *callbacks],
    )
    trainer.fit(module, loader or DataLoader(Data(), batch_size=12, shuffle=True))
    return trainer


def with_loss(loss, **attributes):
    module = Net()
    for name, value in attributes.items():
        module.register_buffer(name, value) if isinstance(value, torch.Tensor) else setattr(
            module, name, value
        )
    module.loss = loss.__get__(module)
    return module


# --- samples that influence each other -------------------------------------------------------------------------------


def scaled_by_the_largest(self, x, y):
    return F.cross_entropy(self.net(x / x.abs().max()), y)


def zeroed_by_an_outlier(self, x, y):
    return F.cross_entropy(self.net(x), y) * (x.abs().max() < 20)


def weighted_from_the_second_step_on(self, x, y):
    weight = torch.tensor([1.0, 5.0, 20.0]) if self.trainer.global_step else None
    return F.cross_entropy(self.net(x), y, weight=weight)


def same_norms_other_direction(self, x, y):
    """The sign of all gradients follows one sample: no norm tells."""
    return self.net(x).sum(1).mean() * (1 if x.abs().max() < 20 else -1)


def quantised_by_the_range(self, x, y):
    scale = x.abs().max() / 3
    return F.cross_entropy(self.net((x / scale).round() * scale), y)


def detached_statistics(self, x, y):
    return F.cross_entropy(self.net((x - x.mean(0)) / x.std(0)), y)


def hardest(self, x, y):
    return F.cross_entropy(self.net(x), y, reduction="none").topk(len(x) // 2).values.mean()


def counted(self, x, y):
    return F.cross_entropy(self.net(x), y, reduction="sum") / (y == 0).sum().clamp(min=1)


def mixed_up(self, x, y):
    share, order = 0.3, torch.randperm(len(x))
    return F.cross_entropy(self.net(share * x + (1 - share) * x[order]), y)


def noise_of_the_batch(self, x, y):
    """Random numbers drawn from values of all samples."""
    return F.cross_entropy(self.net(torch.normal(x, x.std().expand_as(x))), y)


COUPLED = [
    scaled_by_the_largest,
    zeroed_by_an_outlier,
    weighted_from_the_second_step_on,
    same_norms_other_direction,
    quantised_by_the_range,
    detached_statistics,
    hardest,
    counted,
    mixed_up,
    noise_of_the_batch,
]


@pytest.mark.parametrize("loss", COUPLED, ids=lambda loss: loss.__name__)
def test_losses_in_which_samples_influence_each_other_are_refused(loss):
    # Samples are drawn for the first: where they do not show it, the last comes.
    reasons = "depends on the other samples|samples mix|divided by the weights of all rows"
    with pytest.raises(Exception, match=reasons):
        fit(
            with_loss(loss), loader=DataLoader(Data(outlier=True), batch_size=60, shuffle=True)
        )  # all in every batch


# --- losses that draw random numbers of their own --------------------------------------------------------------------


def diffusion(self, x, y):
    time = torch.rand(len(x), device=x.device)
    noise = torch.randn_like(x)
    predicted = self.net(x * (1 - time[:, None]) + noise * time[:, None])
    return (predicted - noise[:, :3]).square().mean(1).mean()


def variational(self, x, y):
    mean, spread = self.net(x), self.net(-x)
    drawn = torch.distributions.Normal(mean, spread.exp()).rsample()
    return F.cross_entropy(drawn, y)


def masked(self, x, y):
    return F.cross_entropy(self.net(x * torch.bernoulli(torch.full_like(x, 0.7))), y)


def dropped(self, x, y):
    return F.cross_entropy(self.net(F.dropout(x, 0.5)), y)


def in_place(self, x, y):
    return F.cross_entropy(self.net(x + torch.empty_like(x).uniform_(-1, 1)), y)


def drawn_steps(self, x, y):
    steps = torch.randint(0, 10, (len(x),))
    return (F.cross_entropy(self.net(x), y, reduction="none") * steps).mean()


@pytest.mark.parametrize("loss", [diffusion, variational, masked, dropped, in_place, drawn_steps])
def test_losses_that_draw_random_numbers_are_let_through(loss):
    fit(with_loss(loss))


DRAWS = {
    "rand": lambda x: torch.rand(len(x), 3),
    "time steps": lambda x: torch.randint(10, (len(x),)),
    "per row of a sample": lambda x: torch.randn(3 * len(x), 2),
    "second axis": lambda x: torch.randn(2, len(x)),
    "the same for all": lambda x: torch.randn(5),
    "inside of a function": lambda x: F.gumbel_softmax(x) + F.dropout(x),
    "from values of the sample": lambda x: torch.bernoulli(x.sigmoid()),
    "by a distribution": lambda x: torch.distributions.Normal(x, 1.0).sample(),
    "padded": lambda x: torch.rand(len(x), 4 if len(x) == 8 else 6)[:, :4],
}


@pytest.mark.parametrize("name", DRAWS)
def test_random_numbers_of_a_sample_are_equal_in_parts_of_its_batch(name):
    draw, x, rows = DRAWS[name], torch.randn(8, 3), torch.tensor([1, 4, 7])
    randomness = EqualRandomness(8)
    with randomness:
        whole = draw(x)
    with randomness.again(rows):
        part = draw(x[rows])
    if name == "the same for all":
        expected = whole
    elif name == "second axis":
        expected = whole[:, rows]
    else:
        expected = whole.unflatten(0, (8, -1))[rows].flatten(0, 1)
    torch.testing.assert_close(part, expected)


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: torch.randperm(len(x)).double(),
        lambda x: torch.bernoulli((x - x.mean(0)).sigmoid()),
    ],
)
def test_random_numbers_that_depend_on_the_batch_are_not_made_equal(draw):
    x, rows = torch.randn(40, 3), torch.arange(20)
    randomness = EqualRandomness(40)
    with randomness:
        whole = draw(x)
    with randomness.again(rows):
        part = draw(x[rows])
    assert not torch.equal(part, whole[rows])


def test_other_random_numbers_have_a_switch():
    def drawn_elsewhere(self, x, y):
        return F.cross_entropy(self.net(x + torch.from_numpy(np.random.randn(*x.shape)).float()), y)

    with pytest.raises(Exception, match="depends on the other samples"):
        fit(with_loss(drawn_elsewhere))
    fit(with_loss(drawn_elsewhere), check_independence=False)


def test_a_step_may_leave_out_the_number_of_its_batch():
    class Short(Net):
        def training_step(self, batch):
            return self.loss(*batch)

    fit(Short())


# --- batches that mix samples before the step ------------------------------------------------------------------------


class Sentences(Dataset):
    """Sequences of different lengths."""

    def __len__(self):
        return 60

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        return torch.randn(2 + i % 5, 4, generator=generator), i % 3


def stacked(samples):
    return torch.stack([x for x, _ in samples]), torch.tensor([y for _, y in samples])


def mixup_collate(samples):
    x, y = stacked(samples)
    return 0.6 * x + 0.4 * x[torch.randperm(len(x))], y


def standardising_collate(samples):
    x, y = stacked(samples)
    return (x - x.mean(0)) / x.std(0).clamp(min=0.1), y


def shuffling_labels(samples):
    x, y = stacked(samples)
    return x, y.flip(0)


def augmenting(samples):
    """By the generators of torch, NumPy and Python, sample by sample and for all at once."""
    x, y = stacked(
        [(x + torch.randn(4) * random.random() * np.random.rand(), y) for x, y in samples]
    )
    return x + torch.randn(len(x), 4), y


def padded(samples):
    lengths = torch.tensor([len(x) for x, _ in samples])
    x = pad_sequence([x for x, _ in samples], batch_first=True)
    x = x + torch.rand(x.shape[:2])[..., None]  # augmentation of a padded batch
    return x, torch.tensor([y for _, y in samples]), lengths


def masked_mean(self, x, y, lengths):
    mask = torch.arange(x.shape[1]) < lengths[:, None]
    pooled = (self.net(x) * mask[..., None]).sum(1) / lengths[:, None]
    return F.cross_entropy(pooled, y)


def mean_with_padding(self, x, y, lengths):
    return F.cross_entropy(self.net(x).mean(1), y)


@pytest.mark.parametrize(
    ("collate", "workers"),
    [(mixup_collate, 0), (mixup_collate, 1), (standardising_collate, 0), (shuffling_labels, 0)],
)
def test_collate_functions_that_mix_samples_are_refused(collate, workers):
    loader = DataLoader(Data(), 12, shuffle=True, collate_fn=collate, num_workers=workers)
    with pytest.raises(Exception, match="`collate_fn` or a transfer hook"):
        fit(Net(), loader=loader)


@pytest.mark.parametrize("hook", ["on_before_batch_transfer", "on_after_batch_transfer"])
def test_transfer_hooks_that_mix_samples_are_refused(hook):
    module = Net()
    setattr(module, hook, lambda batch, dataloader_idx: [batch[0] - batch[0].mean(0), batch[1]])
    with pytest.raises(Exception, match="`collate_fn` or a transfer hook"):
        fit(module)


@pytest.mark.parametrize("hook", ["on_before_batch_transfer", "on_after_batch_transfer"])
def test_transfer_hooks_that_act_on_samples_are_let_through(hook):
    module = Net()
    setattr(
        module,
        hook,
        lambda batch, dataloader_idx: [batch[0] + torch.randn_like(batch[0]), batch[1]],
    )
    fit(module)


def test_augmentation_and_padding_are_let_through():
    fit(Net(), loader=DataLoader(Data(), 12, shuffle=True, collate_fn=augmenting))
    fit(with_loss(masked_mean), loader=DataLoader(Sentences(), 12, shuffle=True, collate_fn=padded))


def test_padding_that_the_loss_counts_is_refused():
    with pytest.raises(Exception, match="padding that the loss does not leave out"):
        fit(
            with_loss(mean_with_padding),
            loader=DataLoader(Sentences(), 12, shuffle=True, collate_fn=padded),
        )


# --- what else learns from a batch -----------------------------------------------------------------------------------


def running_statistics(self, x, y):
    return F.cross_entropy(self.net(self.norm(x[:, None]).squeeze(1)), y)


def moving_average(self, x, y):
    self.average.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
    return F.cross_entropy(self.net(x), y)


def moving_average_of_data(self, x, y):
    self.average.data.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
    return F.cross_entropy(self.net(x), y)


def assigned(self, x, y):
    self.average = x.detach().mean(0)
    return F.cross_entropy(self.net(x), y)


def queue(self, x, y):
    self.queue[: len(x)] = x.detach()[:20]
    return F.cross_entropy(self.net(x), y)


def late_average(self, x, y):
    if self.trainer.global_step == 3:  # between the steps that are compared
        self.average += x.detach().mean(0)
    return F.cross_entropy(self.net(x), y)


def counts_samples(self, x, y):
    self.count += len(x)
    return F.cross_entropy(self.net(x), y)


def own_step(self, x, y):
    self.head.weight.grad = None
    F.cross_entropy(self.head(x), y).backward()
    with torch.no_grad():
        self.head.weight -= 0.1 * self.head.weight.grad
    return F.cross_entropy(self.net(x), y)


def own_step_on_private_parameters(self, x, y):
    loss = F.cross_entropy(self.net(x), y)
    self.net[2].bias.data -= 0.1 * x.mean()
    return loss


CHANGING = {
    "norm.running_mean": (
        running_statistics,
        {"norm": nn.InstanceNorm1d(1, track_running_stats=True)},
    ),
    "average": (moving_average, {"average": torch.zeros(4)}),
    "average by .data": (moving_average_of_data, {"average": torch.zeros(4)}),
    "average assigned": (assigned, {"average": torch.zeros(4)}),
    "average later": (late_average, {"average": torch.zeros(4)}),
    "queue": (queue, {"queue": torch.zeros(20, 4)}),
    "count": (counts_samples, {"count": torch.zeros(())}),
    "head.weight": (own_step, {"head": nn.Linear(4, 3)}),
    "net.2.bias by .data": (own_step_on_private_parameters, {}),
}


@pytest.mark.parametrize("check", [True, False], ids=["", "without comparing gradients"])
@pytest.mark.parametrize("name", CHANGING)
def test_state_that_a_batch_changes_is_refused_by_name(name, check):
    loss, attributes = CHANGING[name]
    if not check and ".data" in name:
        return  # found by comparing steps alone
    with pytest.raises(Exception, match=f"`{name.split()[0]}`"):
        fit(
            with_loss(
                loss, **{k: v.clone() if torch.is_tensor(v) else v for k, v in attributes.items()}
            ),
            check_independence=check,
        )


class BatchMeans(pl.Callback):
    """Writes what it saw into the weights."""

    def __init__(self, hook, first=0):
        setattr(self, hook, self.write)
        self.first = first

    @torch.no_grad()
    def write(self, trainer, module, *arguments):
        if trainer.global_step >= self.first:
            batch = next((a for a in arguments if isinstance(a, list)), [torch.ones(1, 4)])
            module.net[0].bias += batch[0].mean()


@pytest.mark.parametrize(
    "hook", ["on_train_batch_end", "on_before_zero_grad", "on_before_backward", "on_after_backward"]
)
@pytest.mark.parametrize("first", [0, 4])
def test_callbacks_that_write_into_the_weights_are_refused(hook, first):
    with pytest.raises(Exception, match=r"something else changed `net\.0\.bias`"):
        fit(Net(), BatchMeans(hook, first))


class AverageOfWeights(pl.Callback):
    def on_train_batch_end(self, trainer, module, *_):
        with torch.no_grad():
            for p, q in zip(module.target.parameters(), module.net.parameters()):
                p.mul_(0.9).add_(q, alpha=0.1)


def target_in_the_step(self, x, y):
    """A target network that follows the weights, as in BYOL."""
    with torch.no_grad():
        for p, q in zip(self.target.parameters(), self.net.parameters()):
            p.mul_(0.9).add_(q, alpha=0.1)
    return (self.net(x) - self.target(x).detach()).square().mean(1).mean()


def target():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).requires_grad_(False)


def counts_steps(self, x, y):
    self.steps += 1
    return F.cross_entropy(self.net(x), y)


def test_state_that_no_data_change_is_let_through():
    fit(with_loss(target_in_the_step, target=target()))
    fit(with_loss(counts_steps, steps=torch.zeros(())))
    module = Net()
    nn.utils.parametrizations.spectral_norm(module.net[2])
    fit(module)
    module = with_loss(Net.loss, target=target())
    with pytest.raises(Exception, match="public_state"):
        fit(module, AverageOfWeights())
    fit(with_loss(Net.loss, target=target()), AverageOfWeights(), public_state=["target.*"])


# --- what is made from a batch, changes it, or learns from it elsewhere -----------------------------------------------


def makes_a_buffer(self, x, y):
    if "mean" not in self._buffers:
        self.register_buffer("mean", x.mean(0))
    return Net.loss(self, x, y)


def fills_an_empty_buffer(self, x, y):
    if self.empty is None and self.trainer.global_step == 3:
        self.empty = x.mean(0)
    return Net.loss(self, x, y)


def makes_a_parameter(self, x, y):
    if self.trainer.global_step == 3 and not hasattr(self, "offset"):
        self.offset = nn.Parameter(x.mean(0))
    return Net.loss(self, x, y)


def makes_a_module(self, x, y):
    if self.trainer.global_step == 3 and not hasattr(self, "head"):
        self.head = nn.Linear(4, 1)
        self.head.weight.data.copy_(x.mean(0)[None])
    return Net.loss(self, x, y)


MAKING = [makes_a_buffer, fills_an_empty_buffer, makes_a_parameter, makes_a_module]


@pytest.mark.parametrize("loss", MAKING, ids=lambda loss: loss.__name__)
def test_state_that_is_made_from_a_batch_is_refused(loss):
    module = with_loss(loss)
    module.register_buffer("empty", None)
    with pytest.raises(Exception, match=r"mean|empty|offset|head\.weight") as error:
        fit(module)
    assert "learns" in str(error.value)


@pytest.mark.parametrize("check_independence", [True, False])
def test_constants_that_are_made_when_they_are_needed_are_let_through(check_independence):
    def waves(self, x, y):
        if not hasattr(self, "waves"):
            self.register_buffer("waves", torch.arange(4.0).cos(), persistent=False)
        return F.cross_entropy(self.net(x * self.waves), y)

    module = with_loss(waves)
    fit(module, check_independence=check_independence)
    assert module.waves[1] == torch.ones(()).cos()


def test_steps_that_write_into_their_batch_are_let_through_and_see_it_once():
    seen = []

    def halved(self, x, y):
        seen.extend(map(tuple, x.tolist()))
        return F.cross_entropy(self.net(x.mul_(0.5)), y)

    fit(with_loss(halved))
    assert seen
    assert set(seen) <= set(map(tuple, Data().X.tolist()))  # a second time: their halves


class InPlace(pl.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        batch[0].add_(5 * batch[0].mean(0))


class Replaced(pl.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        batch[0] = batch[0] + 5 * batch[0].mean(0)


@pytest.mark.parametrize("kind", [InPlace, Replaced])
@pytest.mark.parametrize("place", ["before", "after", "module"])
def test_hooks_that_change_a_batch_where_nothing_compares_are_refused(kind, place):
    module, callbacks = Net(), [PrivacyCallback(delta=1e-3)]
    if place == "module":
        module.on_train_batch_start = lambda batch, batch_idx: kind().on_train_batch_start(
            None, None, batch, batch_idx
        )
    else:
        callbacks.insert(0 if place == "before" else 1, kind())
    trainer = pl.Trainer(
        callbacks=callbacks, accelerator="cpu", logger=False, enable_checkpointing=False
    )
    with pytest.raises(Exception, match="a hook changed it before `training_step`"):
        trainer.fit(module, DataLoader(Data(), batch_size=12, shuffle=True))


@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_train_epoch_start"])
def test_what_learns_between_epochs_is_refused(hook):
    module = Net()

    def learn():
        if module.trainer.global_step:
            module.net[2].bias.data += Data().X.mean()
            module.net[2].bias.add_(0.0)

    setattr(module, hook, torch.no_grad()(learn))
    with pytest.raises(Exception, match=r"after an epoch.*public_state"):
        fit(module)
    setattr(module, hook, torch.no_grad()(learn))
    fit(module, public_state=["net.2.bias"])  # clamped, for instance


class WithMomentum(Net):
    """Whose momentum, or Adam's second moment, may be written to."""

    def __init__(self, inner, place):
        super().__init__()
        self.inner, self.place = inner, place

    def configure_optimizers(self):
        inner = self.inner(self.net.parameters(), lr=0.1)
        return DPOptimizer(inner, clip_norm=0.5, noise_multiplier=1.0, noise_seed=0)

    @torch.no_grad()
    def learn(self, value):
        for state in self.trainer.optimizers[0].optimizer.state.values():
            for tensor in state.values():
                tensor.add_(value)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.place == "step":
            self.learn(loss.detach())
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.place == "afterwards":
            self.learn(batch[0].mean())


INNER = {
    "momentum": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
    "Adam": torch.optim.Adam,
}


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("place", ["step", "afterwards"])
def test_what_learns_in_the_state_of_the_optimizer_is_refused(inner, place):
    with pytest.raises(Exception, match=r"optimizer\.net\.0\.bias\..*public_state"):
        fit(WithMomentum(INNER[inner], place))
    fit(WithMomentum(INNER[inner], place), public_state=["optimizer.*"])
    fit(WithMomentum(INNER[inner], "nowhere"))


@torch.no_grad()
def learned_at_the_end(module):
    module.net[2].bias.add_(Data().X.mean())


class LearnsAtTheEnd(pl.Callback):
    def on_train_end(self, trainer, module):
        learned_at_the_end(module)


@pytest.mark.parametrize("place", ["module", "callback"])
def test_what_learns_at_the_end_of_training_is_refused(place):
    def run(**settings):
        module, callbacks = Net(), [LearnsAtTheEnd()]
        if place == "module":
            module.on_train_end, callbacks = lambda: learned_at_the_end(module), []
        return fit(module, *callbacks, **settings)

    with pytest.raises(Exception, match=r"at the end.*public_state"):
        run()
    run(public_state=["net.2.bias"])  # clamped, for instance


@pytest.mark.parametrize("name", ["StochasticWeightAveraging", "EMAWeightAveraging"])
def test_averages_of_the_released_weights_may_take_their_place(name):
    if not hasattr(pl.callbacks, name):
        pytest.skip(f"a Lightning without `{name}`")
    settings = {"swa_lrs": 0.1, "swa_epoch_start": 1} if name.startswith("Stochastic") else {}
    fit(Net(), getattr(pl.callbacks, name)(device="cpu", **settings))


def test_swaps_of_averaged_weights_for_validation_are_let_through():
    if not hasattr(pl.callbacks, "WeightAveraging"):
        pytest.skip("a Lightning without `WeightAveraging`")
    module = Net()
    module.validation_step = lambda batch, batch_idx: None
    average = pl.callbacks.WeightAveraging(device="cpu")
    callback = PrivacyCallback(delta=1e-3)
    callback.accountant.epsilon = lambda delta: 0.0
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        max_epochs=2,
        callbacks=[average, callback],
        enable_progress_bar=False,
        accelerator="cpu",
        **quiet,
    )
    loader = DataLoader(Data(), batch_size=12, shuffle=True)
    trainer.fit(module, loader, loader)


def test_an_own_backward_pass_that_moves_nothing_is_thrown_away():
    def adversarial(self, x, y):
        x = x.clone().requires_grad_()
        F.cross_entropy(self.net(x), y, reduction="sum").backward()
        return F.cross_entropy(self.net(x.detach() + 0.0 * x.grad), y)

    runs = [with_loss(loss) for loss in (adversarial, Net.loss)]
    for module in runs:
        torch.manual_seed(0)
        fit(module)
    for p, q in zip(runs[0].parameters(), runs[1].parameters()):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize(
    "loss", [Net.loss, diffusion, target_in_the_step], ids=["plain", "diffusion", "target"]
)
def test_checks_change_nothing(loss):
    runs = []
    for check in (True, False):
        module = with_loss(loss, target=target())
        module.target.load_state_dict(module.net.state_dict())
        torch.manual_seed(3)
        random.seed(3)
        fit(module, check_independence=check)
        runs.append([*module.parameters(), torch.rand(1), torch.tensor(random.random())])
    for p, q in zip(*runs):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("clipping", "scale"), [("flat", 0.3), ("per_layer", 0.3), ("automatic", 0.01)]
)
def test_differences_that_no_sum_shows_are_no_dependence(clipping, scale):
    """Gradients that are nothing but what rounding left: of a network minus its copy, for instance."""
    optimizer = DPOptimizer(
        torch.optim.SGD(nn.Linear(2, 2).parameters()), clip_norm=0.3, clipping=clipping
    )
    weights, rows = torch.ones(3, dtype=torch.float64), torch.arange(3)
    parameter = nn.Parameter(torch.zeros(2))

    def gradients(norm):
        norms = torch.tensor([norm, norm, 0.0], dtype=torch.float64)
        return Gradients(norms, [{parameter: torch.tensor([2 * norm, 0.0])}])

    negligible = optimizer.clipping.negligible(2.0**-23)
    assert negligible == pytest.approx(scale * 2.0**-21)
    compare(gradients(0.0), gradients(0.5 * negligible), rows, 0, weights, True, 1e-3, negligible)
    for unlike, below in ((2 * negligible, negligible), (0.5 * negligible, 0.0)):
        with pytest.raises(Exception, match="depends on the other samples"):
            compare(gradients(0.0), gradients(unlike), rows, 0, weights, True, 1e-3, below)
