"""Complex numbers inside of a network: second derivatives are right, or refused with a way out."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import assert_close

from lightning_curv import curvature, record
from lightning_curv.errors import UnsupportedError
from lightning_curv.extensions import (
    GGNMP,
    HMP,
    PCHMP,
    BatchDiagGGNExact,
    BatchDiagHessian,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagHessian,
    SumGradSquared,
    Variance,
)
from lightning_curv.extensions.spectrum import GGNTraceExact, HessianTraceMC, MaxEigenvalue

pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning_curv.rules.fallback.FallbackWarning",
    "ignore:Using backward:UserWarning",  # of torch, with `create_graph`
)

Layer = Callable[[Tensor], Tensor]  # from [N, 4] to a real [N, K]


def pairs(z: Tensor) -> Tensor:
    return torch.view_as_complex(z.view(len(z), 2, 2))


def spectrum(z: Tensor) -> Tensor:
    return torch.fft.rfft(z, dim=1)


LINEAR: dict[str, Layer] = {  # in the real and imaginary parts together
    "real": lambda z: spectrum(z).real,
    "imag": lambda z: spectrum(z).imag,
    "view_as_real": lambda z: torch.view_as_real(spectrum(z)).flatten(1),
    "irfft": lambda z: torch.fft.irfft(spectrum(z) * (1 + 2j), n=5),
    "fft": lambda z: torch.fft.fft(z, dim=1).imag,
    "ifft": lambda z: torch.fft.ifft(spectrum(z), dim=1).real,
    "conj": lambda z: (pairs(z).conj() * (2 - 1j)).imag,
    "stft": lambda z: torch.view_as_real(
        torch.stft(z, 2, 1, return_complex=True, window=torch.ones(2).double(), center=False)
    ).flatten(1),
}
RIGHT: dict[str, Layer] = {
    **LINEAR,
    "squared_part": lambda z: spectrum(z).real.square(),
    "bent_parts": lambda z: spectrum(z).imag.tanh() + spectrum(z).real.pow(3),
    "polar": lambda z: torch.polar(z[:, :2], z[:, 2:]).real,
}
REFUSED: dict[str, Layer] = {
    "rfft_abs": lambda z: spectrum(z).abs(),
    "power_spectrum": lambda z: spectrum(z).abs().square(),
    "complex_abs": lambda z: torch.complex(z[:, :2], z[:, 2:]).abs(),
    "abs_of_a_sum": lambda z: (pairs(z) + spectrum(z)[:, :2]).abs(),
    "abs_of_a_product": lambda z: (z.to(torch.complex128) @ torch.ones(4, 3).to(1j * z)).abs(),
    "angle": lambda z: pairs(z).angle(),
    "sgn": lambda z: pairs(z).sgn().real,
    "exp": lambda z: pairs(z).exp().real,
    "product": lambda z: (pairs(z) * pairs(z).conj()).real,
    "tanh": lambda z: (pairs(z) * (1 + 2j)).tanh().real,
}


class Network(nn.Module):
    """A layer of real parameters, an op of complex numbers, and the logits after it or right there."""

    def __init__(self, op: Layer, head: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4).double()
        self.op = op
        width = op(torch.ones(1, 4).double()).shape[1]
        self.head = nn.Linear(width, 3).double() if head else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.op(self.layer(x)))


def problem(op: Layer, head: bool) -> tuple[Network, Tensor, Tensor]:
    return Network(op, head), torch.randn(3, 4).double(), torch.tensor([0, 1, 1])


def hessian(network: Network, X: Tensor, y: Tensor) -> Tensor:
    def loss(weight: Tensor) -> Tensor:
        output = torch.func.functional_call(network, {"layer.weight": weight}, X)
        return F.cross_entropy(output, y)

    found = torch.autograd.functional.hessian(loss, network.layer.weight.detach())
    return found.reshape(16, 16)


@pytest.mark.parametrize("head", [False, True], ids=["last", "hidden"])
@pytest.mark.parametrize("name", [*RIGHT, *REFUSED])
def test_hessians_through_complex_numbers_are_right_or_refused(name: str, head: bool) -> None:
    network, X, y = problem({**RIGHT, **REFUSED}[name], head)
    expected, weight = hessian(network, X, y), network.layer.weight
    diagonal = expected.diagonal().reshape(4, 4)

    def compute(extension):
        with curvature(extension):
            F.cross_entropy(network(X), y).backward()

    compute(HMP())
    assert_close(weight.hmp(torch.eye(16).double().view(16, 4, 4)).reshape(16, 16), expected)
    if name in REFUSED:
        for extension in (DiagHessian(), BatchDiagHessian(), PCHMP()):
            with pytest.raises(UnsupportedError, match="expect real numbers, found complex ones"):
                compute(extension)
        return
    compute(DiagHessian())
    assert_close(weight.diag_h, diagonal)
    compute(BatchDiagHessian())
    assert_close(weight.diag_h_batch.sum(0), diagonal)
    compute(PCHMP())


def test_the_absolute_value_of_a_complex_number_is_no_sum_of_two() -> None:
    """|a(w) + b(w)| has second derivatives by a and b together, in the GGN of a shared w."""
    w = nn.Parameter(torch.tensor([0.5, -1.2]).double())
    X = torch.tensor([[1.0, 2.0], [0.3, -1.0], [2.0, 0.7]]).double()

    def outputs() -> Tensor:
        return torch.stack([X * w, X.flip(1) * w * w], 1)

    def loss(both: Tensor) -> Tensor:
        return (torch.view_as_complex(both[:, 0]) + torch.view_as_complex(both[:, 1])).abs().sum()

    value = outputs().detach()
    H = torch.autograd.functional.hessian(loss, value).reshape(3, 4, 3, 4)
    J = torch.autograd.functional.jacobian(
        lambda w: torch.stack([X * w, X.flip(1) * w * w], 1), w.detach()
    ).reshape(3, 4, 2)
    blocks = []
    for n in range(3):
        values, vectors = torch.linalg.eigh(H[n, :, n])
        positive = vectors @ values.clamp(min=0).diag() @ vectors.T
        blocks.append(J[n].T @ positive @ J[n])

    def compute(extension):
        with curvature(extension):
            # a product with `w` is an op with a parameter: two outputs of the network
            first, second = X * w, (X.flip(1) * w) * w
            a, b = torch.view_as_complex(first), torch.view_as_complex(second)
            (a + b).abs().sum().backward()

    compute(BatchDiagGGNExact())
    assert_close(w.diag_ggn_exact_batch, torch.stack([block.diagonal() for block in blocks]))
    compute(DiagGGNExact())
    assert_close(w.diag_ggn_exact, sum(blocks).diagonal())
    compute(GGNMP())
    assert_close(w.ggnmp(torch.eye(2).double()), sum(blocks))


# --- complex parameters -----------------------------------------------------------------------------------------------


def dense_layer(w: Tensor, X: Tensor) -> Tensor:
    return X.to(w.dtype) @ w


def factors(w: Tensor, X: Tensor) -> Tensor:
    return X.to(w.dtype) * w.sum(1)


def used_twice(w: Tensor, X: Tensor) -> Tensor:
    return (X.to(w.dtype) @ w).sin() @ w.mT


def sequences(w: Tensor, X: Tensor) -> Tensor:
    return (X[:, None] * torch.arange(1.0, 4.0).double()[:, None]).to(w.dtype) @ w


def fourier(w: Tensor, X: Tensor) -> Tensor:
    modes = torch.fft.fft(X)
    return torch.fft.ifft(torch.einsum("ni,io->no", modes, w))


COMPLEX = [dense_layer, factors, used_twice, sequences, fourier]


def summands(op: Callable[[Tensor, Tensor], Tensor], w: Tensor, X: Tensor) -> Tensor:
    return op(w, X).abs().pow(3).flatten(1).sum(1)


def complex_problem() -> tuple[nn.Parameter, Tensor]:
    return nn.Parameter(torch.randn(4, 3, dtype=torch.complex128)), torch.randn(5, 4).double()


@pytest.mark.parametrize("create_graph", [False, True], ids=["values", "create_graph"])
@pytest.mark.parametrize("op", COMPLEX)
def test_squares_of_complex_gradients_are_squared_absolute_values(op, create_graph: bool) -> None:
    w, X = complex_problem()
    g = torch.stack([torch.autograd.grad(summands(op, w, x).sum(), w)[0] for x in X.split(1)])
    with curvature(BatchGrad(), BatchL2Grad(), SumGradSquared(), Variance()):
        summands(op, w, X).sum().backward(create_graph=create_graph)
    assert_close(w.grad_batch, g)
    assert_close(w.batch_l2, g.abs().square().sum((1, 2)))
    assert_close(w.sum_grad_squared, g.abs().square().sum(0))
    assert_close(w.variance, (g - g.mean(0)).abs().square().mean(0))
    for extension in (SumGradSquared(), Variance()):  # alone: others keep no rows for it
        with curvature(extension):
            summands(op, w, X).sum().backward(create_graph=create_graph)
    assert_close(w.sum_grad_squared, g.abs().square().sum(0))
    assert_close(w.variance, (g - g.mean(0)).abs().square().mean(0))


@pytest.mark.parametrize("op", COMPLEX)
def test_ggn_and_spectrum_of_complex_parameters_are_those_of_both_parts(op) -> None:
    w, X = complex_problem()
    parts = torch.view_as_real(w.detach()).clone()

    def outputs(parts: Tensor) -> Tensor:
        return op(torch.view_as_complex(parts), X).abs().flatten(1)

    def loss(output: Tensor) -> Tensor:
        return output.pow(3).sum()

    J = torch.autograd.functional.jacobian(outputs, parts).flatten(2)  # [N, C, P]
    H = torch.autograd.functional.hessian(lambda parts: loss(outputs(parts)), parts)
    H = H.reshape(parts.numel(), -1)
    # The loss is convex in the absolute values, where the network ends for `output=`.
    ggn_diagonal = (6 * outputs(parts)[..., None] * J.square()).sum(1)
    by_entry = ggn_diagonal.unflatten(1, parts.shape).sum(-1)

    def compute(*extensions):
        with record():
            value = op(w, X).abs()
            total = loss(value)
        with curvature(*extensions, output=value):
            total.backward()

    compute(DiagGGNExact(), BatchDiagGGNExact(), GGNTraceExact())
    assert_close(w.diag_ggn_exact_batch, by_entry)
    assert_close(w.diag_ggn_exact, by_entry.sum(0))
    assert_close(w.ggn_trace_exact, ggn_diagonal.sum())
    with curvature(HessianTraceMC(mc_samples=400), MaxEigenvalue(products=60, tolerance=1e-12)):
        loss(op(w, X).abs()).backward()
    assert_close(w.hessian_max_eigenvalue, torch.linalg.eigvalsh(H)[-1], rtol=1e-6)
    off = H - H.diag().diag()
    deviation = (2 * off.square().sum() / 400).sqrt()  # of the mean of 400 draws
    assert abs(w.hessian_trace_mc - H.trace()) < 4 * deviation
