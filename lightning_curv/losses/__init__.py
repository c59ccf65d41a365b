"""Loss functions: the curvature of a loss call at its input, as columns, samples and products."""

from lightning_curv.losses.autograd import Quadratic
from lightning_curv.losses.categorical import Categorical
from lightning_curv.losses.likelihoods import Bernoulli, Gaussian, Likelihood, Poisson
from lightning_curv.losses.registry import LOSSES, PARTS, loss

__all__ = [
    "LOSSES",
    "PARTS",
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "Likelihood",
    "Poisson",
    "Quadratic",
    "loss",
]

from lightning_curv.losses import classification, regression  # noqa: F401
