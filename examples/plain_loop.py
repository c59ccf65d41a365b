"""Gradient noise and KFAC in a training loop of one's own, without Lightning.

    python examples/plain_loop.py

Everything happens in `loss.backward()`: `curvature(...)` around it makes it compute more than the
gradient. The metrics are torchmetrics: they are summed over batches (and processes) before the
ratio is taken.
"""

import shared
import torch
from torch import nn
from torch.nn import functional as F

from lightning_curv import BatchL2Grad, KFACOptimizer, curvature
from lightning_curv.metrics import GradientDiversity, NoiseScale


def main() -> None:
    options = shared.parser(__doc__).parse_args()
    torch.manual_seed(0)
    train, test = shared.loaders(batch_size=128)
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = KFACOptimizer(net.parameters())
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.1, total_iters=4 * len(train))
    noise, diversity = NoiseScale(), GradientDiversity()

    rows = []
    for epoch in range(1 if options.quick else 4):
        for x, y in train:
            optimizer.zero_grad()
            with curvature(BatchL2Grad(), *optimizer.required_extensions()):
                loss = F.cross_entropy(net(x), y)
                loss.backward()
            # The summands of the gradient are g_n / N: times N² for the squared norms of the g_n
            # themselves, [N].
            norms = len(x) ** 2 * torch.stack([p.batch_l2 for p in net.parameters()]).sum(0)
            gradient = torch.stack([p.grad.square().sum() for p in net.parameters()]).sum()
            for metric in (noise, diversity):
                metric.update(norms, gradient)
            optimizer.step(loss_fn=lambda x=x, y=y: F.cross_entropy(net(x), y))
            schedule.step()
        with torch.no_grad():
            accuracy = torch.cat([net(x).argmax(1) == y for x, y in test]).float().mean()
        rows.append(
            (loss.item(), float(accuracy), float(noise.compute()), float(diversity.compute()))
        )
        text = (
            "epoch {}: loss {:.4f}, held-out accuracy {:.1%}, noise scale {:.0f}, diversity {:.3f}"
        )
        print(text.format(epoch + 1, *rows[-1]))
        noise.reset()
        diversity.reset()

    figure, axes = shared.plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
    for axis, title, values in zip(
        axes, ("training loss", "held-out accuracy", "noise scale"), zip(*rows)
    ):
        axis.plot(range(1, len(values) + 1), values, "o-", lw=2)
        axis.set(title=title, xlabel="epoch", xticks=range(1, len(values) + 1))
    shared.save(figure, options.out)


if __name__ == "__main__":
    main()
