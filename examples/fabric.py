"""Gradient noise and KFAC with Lightning Fabric: `curvature(...)` goes around `fabric.backward(loss)`.

    python examples/fabric.py

Fabric moves the model, casts the forward pass (`--precision bf16-mixed`) and scales the loss; the
loop stays one's own. The pass that `fabric.backward` makes is heard all the same.
"""

import shared
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.nn import functional as F

from lightning_curv import BatchL2Grad, KFACOptimizer, curvature
from lightning_curv.metrics import NoiseScale


def main() -> None:
    parser = shared.parser(__doc__)
    parser.add_argument("--precision", default="bf16-mixed", choices=["32-true", "bf16-mixed"])
    options = parser.parse_args()
    fabric = Fabric(accelerator="cpu", devices=1, precision=options.precision)
    fabric.seed_everything(0, verbose=False)

    train, test = map(fabric.setup_dataloaders, shared.loaders(batch_size=128))
    net = nn.Sequential(
        *(nn.Conv2d(1, 8, 5, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 5, stride=2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(256, 10)),
    )
    model, optimizer = fabric.setup(net, KFACOptimizer(net.parameters()))
    noise = NoiseScale()

    rows = []
    for epoch in range(1 if options.quick else 4):
        for x, y in train:
            optimizer.zero_grad()
            with curvature(BatchL2Grad(), *optimizer.required_extensions()):
                loss = F.cross_entropy(model(x), y)
                fabric.backward(loss)
            # The summands of the gradient are g_n / N: times N² for the squared norms of the g_n.
            norms = len(x) ** 2 * torch.stack([p.batch_l2 for p in net.parameters()]).sum(0)
            noise.update(
                norms, torch.stack([p.grad.square().sum() for p in net.parameters()]).sum()
            )
            optimizer.step()
        with torch.no_grad():
            accuracy = torch.cat([model(x).argmax(1) == y for x, y in test]).float().mean()
        rows.append((loss.item(), float(accuracy), float(noise.compute())))
        text = "epoch {}: loss {:.4f}, held-out accuracy {:.1%}, noise scale {:.0f}"
        fabric.print(text.format(epoch + 1, *rows[-1]))
        noise.reset()

    figure, axes = shared.plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
    titles = ("training loss", "held-out accuracy", "noise scale (samples)")
    for axis, title, values in zip(axes, titles, zip(*rows)):
        axis.plot(range(1, len(values) + 1), values, "o-", lw=2)
        axis.set(title=title, xlabel="epoch", xticks=range(1, len(values) + 1))
    shared.save(figure, options.out)


if __name__ == "__main__":
    main()
