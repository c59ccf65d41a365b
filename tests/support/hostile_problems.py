"""Small training problems on which steps that trust a model of the curvature too far diverge."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_curv import curvature

Data = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """A network, all of its data, and the loss of outputs and targets.

    Args:
        make: makes network and data from torch's seeded random numbers.
        loss: of outputs and targets, a mean over the samples.
        end: level below which the loss of all data must lie after the last step.
        batch: samples drawn in every step; 0: all.
        steps: how many.
        peak: how many times the first loss no later one may exceed.
        diagonal_peak: the same for diagonal curvature, with its given learning rate.
        settings: of `KFACOptimizer`.
        rate: factor of the learning rate in a step, given the share of all steps that is done.
        given_output: whether the outputs are passed as `output=`, the loss being unknown.
        pretrained: steps of Adam before.
    """

    make: Callable[[], tuple[nn.Module, Data]]
    loss: Loss
    end: float
    batch: int = 32
    steps: int = 50
    peak: float = 3.0
    diagonal_peak: float = 3.0
    settings: tuple[tuple[str, object], ...] = ()
    rate: Callable[[float], float] | None = None
    given_output: bool = False
    pretrained: int = 0


def train(
    problem: Problem,
    optimizer_of: Callable[..., torch.optim.Optimizer],
    seed: int,
    steps: int = 0,
) -> Iterator[float]:
    """Train; the loss of all data before the first step and after every one."""
    torch.manual_seed(seed)
    net, (inputs, targets) = problem.make()
    _pretrain(problem, net, inputs, targets)
    optimizer = optimizer_of(net.parameters(), **dict(problem.settings))
    rates = [group["lr"] for group in optimizer.param_groups]
    draws = torch.Generator().manual_seed(seed)
    labels = torch.Generator().manual_seed(seed)

    def whole() -> float:
        with torch.no_grad():
            return float(problem.loss(net(inputs), targets))

    yield whole()
    for step in range(steps or problem.steps):
        chosen = torch.arange(len(inputs))
        if problem.batch:
            chosen = torch.randperm(len(inputs), generator=draws)[: problem.batch]
        if problem.rate is not None:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * problem.rate(step / problem.steps)
        optimizer.zero_grad()
        extensions = optimizer.required_extensions()
        output = net if problem.given_output else None
        with curvature(*extensions, generator=labels, **({"output": output} if output else {})):
            problem.loss(net(inputs[chosen]), targets[chosen]).backward()
        optimizer.step()
        yield whole()


def _pretrain(problem: Problem, net: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(problem.pretrained):
        optimizer.zero_grad()
        problem.loss(net(inputs), targets).backward()
        optimizer.step()


def layers(*sizes: int, between: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers with an activation between them."""
    net = nn.Sequential()
    for fan_in, fan_out in pairwise(sizes):
        net.extend([nn.Linear(fan_in, fan_out), between()])
    return net[:-1]


def scaled(net: nn.Module, factor: float) -> nn.Module:
    """The network with all parameters multiplied."""
    with torch.no_grad():
        for param in net.parameters():
            param.mul_(factor)
    return net


def regression(
    net: nn.Module, offset: float = 0.0, scale: float = 1.0, inputs: float = 1.0
) -> tuple[nn.Module, Data]:
    """A product and a linear term with noise, of targets with variance about 2."""
    x = torch.randn(400, 10)
    y = x[:, :1] * x[:, 1:2] + x[:, 2:3] + 0.3 * torch.randn(400, 1)
    return net, (inputs * x, offset + scale * y)


def classes(
    net: nn.Module, count: int = 4, spread: float = 1.0, noise: float = 0.0, inputs: float = 1.0
) -> tuple[nn.Module, Data]:
    """Clusters in ten dimensions, some of the labels at random."""
    centers = 2 * torch.randn(count, 10)
    labels = torch.randint(count, (400,))
    x = centers[labels] + spread * torch.randn(400, 10)
    replaced = torch.rand(400) < noise
    labels = torch.where(replaced, torch.randint(count, (400,)), labels)
    return net, (inputs * x, labels)


def mlp(
    *, out: int = 1, width: int = 32, between: Callable[[], nn.Module] = nn.ReLU
) -> nn.Sequential:
    return layers(10, width, width, out, between=between)


# Gaussian negative log-likelihoods with a learned deviation: outputs are (mean, softplus⁻¹ of it).
def forecasts(scale: float = 1.0) -> tuple[nn.Module, Data]:
    """Six steps of waves from the twenty-four before them."""
    net = layers(24, 32, 32, 12)
    waves = torch.sin(torch.arange(300)[:, None] / 5 + torch.arange(30))
    waves = scale * (waves + 0.05 * torch.randn(300, 30))
    return net, (waves[:, :24], waves[:, 24:])


