r"""Gradient noise as torchmetrics: summed over batches and processes, in any training loop.

Notation: $g_1, \dots, g_N$ are the gradients of the samples of a batch and $\bar g$ is their mean.
    If they are
independent with mean $G$ and covariance $\Sigma$, then
$\mathbb{E}\|\bar g\|^2 = \|G\|^2 + \mathrm{tr}(\Sigma)/N$.

The metrics take the squared norms of the $g_n$, after a backward pass of a *mean* loss under
`curvature(BatchL2Grad())` `N**2 * sum(p.batch_l2 for p in parameters)`, or their inner products
with $\bar g$. Those that look at the entries $g_{nj}$ of the gradients one by one take all
parameters in one vector [P], as `torch.nn.utils.parameters_to_vector` makes it, and the sums of
squares $\sum_n g_{nj}^2$, under `curvature(SumGradSquared())` `N**2 * p.sum_grad_squared`.
`lightning_curv.metrics.functional` holds the formulas of one batch.
"""

from lightning_curv.metrics.entrywise import EvidenceCriterion, GradientSNR, TICDiagonal
from lightning_curv.metrics.functional import unbiased_moments
from lightning_curv.metrics.pooled import GradientVariance, NoiseScale
from lightning_curv.metrics.ratios import (
    CABS,
    TIC,
    GradientDiversity,
    InnerProductTest,
    MeanTrace,
    NormTest,
    OrthogonalityTest,
)

__all__ = [
    "CABS",
    "TIC",
    "EvidenceCriterion",
    "GradientDiversity",
    "GradientSNR",
    "GradientVariance",
    "InnerProductTest",
    "MeanTrace",
    "NoiseScale",
    "NormTest",
    "OrthogonalityTest",
    "TICDiagonal",
    "unbiased_moments",
]
