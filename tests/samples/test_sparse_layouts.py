"""Tensors whose memory has no strides: training is the same, and quantities are right or refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from zoo import assert_close

from lightning_curv import curvature, record
from lightning_curv.errors import UnsupportedError
from lightning_curv.extensions import GGNMP, HMP, BatchGrad, DiagGGNExact, DiagHessian

LAYOUTS = {
    "coo": lambda A: A.to_sparse(),
    "csr": lambda A: A.to_sparse_csr(),
    "csc": lambda A: A.to_sparse_csc(),
}
PRODUCTS = {
    "mm": torch.sparse.mm,
    "matmul": torch.matmul,
    "scaled": lambda A, h: (A * 2.0) @ h,
}


class Graph(nn.Module):
    """Two layers of a network over a graph of five nodes."""

    def __init__(self, adjacency, product):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
        self.adjacency, self.product = adjacency, product

    def forward(self, x):
        h = self.product(self.adjacency, self.first(x).tanh())
        return self.last(h)


def problem(layout, product):
    adjacency = torch.eye(5).double() + (torch.rand(5, 5) < 0.5)
    model = Graph(LAYOUTS[layout](adjacency) if layout else adjacency, PRODUCTS[product])
    return model, torch.randn(5, 3).double(), torch.randn(5, 2).double()


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_network_over_a_sparse_graph_is_recorded_and_has_products(layout, product):
    model, X, y = problem(layout, product)
    expected = torch.autograd.grad(F.mse_loss(model(X), y), [*model.parameters()])
    with record():
        loss = F.mse_loss(model(X), y)
    found = torch.autograd.grad(loss, [*model.parameters()])
    assert all(map(torch.equal, found, expected))

    def values(model, extension):
        with curvature(extension):
            F.mse_loss(model(X), y).backward()
        return {
            name: getattr(p, extension.savefield)(torch.ones_like(p))
            for name, p in model.named_parameters()
        }

    dense = Graph(model.adjacency.to_dense(), torch.matmul)
    dense.load_state_dict(model.state_dict())
    if product == "scaled":
        dense.adjacency = 2 * dense.adjacency
    for extension in (HMP(), GGNMP()):
        reference = values(dense, extension)
        for name, value in values(model, extension).items():
            assert_close(value, reference[name], label=name)
    for extension in (BatchGrad(), DiagGGNExact(), DiagHessian()):  # its nodes are no samples
        with pytest.raises(UnsupportedError, match="samples mix"):
            values(model, extension)


class Scattered(nn.Module):
    """A matrix whose entries at some places are a parameter, and how the samples meet it."""

    MEETINGS = {
        "added": lambda A, x: F.linear(x, torch.ones(4, 6).double() + A),
        "mm": lambda A, x: torch.sparse.mm(A, x.T).T,
        "coalesced": lambda A, x: torch.sparse.mm(A.coalesce(), x.T).T,
        "addmm": lambda A, x: torch.sparse.addmm(torch.zeros(4, 3).double(), A, x.T).T,
        "matmul": lambda A, x: (A @ x.T).T,
        "transposed": lambda A, x: x @ A.t(),
        "dense": lambda A, x: F.linear(x, A.to_dense()),
    }

    def __init__(self, meeting):
        super().__init__()
        self.values = nn.Parameter(torch.randn(6).double())
        self.bend = nn.Linear(6, 6).double()
        # one place twice: its entries are added up
        self.register_buffer("places", torch.tensor([[0, 1, 2, 3, 3, 0], [0, 5, 2, 1, 4, 0]]))
        self.meet = self.MEETINGS[meeting]

    def forward(self, x):
        shape = (4, 6)
        if self.meet is None:
            zeros = torch.zeros(shape).double()
            A = zeros.index_put((*self.places,), self.values, accumulate=True)
            return F.linear(self.bend(x).tanh(), A + self.added)
        return self.meet(
            torch.sparse_coo_tensor(self.places, self.values, shape), self.bend(x).tanh()
        )


@pytest.mark.filterwarnings("ignore::lightning_curv.rules.fallback.FallbackWarning")
@pytest.mark.parametrize("meeting", Scattered.MEETINGS)
def test_the_entries_of_a_sparse_matrix_may_be_a_parameter(meeting):
    """Torch's gradient by them leaves no graph, and says nothing of it."""
    model = Scattered(meeting)
    X, y = torch.randn(3, 6).double(), torch.tensor([0, 3, 2])
    extensions = (BatchGrad(), DiagGGNExact(), HMP(), GGNMP(), DiagHessian())

    def values():
        with curvature(*extensions):
            F.cross_entropy(model(X), y).backward()
        found = {}
        for name, p in model.named_parameters():
            for extension in extensions:
                value = getattr(p, extension.savefield)
                found[name, extension.savefield] = (
                    value if isinstance(value, torch.Tensor) else value(torch.ones_like(p))
                )
        return found

    found = values()
    model.meet, model.added = None, 1.0 if meeting == "added" else 0.0
    for key, reference in values().items():
        assert_close(found[key], reference, label=key)


@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize("layout", [None, *LAYOUTS])
def test_neighbours_that_are_added_up_before_the_first_parameter_are_seen(layout, read):
    model, X, y = problem(layout, "mm")
    with record():
        if read:
            model.first(X)
        loss = F.mse_loss(model.last(model.first(torch.sparse.mm(model.adjacency, X))), y)
    with pytest.raises(UnsupportedError, match="samples mix"), curvature(BatchGrad()):
        loss.backward()


def test_a_batch_that_is_packed_for_a_library():
    layer, X = nn.Linear(3, 2), torch.randn(4, 3)
    packed = X.to_mkldnn() if torch.backends.mkldnn.is_available() else X.to_sparse()
    with curvature(BatchGrad()):
        layer(packed.to_dense()).square().sum().backward()
    outputs = layer(X)
    rows = [torch.autograd.grad(z.square().sum(), layer.weight, retain_graph=True) for z in outputs]
    assert_close(layer.weight.grad_batch, torch.stack([row for (row,) in rows]), rtol=1e-5)
