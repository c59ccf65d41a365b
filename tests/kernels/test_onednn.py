"""Products of matrices by oneDNN: the sizes from which it is used are above those of all other tests."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_curv import (
    KFAC,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    SumGradSquared,
    Variance,
    curvature,
)
from lightning_curv.kernels import onednn, switches, symmetric
from lightning_curv.passes import passes

LAYOUTS = {
    "rows": lambda m: m,
    "columns": lambda m: m.mT.contiguous().mT,
    "slice": lambda m: torch.cat([m, m], 1)[:, : m.shape[1]],
    "expanded": lambda m: m[:, :1].expand(m.shape),
}


@pytest.fixture(autouse=True)
def switched_on(monkeypatch):
    """Also on processors on which it is left alone by default."""
    caches = (switches.enabled, onednn._onednn)
    for cached in caches:
        cached.cache_clear()
    monkeypatch.setenv(switches.VARIABLE, "onednn")
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("left", LAYOUTS)
def test_product_of_large_matrices(left, right):
    a, b = LAYOUTS[left](torch.randn(130, 120)), LAYOUTS[right](torch.randn(120, 110))
    torch.testing.assert_close(
        onednn.mm(a, b).double(), a.double() @ b.double(), rtol=1e-5, atol=1e-4
    )


def test_product_that_is_differentiated():
    a, b = torch.randn(130, 120, requires_grad=True), torch.randn(120, 110)
    onednn.mm(a, b).sum().backward()
    torch.testing.assert_close(a.grad, b.sum(1).expand(130, 120), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "equation", ["vno,ni->oi", "vno,ni->io", "vnos,nis->oi", "vnos,nis->vnoi", "vno,ni->vn"]
)
@pytest.mark.parametrize("columns", [1, 3])
def test_einsum(equation, columns):
    sizes = {"v": columns, "n": 40, "o": 96, "i": 80, "s": 7}
    a, b = (torch.randn([sizes[x] for x in part]) for part in equation.split("->")[0].split(","))
    expected = torch.einsum(equation, a.double(), b.double())
    torch.testing.assert_close(
        onednn.einsum(equation, a, b).double(), expected, rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("size", [1, 127, 128, 300])
def test_gram(size):
    x = torch.randn(90, size).mT
    torch.testing.assert_close(
        symmetric.gram(x).double(), x.double() @ x.double().mT, rtol=1e-5, atol=1e-4
    )


def counted(monkeypatch):
    """The products that are left to oneDNN from now on."""
    made, find = [], onednn._onednn

    def product(a, b, *rest):
        made.append((a.shape, b.shape))
        return find()(a, b, *rest)

    monkeypatch.setattr(onednn, "_onednn", lambda: product if find() is not None else None)
    return made


def test_fast_products_of_autograd(monkeypatch):
    """Large products of plain float32 matrices alone; the second derivative too."""
    made, W, x = (
        counted(monkeypatch),
        torch.randn(128, 128, requires_grad=True),
        torch.randn(128, 128),
    )
    with onednn.fast_products(True):
        h = x @ W
        (g,) = torch.autograd.grad(h.square().sum(), W, create_graph=True)
        (second,) = torch.autograd.grad(g.square().sum(), W)
    assert len(made) >= 3 or onednn._onednn() is None
    expected = 2 * 2 * x.double().T @ (x.double() @ (2 * x.double().T @ (x.double() @ W.double())))
    torch.testing.assert_close(
        second.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item()
    )
    made.clear()
    with onednn.fast_products(True):
        assert torch.mm(W[:8], x).requires_grad
        assert torch.mm(W.double(), x.double()).dtype == torch.float64
        assert torch.mm(W.bfloat16(), x.bfloat16()).dtype == torch.bfloat16
    with onednn.fast_products(False):
        assert torch.mm(W, x).requires_grad
    assert not made


@pytest.mark.parametrize("width", [8, 256])
def test_passes_use_them_where_it_pays(width, monkeypatch):
    model = nn.Sequential(
        nn.Linear(10, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3)
    )
    watched = []
    monkeypatch.setattr(
        passes, "fast_products", lambda pays: watched.append(pays) or onednn.fast_products(pays)
    )
    with curvature(DiagGGNExact()):
        F.cross_entropy(model(torch.randn(500, 10)), torch.zeros(500, dtype=torch.long)).backward()
    pays = width == 256 and onednn._onednn() is not None
    assert {*watched} == ({True} if pays else set())


def test_compiled_parts_of_a_pass_run_as_they_are(monkeypatch):
    compiled = torch.compile(lambda h: (h.tanh() * h).sin(), backend="aot_eager")

    class Inner(nn.Module):
        def forward(self, h):
            return compiled(h)

    model, found = (
        nn.Sequential(nn.Linear(9, 256), Inner(), nn.Linear(256, 256), Inner(), nn.Linear(256, 3)),
        [],
    )
    x, made = torch.randn(400, 9), counted(monkeypatch)
    for mkldnn in (True, False):
        with torch.backends.mkldnn.flags(enabled=mkldnn), curvature(DiagGGNExact()):
            F.cross_entropy(model(x), torch.zeros(400, dtype=torch.long)).backward()
        found.append(model[0].weight.diag_ggn_exact)
    assert made or onednn._onednn() is None
    torch.testing.assert_close(*found)


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.grouped = nn.Conv2d(16, 64, 3, padding=1), nn.Conv2d(64, 64, 3, groups=2)
        self.transposed, self.linear = nn.ConvTranspose2d(64, 40, 3), nn.Linear(256, 300)
        self.head = nn.Linear(300, 3)

    def forward(self, x):
        x = torch.relu(self.grouped(torch.tanh(self.conv(x))))
        return self.head(torch.relu(self.linear(self.transposed(x).flatten(2))).mean(1))


EXTENSIONS = [BatchGrad, BatchL2Grad, SumGradSquared, Variance, DiagGGNExact, KFAC]


@pytest.mark.parametrize("together", [False, True])
def test_large_layers_in_float32_as_in_float64(together):
    torch.manual_seed(0)
    model, X, y = Sequence(), torch.randn(5, 16, 16, 16), torch.tensor([0, 1, 2, 0, 1])
    found = {}
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        for extensions in [EXTENSIONS] if together else [[e] for e in EXTENSIONS]:
            torch.manual_seed(1)
            with curvature(*(e() for e in extensions)):
                F.cross_entropy(model(X.to(dtype)), y).backward()
        found[dtype] = {
            (name, e.savefield, k): value.detach().clone()
            for name, p in model.named_parameters()
            for e in EXTENSIONS
            for k, value in enumerate(
                getattr(p, e.savefield) if e is KFAC else [getattr(p, e.savefield)]
            )
        }
    for key, value in found[torch.float64].items():
        if key[1] == "kfac" and not (key[0].endswith("weight") and key[2] == 1):
            continue  # drawn targets may differ between the types
        scale = float(value.abs().max())
        torch.testing.assert_close(
            found[torch.float32][key].double(), value, rtol=1e-3, atol=1e-4 * scale, msg=str(key)
        )


def test_some_product_of_the_network_above_is_large(monkeypatch):
    if onednn._onednn() is None:
        pytest.skip("this build of torch has no oneDNN")
    found = []
    large = onednn.is_large
    monkeypatch.setattr(
        onednn, "is_large", lambda *arguments: found.append(large(*arguments)) or found[-1]
    )
    with curvature(SumGradSquared()):
        F.cross_entropy(
            Sequence()(torch.randn(5, 16, 16, 16)), torch.tensor([0, 1, 2, 0, 1])
        ).backward()
    assert any(found)
