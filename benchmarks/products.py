"""Products behind the quantities, alternatives side by side: ``python benchmarks/products.py``.

One thread, process time, medians, in milliseconds. Shapes are those of convolutions of 3C3D, of
2C2D and of the network in `privacy.py`, of the MLP at N = 256, and of the LSTM of `networks.py` at
N = 32.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from statistics import median

import torch
from networks import POSITIONS, VOCABULARY, mlp
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_curv import record
from lightning_curv.kernels import huge_pages
from lightning_curv.kernels.onednn import fast_products, mm, one_by_one
from lightning_curv.kernels.symmetric import gram
from lightning_curv.losses.categorical import Categorical
from lightning_curv.passes.passes import apply_rule
from lightning_curv.recording.records import marks
from lightning_curv.rules.convolution import patches, weight_gradient
from lightning_curv.terms.chunks import CHUNK_BYTES
from lightning_curv.terms.term import squares_of_columns

LAYERS = {  # N, channels, padded size, channels out, kernel
    "first of 3C3D": (64, 3, 32, 64, 5),
    "second of 3C3D": (64, 64, 14, 96, 3),
    "first of 2C2D": (128, 1, 32, 32, 5),
    "second of 2C2D": (128, 32, 18, 64, 5),
    "second of the private network": (256, 16, 18, 32, 5),
}


def milliseconds(function: Callable[[], object], rounds: int = 9) -> float:
    """Median process time, after one call that is not counted."""
    function()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return 1e3 * median(times)


def squares(g: Tensor, x: Tensor) -> Tensor:
    """Sum of the squared products, one sample at a time."""
    result = g.new_zeros(g.shape[1], x.shape[1])
    for product in one_by_one(g, x.mT):
        result.addcmul_(product, product)
    return result


def every(products: Iterable[Tensor]) -> None:
    """Make products one after the other, and drop them."""
    for _ in products:
        pass


def layer(
    samples: int, channels: int, size: int, out: int, kernel: int
) -> dict[str, Callable[[], object]]:
    """Alternatives for one convolution."""
    image, weight = (
        torch.randn(samples, channels, size, size),
        torch.randn(out, channels, kernel, kernel),
    )
    view = patches(image, weight, (1, 1), (1, 1), 1)[:, 0]
    x = view.flatten(4).flatten(1, 3)
    g, features = torch.randn(samples, out, x.shape[2]), x.transpose(0, 1).flatten(1)
    side = size - kernel + 1
    g_images = g.reshape(samples * out, 1, side, side)

    def grouped(size: int) -> None:
        """The gradients of some samples at a time."""
        for images, cotangents in zip(image.split(size), g_images.split(size * out), strict=True):
            some = images.flatten(0, 1)[None], weight.repeat(len(images), 1, 1, 1)
            weight_gradient(cotangents.transpose(0, 1), *some, (1, 1), [0, 0], (1, 1), len(images))

    return {
        "patches: F.unfold": lambda: F.unfold(image, kernel),
        "patches: copy of a view, positions last": lambda: view.contiguous(),
        "patches: copy of a view, positions first": lambda: view.permute(
            0, 4, 5, 1, 2, 3
        ).contiguous(),
        "per sample, o × i: one batched product": lambda: g @ x.mT,
        "per sample, i × o: one batched product": lambda: x @ g.mT,
        "per sample, o × i: one at a time": lambda: every(one_by_one(g, x.mT)),
        "per sample, i × o: one at a time": lambda: every(one_by_one(x, g.mT)),
        "per sample: one gradient, samples as groups": lambda: grouped(samples),
        "per sample: the same in pieces of 2 MiB": lambda: grouped(
            max(1, CHUNK_BYTES // weight.nbytes)
        ),
        "per sample: convolution by the cotangents": lambda: F.conv2d(
            image.transpose(0, 1), g_images, groups=samples
        ),
        "per-sample squares: one batched product": lambda: (g @ x.mT).square_().sum(0),
        "per-sample squares: one sample at a time": lambda: squares(g, x),
        "input factor: torch.mm": lambda: features @ features.mT,
        "input factor: oneDNN": lambda: mm(features, features.mT),
        "input factor: oneDNN, in strips": lambda: gram(features),
    }


def recurrence(samples: int = 32, width: int = 128) -> dict[str, Callable[[], object]]:
    """Alternatives for an LSTM and for the targets drawn from its output."""
    lstm, x = nn.LSTM(width, width, batch_first=True), torch.randn(samples, POSITIONS, width)
    with record():
        output, _ = lstm(x)
    use = marks(output.grad_fn.next_functions[0][0]).use
    g, whole = torch.randn_like(output), torch.randn(1, *use.shape)
    p, scale = (
        torch.randn(samples, VOCABULARY, POSITIONS).softmax(1),
        torch.ones(samples, 1, POSITIONS),
    )
    rows, generator = p.movedim(1, 2).flatten(0, 1), torch.Generator().manual_seed(0)
    return {
        "torch.lstm, forward": lambda: lstm(x),
        "torch.lstm, backward": lambda: torch.autograd.grad(
            output, [*lstm.parameters()], g, retain_graph=True
        ),
        "terms: every step written out": lambda: apply_rule(use, 0, whole, {"input": x}),
        "terms: in closed form": lambda: apply_rule(use, 0, whole),
        "classes: torch.multinomial": lambda: torch.multinomial(rows, 1, generator=generator),
        "classes: one number per row, all of `sample`": lambda: Categorical(p, scale, 1).sample(
            generator
        ),
    }


def backward_pass(samples: int = 256) -> dict[str, Callable[[], object]]:
    """Passes of autograd: through the MLP of `networks.py` to the output of its first layer, through small products."""
    flatten, first, *rest = mlp()
    hidden = first(flatten(torch.randn(samples, 784)))
    output, small = nn.Sequential(*rest)(hidden), torch.ones(4, 4, requires_grad=True)
    chain, seed = small, torch.randn_like(output)
    for _ in range(100):
        chain = chain @ small

    def fast(function: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            with fast_products(True):
                function()

        return run

    large = partial(torch.autograd.grad, output, hidden, seed, retain_graph=True)
    many = partial(torch.autograd.grad, chain, small, torch.ones(4, 4), retain_graph=True)
    x, v = torch.randn(2 * samples, 784), torch.randn(10, 784)
    return {
        "a pass: torch.mm": large,
        "a pass: oneDNN, all ops watched": fast(large),
        "100 small products: torch.mm": many,
        "100 small products: all ops watched": fast(many),
        "few columns (logistic regression): torch.mm": lambda: x @ v.mT,
        "few columns (logistic regression): oneDNN": lambda: mm(x, v.mT),
    }


def moments() -> dict[str, Callable[[], object]]:
    """Alternatives for what follows the products of a linear layer."""
    g, a, b = torch.randn(256, 512), torch.rand(512 * 784), torch.rand(512 * 784)
    features, columns = torch.randn(784, 256), torch.randn(9, 256, 512)
    x, likelihood = (
        torch.randn(256, 784),
        Categorical(torch.rand(512, 10).softmax(1), torch.ones(512, 1), 1),
    )
    return {
        "roots of the Hessian, 512 × 10: fewest": lambda: every(likelihood.fewest_columns(512)),
        "roots of the Hessian, 512 × 10: one per class": lambda: every(likelihood.columns(512)),
        "outer products, 256 × 512 × 784: pages of 4 KiB": lambda: g[:, :, None] * x[:, None],
        "outer products, 256 × 512 × 784: huge pages": lambda: huge_pages.multiply(
            g[:, :, None], x[:, None]
        ),
        "squares of 9 columns: at once": lambda: columns.square().sum(0),
        "squares of 9 columns: one after the other": lambda: squares_of_columns(columns),
        "variance of 256 × 512: torch.var": lambda: g.var(0, correction=0),
        "variance of 256 × 512: mean square": lambda: (g - g.mean(0)).square_().mean(0),
        "any a < b, 512 × 784: comparison": lambda: bool((a < b).any()),
        "any a < b, 512 × 784: minimum": lambda: bool((a - b).amin() < 0),
        "input factor, 256 rows: oneDNN": lambda: mm(features, features.mT),
        "input factor, 256 rows: oneDNN, in strips": lambda: gram(features),
    }


def main() -> None:
    """Print all."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    groups = {f"{name}: convolution {shape}": layer(*shape) for name, shape in LAYERS.items()}
    groups |= {
        "MLP 784-512-256-10, a pass": backward_pass(),
        "MLP 784-512-256-10, moments": moments(),
        "LSTM 128, T = 64": recurrence(),
    }
    for name, alternatives in groups.items():
        print(name)
        for alternative, function in alternatives.items():
            print(f"  {alternative:45s} {milliseconds(function):8.2f}")


if __name__ == "__main__":
    main()
