"""Kinds of models that published applications train, with random data: what the callback meets without being told."""

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

N = 6


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Kind(pl.LightningModule):
    """A module with a loss of a batch; `parts` are the gradients of its samples one by one, if there are any.

    `left_out` names what cannot be had, `by` what comes by another path than samples of their own.
    """

    left_out, by = (), ()

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.build()

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def one(self, batch, n):
        """The batch of sample n alone."""
        return [tensor[n : n + 1] for tensor in batch]


class Quantiles(Kind):
    """Forecasts with a quantile loss, by hand."""

    def build(self):
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    def batch(self, seed):
        return [random(N, 4, seed=seed), random(N, 1, seed=seed + 50)]

    def loss(self, batch):
        error = batch[1] - self.net(batch[0])
        levels = torch.tensor([0.1, 0.5, 0.9])
        return torch.maximum(levels * error, (levels - 1) * error).sum(1).mean()


class Autoencoder(Kind):
    """The evidence lower bound of a variational autoencoder, with its Kullback-Leibler term."""

    def build(self):
        self.encoder, self.decoder = (
            nn.Linear(5, 4),
            nn.Sequential(nn.Linear(2, 6), nn.Softplus(), nn.Linear(6, 5)),
        )

    def batch(self, seed):
        return [random(N, 5, seed=seed), random(N, 2, seed=seed + 50)]

    def loss(self, batch):
        mean, spread = self.encoder(batch[0]).chunk(2, 1)
        code = torch.distributions.Normal(mean, F.softplus(spread))
        latent = code.loc + code.scale * batch[1]
        likelihood = torch.distributions.Normal(self.decoder(latent), 1.0).log_prob(batch[0]).sum(1)
        prior = torch.distributions.Normal(torch.zeros(2), torch.ones(2))
        return (torch.distributions.kl_divergence(code, prior).sum(1) - likelihood).mean()


class Contrastive(Kind):
    """Two views of every sample, BatchNorm, and a loss that compares all with all."""

    coupled = True

    def build(self):
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    def batch(self, seed):
        return [random(N, 4, seed=seed), random(N, 4, seed=seed + 50)]

    def loss(self, batch):
        z = F.normalize(torch.cat([self.net(batch[0]), self.net(batch[1])]), dim=1)
        similar = (z @ z.T / 0.5).masked_fill(torch.eye(2 * N, dtype=torch.bool), -1e9)
        return F.cross_entropy(similar, torch.arange(2 * N).roll(N))


class ContrastiveByHand(Contrastive):
    """The same loss in ops of its own."""

    def loss(self, batch):
        z = F.normalize(torch.cat([self.net(batch[0]), self.net(batch[1])]), dim=1)
        similar = (z @ z.T / 0.5).masked_fill(torch.eye(2 * N, dtype=torch.bool), -1e9)
        return -similar.log_softmax(1)[torch.arange(2 * N), torch.arange(2 * N).roll(N)].mean()


class Normed(Kind):
    """A classifier with BatchNorm."""

    coupled = True

    def build(self):
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))

    def batch(self, seed):
        return [random(N, 4, seed=seed), torch.arange(N) % 3]

    def loss(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])


class Packed(Kind):
    """An LSTM on packed sequences of several lengths."""

    def build(self):
        self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 1)

    def batch(self, seed):
        return [
            random(N, 5, 3, seed=seed),
            torch.tensor([5, 2, 3, 4, 1, 3]),
            random(N, 1, seed=seed + 50),
        ]

    def loss(self, batch):
        x, lengths, y = batch
        _, (last, _) = self.lstm(
            pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        )
        return F.mse_loss(self.head(last[-1]), y)


class Graphs(Kind):
    """Message passing on graphs of several sizes, whose nodes are rows of one tensor."""

    def build(self):
        self.embed, self.pass_on, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 1)

    def batch(self, seed):
        sizes = torch.tensor([2, 4, 3, 2, 3, 5])
        graph = torch.repeat_interleave(torch.arange(N), sizes)
        start = (sizes.cumsum(0) - sizes)[graph]
        nodes = torch.arange(len(graph))
        following = start + (nodes - start + 1) % sizes[graph]  # a ring
        return [
            random(len(graph), 3, seed=seed),
            torch.stack([nodes, following]),
            graph,
            random(N, 1, seed=seed + 50),
        ]

    def one(self, batch, n):
        x, (source, target), graph, y = batch
        mine, first = graph == n, int((graph < n).sum())
        return [
            x[mine],
            torch.stack([source[mine] - first, target[mine] - first]),
            graph[mine] - n,
            y[n : n + 1],
        ]

    def loss(self, batch):
        x, (source, target), graph, y = batch
        h = torch.tanh(self.embed(x))
        h = h + torch.zeros_like(h).index_add(0, target, torch.tanh(self.pass_on(h))[source])
        return F.mse_loss(self.head(h.new_zeros(len(y), 4).index_add(0, graph, h)), y)


class Masked(Kind):
    """A masked language model, whose loss leaves out all other tokens: as many masked ones in every sample."""

    def build(self):
        self.embedding, self.attend = (
            nn.Embedding(9, 8),
            nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True),
        )
        self.head = nn.Linear(8, 9)

    def batch(self, seed):
        words = torch.randint(1, 9, (N, 5), generator=torch.Generator().manual_seed(seed))
        hidden = torch.zeros(N, 5, dtype=torch.bool)
        hidden[torch.arange(N), torch.arange(N) % 5] = True
        return [words.masked_fill(hidden, 0), words.masked_fill(~hidden, -100)]

    def loss(self, batch):
        scores = self.head(self.attend(self.embedding(batch[0])))
        return F.cross_entropy(scores.flatten(0, 1), batch[1].flatten(), ignore_index=-100)


def normed_batch():
    """For the doctor, in the precision of a new module."""
    x, y = Normed().batch(0)
    return [x.float(), y]


KINDS = {
    kind.__name__: kind
    for kind in (
        Quantiles,
        Autoencoder,
        Contrastive,
        ContrastiveByHand,
        Normed,
        Packed,
        Graphs,
        Masked,
    )
}
