"""Gradients that vanish, of some samples or up to rounding errors: no row of zeros is taken for a mixture."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from private_sums import change
from torch import nn

from lightning_curv import curvature
from lightning_curv.extensions import BatchGrad
from lightning_curv.terms.jacobian import Jacobian

N, D, C = 4, 5, 3


class Dead(nn.Module):
    """Some samples reach no unit of the first layer."""

    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(D, 4), nn.Linear(4, C)

    def forward(self, x):
        return self.head((self.a(x) * (x[:, :1] > 0)).relu())


class Choice(nn.Module):
    """A hard choice whose gradient is that of a soft one."""

    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(D, 4), nn.Linear(4, C)

    def forward(self, x):
        return self.head(F.gumbel_softmax(self.a(x), hard=True))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "layer norm of two": lambda: nn.Sequential(nn.Linear(D, 2), nn.LayerNorm(2), nn.Linear(2, C)),
    "plain layer norm of two": lambda: nn.Sequential(
        nn.Linear(D, 2), nn.LayerNorm(2, bias=False), nn.Linear(2, C)
    ),
    "layer norm of one": lambda: nn.Sequential(nn.Linear(D, 1), nn.LayerNorm(1), nn.Linear(1, C)),
    "group norm of two": lambda: nn.Sequential(
        nn.Linear(D, 4), nn.GroupNorm(2, 4), nn.Linear(4, C)
    ),
    "dead rows": Dead,
    "saturated": lambda: nn.Sequential(nn.Linear(D, 4), nn.Hardtanh(-1e-3, 1e-3), nn.Linear(4, C)),
    "hard choices": Choice,
}
LOSSES = {
    "cross entropy": F.cross_entropy,
    "by hand": lambda z, y: -z.log_softmax(-1).gather(-1, y[:, None]).mean(),
    "tiny": lambda z, y: 1e-17 * F.cross_entropy(z, y),
    "dead rows": lambda z, y: (1 - z.gather(-1, y[:, None])).relu().mean(),
}


def draw(name, seed):
    torch.manual_seed(seed)
    return NETWORKS[name]().double(), torch.randn(N, D, dtype=torch.float64), torch.randint(C, (N,))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_that_vanish_are_right(name, loss, seed):
    for check in (False, True):
        model, x, y = draw(name, seed)
        with curvature(BatchGrad(), check=check):
            LOSSES[loss](model(x), y).backward()
        scale = max(float(p.grad.abs().max()) for p in model.parameters())
        for p in model.parameters():
            torch.testing.assert_close(p.grad_batch.sum(0), p.grad, atol=1e-11 * scale, rtol=1e-9)
        for n in range(N) if name != "hard choices" else ():
            alone = torch.autograd.grad(
                LOSSES[loss](model(x[n : n + 1]), y[n : n + 1]) / N, [*model.parameters()]
            )
            for p, g in zip(model.parameters(), alone, strict=True):
                torch.testing.assert_close(p.grad_batch[n], g, atol=1e-11 * scale, rtol=1e-9)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "hard choices"])
def test_private_sums_change_by_the_clip_norm_at_most(name):
    model, x, y = draw(name, 0)
    for loss in LOSSES.values():
        assert (
            change(model, lambda model, x, y, loss=loss: loss(model(x), y), (x, y), 0.1) < 1 + 1e-9
        )


def test_the_check_still_fails_where_small_gradients_are_wrong(monkeypatch):
    total = Jacobian.total
    monkeypatch.setattr(
        Jacobian, "total", lambda self: total(self) * (2 if self.parameter.shape == (2, D) else 1)
    )
    model = nn.Sequential(nn.Linear(D, 2), nn.Tanh(), nn.Linear(2, C)).double()
    with torch.no_grad():
        model[2].weight.mul_(1e-9)
    with pytest.raises(RuntimeError, match="add up"), curvature(BatchGrad(), check=True):
        F.cross_entropy(
            model(torch.randn(N, D, dtype=torch.float64)), torch.arange(N) % C
        ).backward()
