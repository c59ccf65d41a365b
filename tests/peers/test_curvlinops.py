"""The Kronecker factors equal those of curvlinops (Dangel et al.) for exact columns, expand and reduce."""

import pytest
import torch
from packages import needs
from torch import nn
from zoo import Mean, assert_close

from lightning_curv import KFLR, curvature

curvlinops = needs("curvlinops")


def mlp():
    return nn.Sequential(
        nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3, bias=False), nn.Sigmoid(), nn.Linear(3, 3)
    )


def cnn():
    return nn.Sequential(
        nn.Conv2d(2, 3, 2, padding=1),
        nn.Tanh(),
        nn.Conv2d(3, 2, 2, stride=2, bias=False),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


class AttentionBlock(nn.Module):
    """Pre-norm self-attention and MLP with residual connections; the frozen norms have no Kronecker factors."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(4, elementwise_affine=False) for _ in range(2))
        self.q, self.k, self.v, self.out = (nn.Linear(4, 4) for _ in range(4))
        self.mlp, self.head = (
            nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4)),
            nn.Linear(4, 3),
        )

    def forward(self, x):  # [N, T, 4]
        h = self.norm1(x)
        q, k, v = (
            layer(h).unflatten(-1, (2, 2)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        mixed = torch.softmax(q @ k.mT / 2**0.5, -1) @ v
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return self.head((x + self.mlp(self.norm2(x))).mean(1))


NETWORKS = {
    "mlp": (mlp, (5,)),
    "sequence_mlp": (lambda: nn.Sequential(mlp(), Mean(1)), (3, 5)),
    "cnn": (cnn, (2, 4, 4)),
    "attention": (AttentionBlock, (3, 4)),
}
LOSSES = {
    "ce": (lambda reduction: nn.CrossEntropyLoss(reduction=reduction), torch.tensor([0, 2, 1, 1])),
    "mse": (
        lambda reduction: nn.MSELoss(reduction=reduction),
        torch.linspace(-1, 1, 12).double().reshape(4, 3),
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_equal_curvlinops(name, loss, reduction, weight_sharing):
    """Products B ⊗ A; how the scale is split between the factors is a convention."""
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    criterion, y = LOSSES[loss][0](reduction), LOSSES[loss][1]
    model, X = make().double(), torch.randn(4, *shape, dtype=torch.float64)
    with curvature(KFLR(weight_sharing=weight_sharing)):
        criterion(model(X), y).backward()
    params = [p for p in model.parameters() if p.requires_grad]
    reference = curvlinops.KFACLinearOperator(
        model, criterion, params, [(X, y)], fisher_type="type-2", kfac_approx=weight_sharing,
        check_deterministic=False, separate_weight_and_bias=True,
    )  # fmt: skip
    expected = (reference @ torch.eye(reference.shape[1], dtype=torch.float64)).detach()
    blocks = [torch.kron(*p.kflr) if len(p.kflr) == 2 else p.kflr[0] for p in params]
    assert_close(torch.block_diag(*blocks), expected, label=name)
