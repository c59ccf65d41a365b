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
    matmul,
    symmetric,
)

LAYOUTS = {
    "rows": lambda m: m,
    "columns": lambda m: m.mT.contiguous().mT,
    "slice": lambda m: torch.cat([m, m], 1)[:, : m.shape[1]],
    "expanded": lambda m: m[:, :1].expand(m.shape),
}


@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("left", LAYOUTS)
def test_product_of_large_matrices(left, right):
    a, b = LAYOUTS[left](torch.randn(130, 120)), LAYOUTS[right](torch.randn(120, 110))
    torch.testing.assert_close(matmul.mm(a, b).double(), a.double() @ b.double(), rtol=1e-5, atol=1e-4)


def test_product_that_is_differentiated():
    a, b = torch.randn(130, 120, requires_grad=True), torch.randn(120, 110)
    matmul.mm(a, b).sum().backward()
    torch.testing.assert_close(a.grad, b.sum(1).expand(130, 120), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("equation", ["vno,ni->oi", "vno,ni->io", "vnos,nis->oi", "vnos,nis->vnoi", "vno,ni->vn"])
@pytest.mark.parametrize("columns", [1, 3])
def test_einsum(equation, columns):
    sizes = {"v": columns, "n": 40, "o": 96, "i": 80, "s": 7}
    a, b = (torch.randn([sizes[x] for x in part]) for part in equation.split("->")[0].split(","))
    expected = torch.einsum(equation, a.double(), b.double())
    torch.testing.assert_close(matmul.einsum(equation, a, b).double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("size", [1, 127, 128, 300])
def test_gram(size):
    x = torch.randn(90, size).mT
    torch.testing.assert_close(symmetric.gram(x).double(), x.double() @ x.double().mT, rtol=1e-5, atol=1e-4)


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
            for k, value in enumerate(getattr(p, e.savefield) if e is KFAC else [getattr(p, e.savefield)])
        }
    for key, value in found[torch.float64].items():
        if key[1] == "kfac" and not (key[0].endswith("weight") and key[2] == (key[0] != "transposed.weight")):
            continue  # drawn targets may differ between the types
        scale = float(value.abs().max())
        torch.testing.assert_close(
            found[torch.float32][key].double(), value, rtol=1e-3, atol=1e-4 * scale, msg=str(key)
        )


def test_some_product_of_the_network_above_is_large(monkeypatch):
    if matmul._onednn() is None:
        pytest.skip("this build of torch has no oneDNN")
    found = []
    large = matmul.is_large
    monkeypatch.setattr(matmul, "is_large", lambda *arguments: found.append(large(*arguments)) or found[-1])
    with curvature(SumGradSquared()):
        F.cross_entropy(Sequence()(torch.randn(5, 16, 16, 16)), torch.tensor([0, 1, 2, 0, 1])).backward()
    assert any(found)