def gaussian(outputs: Tensor, targets: Tensor) -> Tensor:
    mean, deviation = outputs.chunk(2, dim=1)
    return F.gaussian_nll_loss(mean, targets, F.softplus(deviation) ** 2)


class Standardized(nn.Module):
    """Forecasts of windows by their own mean and deviation."""

    def __init__(self) -> None:
        super().__init__()
        self.net = layers(24, 32, 32, 12)

    def forward(self, x: Tensor) -> Tensor:
        mean, deviation = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        return self.net((x - mean) / deviation) * deviation + mean


def forecasts_of_windows() -> tuple[nn.Module, Data]:
    _, data = forecasts()
    return Standardized(), data


def counts(rate: float) -> tuple[nn.Module, Data]:
    """Poisson counts around a rate."""
    x = torch.randn(400, 10)
    y = torch.poisson(rate * (0.5 * x[:, :1] + 0.3 * x[:, 1:2].cos()).exp())
    return mlp(), (x, y)


def log_rates(outputs: Tensor, targets: Tensor) -> Tensor:
    """The Poisson likelihood with its constant, so that no loss is below zero by much."""
    return F.poisson_nll_loss(outputs, targets, full=True)


def rates(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.poisson_nll_loss(F.softplus(outputs), targets, log_input=False, full=True)


def one_hot(size: float) -> tuple[nn.Module, Data]:
    """One of 200 features is large, all others are zero."""
    kind = torch.randint(200, (400,))
    means = torch.randn(200, 1)
    return layers(200, 32, 1), (size * F.one_hot(kind, 200).float(), means[kind])


def scales(exponent: int, classify: bool) -> tuple[nn.Module, Data]:
    """A linear model of twenty features whose scales fall to 10^exponent."""
    scale = torch.logspace(0, exponent, 20)
    z = torch.randn(400, 20)
    y = z @ torch.randn(20, 2) / 20**0.5
    if classify:
        return nn.Linear(20, 2), (z * scale, y.argmax(1))
    return nn.Linear(20, 1), (z * scale, y[:, :1])


def repeated_features() -> tuple[nn.Module, Data]:
    net, (x, y) = regression(layers(32, 32, 1))
    constant = torch.full((400, 2), 5.0)
    return net, (torch.cat([x, x, x, constant], 1), y)


def imbalanced() -> tuple[nn.Module, Data]:
    x = torch.randn(400, 10)
    x[:12, 0] += 4.0
    return mlp(out=2), (x, (torch.arange(400) < 12).long())


def weighted() -> tuple[nn.Module, Data]:
    """Targets carry the weights, which span five orders of magnitude."""
    net, (x, y) = classes(mlp(out=4))
    weights = 10 ** (5 * torch.rand(400) - 4)
    return net, (x, torch.stack([y.float(), weights], 1))


def weighted_classes(outputs: Tensor, targets: Tensor) -> Tensor:
    return (F.cross_entropy(outputs, targets[:, 0].long(), reduction="none") * targets[:, 1]).mean()


class VAE(nn.Module):
    """Logits of the pixels beside mean and log-variance of the code."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = layers(36, 32, 8), layers(4, 32, 36)

    def forward(self, x: Tensor) -> Tensor:
        mean, log_variance = self.encoder(x).chunk(2, 1)
        noise = torch.sin(37 * torch.arange(mean.numel()).view_as(mean))
        code = mean + (0.5 * log_variance).exp() * noise
        return torch.cat([self.decoder(code), mean, log_variance], 1)


def pictures() -> tuple[nn.Module, Data]:
    corner = torch.randint(4, (256, 2))
    grid = torch.arange(6)
    rows = (grid[None, :] - corner[:, :1]).abs() <= 1
    columns = (grid[None, :] - corner[:, 1:]).abs() <= 1
    x = (rows[:, :, None] & columns[:, None]).flatten(1).float()
    return VAE(), (x, x)


def evidence(outputs: Tensor, targets: Tensor) -> Tensor:
    logits, mean, log_variance = outputs.split([36, 4, 4], 1)
    fit = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)
    divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1)
    return (fit + divergence).mean()


def outliers() -> tuple[nn.Module, Data]:
    net, (x, y) = regression(mlp())
    return net, (x, y + torch.distributions.Cauchy(0.0, 0.1).sample(y.shape))


def log_cosh(outputs: Tensor, targets: Tensor) -> Tensor:
    error = outputs - targets
    return (error + F.softplus(-2 * error) - 0.6931471805599453).mean()


def normalized() -> nn.Module:
    parts = [nn.Linear(10, 32), nn.BatchNorm1d(32), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))


def deep(depth: int, between: Callable[[], nn.Module], out: int = 1) -> nn.Sequential:
    return layers(10, *[24] * depth, out, between=between)


MSE: Loss = F.mse_loss
CE: Loss = F.cross_entropy
PROBLEMS: dict[str, Problem] = {
    "gaussian": Problem(forecasts, gaussian, -2.0, batch=64, steps=60, peak=1.5),
    "gaussian_of_windows": Problem(
        forecasts_of_windows, gaussian, -2.0, batch=64, steps=60, peak=1.5
    ),
    "gaussian_small": Problem(
        lambda: forecasts(0.01), gaussian, -4.0, batch=64, steps=60, peak=1.5
    ),
    "gaussian_large": Problem(lambda: forecasts(10.0), gaussian, 2.0, batch=64, steps=60, peak=1.5),
    "poisson_large": Problem(lambda: counts(1000.0), log_rates, 150.0),
    "poisson_rates": Problem(lambda: counts(1000.0), rates, 30.0),
    "saturated": Problem(lambda: classes(scaled(mlp(out=4), 5.0)), CE, 0.02),
    "saturated_late": Problem(lambda: classes(mlp(out=4), spread=0.3), CE, 2e-06, pretrained=200),
    "batch_1": Problem(lambda: regression(mlp()), MSE, 2.2, batch=1),
    "batch_4": Problem(lambda: regression(mlp()), MSE, 1.3, batch=4),
    "batch_16": Problem(lambda: regression(mlp()), MSE, 0.35, batch=16),
    "classes_batch_8": Problem(lambda: classes(mlp(out=4)), CE, 0.05, batch=8),
    "raw_inputs": Problem(lambda: regression(mlp(), inputs=1e3), MSE, 5000.0),
    "raw_inputs_classes": Problem(lambda: classes(mlp(out=4), inputs=1e3), CE, 230.0),
    "raw_targets": Problem(lambda: regression(mlp(), 200.0, 50.0), MSE, 1500.0, batch=16),
    "raw_targets_whole": Problem(lambda: regression(mlp(), 200.0, 50.0), MSE, 20.0, batch=0),
    "far_targets": Problem(lambda: regression(mlp(), 1e4), MSE, 10000.0),
    "one_hot": Problem(lambda: one_hot(100.0), MSE, 0.3),
    "scales_classes": Problem(lambda: scales(-3, True), CE, 0.62, batch=0, steps=60),
    "scales": Problem(lambda: scales(-3, False), MSE, 0.8, batch=100),
    "deep_relu": Problem(lambda: regression(deep(10, nn.ReLU)), MSE, 1.6, steps=60),
    "deep_sigmoid": Problem(lambda: regression(deep(6, nn.Sigmoid)), MSE, 1.6, steps=60),
    "from_zero": Problem(lambda: regression(scaled(mlp(between=nn.Tanh), 0.0)), MSE, 2.3),
    "from_small": Problem(lambda: regression(scaled(mlp(), 0.01)), MSE, 0.4),
    "from_large": Problem(lambda: regression(scaled(mlp(), 10.0)), MSE, 60.0),
    "from_large_classes": Problem(lambda: classes(scaled(mlp(out=4), 10.0)), CE, 0.4),
    "fine_tuning": Problem(
        lambda: regression(mlp()), MSE, 0.03, batch=16, pretrained=200, diagonal_peak=20.0
    ),
    "rate_jumps": Problem(
        lambda: classes(mlp(out=4), spread=2.0),
        CE,
        0.25,
        rate=lambda done: 0.01 if 0.3 < done < 0.6 else 1.0,
    ),
    "tabular_fixed": Problem(
        lambda: regression(mlp()), MSE, 1.2, batch=16, settings=(("lr", 0.1), ("damping", "auto"))
    ),
    "batch_norm": Problem(lambda: classes(normalized(), spread=2.0), CE, 0.6, steps=12),
    "noisy_labels": Problem(lambda: classes(mlp(out=4), noise=0.3), CE, 0.9),
    "imbalanced": Problem(imbalanced, CE, 0.06),
    "weighted": Problem(weighted, weighted_classes, 0.05),
    "evidence": Problem(pictures, evidence, 5.0, given_output=True, steps=60),
    "repeated_features": Problem(repeated_features, MSE, 0.4),
    "outliers": Problem(outliers, log_cosh, 1.0, given_output=True),
}
