"""Loss functions: the curvature that a loss call has at its input, as columns, samples and products."""

from lightning_curv.losses.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from lightning_curv.losses.registry import LOSSES, loss

__all__ = ["LOSSES", "Bernoulli", "Categorical", "Gaussian", "Likelihood", "loss"]

from lightning_curv.losses import functions  # noqa: F401
