r"""What `CurvatureCallback` can log: one function per quantity, with its formula and source.

Notation: $g_1, \dots, g_B$ are the gradients of the samples of an optimizer step and $\bar g$ is
their mean, the gradient. With accumulated micro-batches of different sizes the samples have weights
$w_n$ instead of $1/B$, and $c = \sum_n w_n^2$ stands for $1/B$. The unbiased trace of the
covariance of the $g_n$ is

$$\widehat{\mathrm{tr}\,\Sigma} = \frac{\sum_n w_n \|g_n\|^2 - \|\bar g\|^2}{1 - c} .$$

With `max_samples=S` a random subset $\mathcal S$ of the samples is measured, while the gradient
$\bar g$, and c, are those of all of them. Every sum $\sum_n w_n v_n$ is then estimated with weights
$w_n N / S$, and around what is known of it:

$$\sum_n w_n \|g_n\|^2
\approx \|\bar g\|^2 + \frac NS \sum_{n \in \mathcal S} w_n \|g_n - \bar g\|^2 ,$$

$\sum_n w_n (g_n \cdot \bar g)^2$ and the variances of entries likewise. The expectation over the
subsets is the value of the batch for every $S \ge 1$, so that $\widehat{\mathrm{tr}\,\Sigma}$ and
what is linear in it stay unbiased for the gradient's distribution too; no variance is negative. GGN
traces are N / S times those of the subset. Ratios of estimates are not unbiased: `mean_gsnr` and
`early_stopping` divide by variances of single entries, which makes the first too large (for normal
entries by S / (S - 2), where N is much larger) and needs S well above 2; `tic_trace` and `tic_diag`
divide by a curvature of the same samples.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_curv.callbacks.monitoring.histograms import ONE, TWO, GradientHistogram
from lightning_curv.callbacks.monitoring.measurement import Measurement
from lightning_curv.callbacks.monitoring.norm_layers import (
    NORM_LAYERS,
    NormLayerL2,
    norm_parameters,
)
from lightning_curv.callbacks.monitoring.parts import PARTS
from lightning_curv.callbacks.monitoring.quantiles import quantiles
from lightning_curv.callbacks.settings import near
from lightning_curv.devices import on_one_device
from lightning_curv.extensions import BatchL2Grad, DiagGGNMC, Extension, GGNTraceMC, SumGradSquared
from lightning_curv.extensions.base import GraphExtension
from lightning_curv.extensions.spectrum import (
    GGNTraceExact,
    GGNTraceJointMC,
    HessianTraceMC,
    MaxEigenvalue,
)
from lightning_curv.extensions.unevaluated import GradientJacobian, GradientSum
from lightning_curv.metrics import functional

EPS = 1e-7  # damping of the inverse curvature in the TIC, Cockpit's
LEVELS = {
    "sample_norm_p5": 0.05,
    "sample_norm_median": 0.5,
    "sample_norm_p95": 0.95,
    "sample_norm_max": 1.0,
}

# From the number of Monte-Carlo samples and the model.
FIELDS: dict[str, Callable[[int, nn.Module], Extension | GraphExtension]] = {
    "batch_l2": lambda *_: BatchL2Grad(),
    "sum_grad_squared": lambda *_: SumGradSquared(),
    "jacobian_grad": lambda *_: GradientJacobian(),
    "grad_sum": lambda *_: GradientSum(),
    NORM_LAYERS: lambda _, module: NormLayerL2(norm_parameters(module).values()),
    ONE: lambda *_: GradientHistogram(joint=False),
    TWO: lambda *_: GradientHistogram(joint=True),
    "ggn_trace_mc": lambda mc_samples, _: GGNTraceMC(mc_samples),
    "ggn_trace_joint_mc": lambda mc_samples, _: GGNTraceJointMC(mc_samples),
    "diag_ggn_mc": lambda mc_samples, _: DiagGGNMC(mc_samples),
    "ggn_trace_exact": lambda *_: GGNTraceExact(),
    "hessian_trace_mc": lambda mc_samples, _: HessianTraceMC(mc_samples),
    "ggn_max_eigenvalue": lambda *_: MaxEigenvalue("ggn"),
    "hessian_max_eigenvalue": lambda *_: MaxEigenvalue("hessian"),
}
SAMPLED = {
    "ggn_trace_mc",
    "diag_ggn_mc",
    "hessian_trace_mc",
}  # exist with at least one Monte-Carlo sample


@dataclass(frozen=True)
class Quantity:
    """One row of the table.

    Args:
        name: as in `quantities=`.
        formula: of one measured step; one number per series.
        fields: savefields of the extensions that it needs.
        series: names that are logged.
        per_layer: whether it makes sense for the parameters of one layer.
        instead: savefields that it can be computed from as well, where those are not to be had.
        spacing: least number of steps between two measurements, once the first `DENSE` steps are
            over.
    """

    name: str
    formula: Callable[[Measurement], Any] | None
    fields: tuple[str, ...]
    series: tuple[str, ...]
    per_layer: bool
    instead: tuple[str, ...] = ()
    spacing: int = 1

    def path(self, off: Collection[str]) -> tuple[str, ...] | None:
        """The savefields that it is computed from.

        Args:
            off: savefields, or names of quantities, that cannot be computed.

        Returns:
            `None` where it cannot be computed either.
        """
        # An empty second path needs nothing and would always be there.
        paths = [self.fields, self.instead] if self.instead else [self.fields]
        return next((fields for fields in paths if not {self.name, *fields} & {*off}), None)

    @property
    def of_some(self) -> Quantity:
        """The same from some of the samples: second moments need the sum of these gradients."""
        norms = {"batch_l2", NORM_LAYERS} & {*self.fields}
        moments = bool(norms) and self.name != "sample_norms"
        return replace(self, fields=(*self.fields, "grad_sum")) if moments else self

    def is_due(self, step: int, interval: int) -> bool:
        """Whether to measure it at a step that is logged.

        Args:
            step: counted from 1.
            interval: every how many steps are logged.
        """
        # Spacing in steps, rounded up to intervals: between them nothing is logged.
        return step <= DENSE or step // interval % -(-self.spacing // interval) == 0


QUANTITIES: dict[str, Quantity] = {}
DEFAULT = (
    "grad_norm",
    "sample_norms",
    "grad_variance",
    "grad_signal",
    "noise_scale",
    "suggested_batch_size",
    "ggn_trace",
)
ENTRIES = {"gradient_stats", "sparsity"}  # look at the gradient entry by entry
DENSE = 20  # curvature changes most at the start
SPACING = {"ggn_trace": 10}  # of the default, for what takes a backward pass of its own


def select(quantities: str | Sequence[str]) -> list[Quantity]:
    """The chosen rows of the table.

    Raises:
        ValueError: a name is unknown; the message names the nearest ones.
    """
    if quantities == "all":
        return list(QUANTITIES.values())
    given = [quantities] if isinstance(quantities, str) else list(quantities)
    names = [name for entry in given for name in (DEFAULT if entry == "default" else (entry,))]
    for name in names:
        if name not in QUANTITIES:
            raise ValueError(
                "`quantities` must be 'default', 'all' or a list of names, found "
                f"{name!r}; did you mean {near(str(name), QUANTITIES)}?"
            )
    return [
        QUANTITIES[name]
        # Who names a quantity gets it at every logged step.
        if name in given
        else replace(QUANTITIES[name], spacing=SPACING.get(name, 1))
        for name in dict.fromkeys(names)
    ]


def named(quantities: str | Sequence[str]) -> set[str]:
    """Those that the user chose by name: what is there by default, or with all, was not."""
    given = [quantities] if isinstance(quantities, str) else list(quantities)
    return {name for name in given if name in QUANTITIES}


def _quantity(
    *fields: str,
    series: tuple[str, ...] = (),
    per_layer: bool = True,
    instead: tuple[str, ...] = (),
) -> Callable[[Callable[[Measurement], Any]], Callable[[Measurement], Any]]:
    def add(formula: Callable[[Measurement], Any]) -> Callable[[Measurement], Any]:
        name = formula.__name__
        QUANTITIES[name] = Quantity(name, formula, fields, series or (name,), per_layer, instead)
        return formula

    return add


def _of_the_course(name: str) -> None:
    """A quantity of several steps, which is not a function of one measurement."""
    noise = {"noise_scale": "batch_l2", "suggested_batch_size": "batch_l2"}
    noise["noise_scale_norm_layers"] = NORM_LAYERS
    fields, instead = ((noise[name],), (PARTS,)) if name in noise else ((), ())
    QUANTITIES[name] = Quantity(name, None, fields, (name,), name == "noise_scale", instead)


def _picture(name: str) -> None:
    """A histogram, which has no series."""
    QUANTITIES[name] = Quantity(name, None, (name,), (), per_layer=False)


def _ratio(parts: tuple[float, float]) -> float:
    numerator, denominator = parts
    return numerator / denominator


@_quantity()
def grad_norm(m: Measurement) -> float:
    r"""$\|\bar g\|$, before clipping."""
    return m.grad_norm


@_quantity("batch_l2", series=tuple(LEVELS), per_layer=False)
def sample_norms(m: Measurement) -> list[float]:
    r"""Quantiles 5 %, 50 %, 95 % and the maximum of the $\|g_n\|$, and their histogram.

    With `max_samples` those of the samples that were drawn, whose maximum is at most that of the
    batch. Over several processes exact up to 256 samples in each, interpolated between as many
    order statistics above.
    """
    return quantiles(m.norms, m.norm_weights, [*LEVELS.values()])


@_quantity(series=("grad_norm", "grad_mean", "grad_std", "grad_max"))
def gradient_stats(m: Measurement) -> list[float]:
    r"""$\|\bar g\|$, and mean, standard deviation and largest magnitude of the entries of $\bar g$.

    Without a scaler's factor and before clipping. A complex entry counts as two real ones; entries
    that a sparse gradient does not store are zeros.
    """
    entries = m.entries
    return [float(m.grad_norm), entries.mean, entries.std, entries.largest]


@_quantity()
def sparsity(m: Measurement) -> float:
    r"""Share of the entries of $\bar g$ that are exactly zero.

    Dead units, rows of embeddings that were not read.
    """
    return m.entries.zeros


@_quantity("batch_l2", instead=(PARTS,))
def grad_variance(m: Measurement) -> float:
    r"""$\widehat{\mathrm{tr}\,\Sigma}$, unbiased.

    Where samples have no gradients of their own, it and what follows from it come from the
    gradients of micro-batches and processes:
    `lightning_curv.metrics.functional.unbiased_moments_of_parts`.
    """
    return m.variance


@_quantity("batch_l2", instead=(PARTS,))
def grad_signal(m: Measurement) -> float:
    r"""$\|\bar g\|^2 - c\,\widehat{\mathrm{tr}\,\Sigma}$: squared norm without noise, unbiased.

    The estimate $\widehat{\|G\|^2}$, negative now and then where the batches are too small to
    resolve it. McCandlish et al., *An empirical model of large-batch training*, arXiv:1812.06162,
    2018, appendix A with small batches of one sample.
    """
    return m.signal


# The simple noise scale tr(Σ) / ‖G‖² (McCandlish et al., 2018, eq. 2.9), numerator and denominator
# averaged over the course before the ratio is taken, and the power of two next to it: there a step
# and an example are worth the same, as twice the least number of either are needed (ibid., section
# 2.3). See `RunningNoiseScale`.
_of_the_course("noise_scale")
_of_the_course("suggested_batch_size")
# The noise scale of the parameters of normalization layers alone, without listening to other ops.
# Gray et al., *Normalization layer per-example gradients are sufficient to predict gradient noise
# scale in transformers*, NeurIPS 2024: in transformers it follows the noise scale of all
# parameters, up to a factor that depends on the model. They find it by a regression; so do it for
# yours, once, by logging both for a while, before you read batch sizes off this one. See
# `norm_layers`.
_of_the_course("noise_scale_norm_layers")


@_quantity("ggn_trace_mc", instead=("ggn_trace_joint_mc",))
def ggn_trace(m: Measurement) -> float:
    """Trace of the generalized Gauss-Newton matrix, Monte-Carlo estimate.

    Dangel et al., *BackPACK*, ICLR 2020. Where samples influence each other, that of the network as
    a function of the whole batch: `GGNTraceJointMC`.
    """
    return m.first_of("ggn_trace_mc", "ggn_trace_joint_mc")


@_quantity("ggn_trace_exact")
def ggn_trace_exact(m: Measurement) -> float:
    """The same, exact: one backward pass per output entry of a sample."""
    return m.sum_of("ggn_trace_exact")


@_quantity("hessian_trace_mc")
def hessian_trace(m: Measurement) -> float:
    """Trace of the Hessian by Hutchinson's estimator.

    Its cost does not grow with the number of outputs.
    """
    return m.sum_of("hessian_trace_mc")


@_quantity("ggn_max_eigenvalue", per_layer=False)
def ggn_max_eigenvalue(m: Measurement) -> float:
    """Largest eigenvalue of the Gauss-Newton matrix of all parameters; see `MaxEigenvalue`."""
    return m.any_of("ggn_max_eigenvalue")


@_quantity("hessian_max_eigenvalue", per_layer=False)
def hessian_max_eigenvalue(m: Measurement) -> float:
    """Largest eigenvalue of the Hessian of all parameters, the sharpness; see `MaxEigenvalue`."""
    return m.any_of("hessian_max_eigenvalue")


@_quantity("batch_l2", "sum_grad_squared")
def mean_gsnr(m: Measurement) -> Tensor:
    r"""Mean over the entries of $\bar g_j^2 / \widehat{\mathrm{Var}}\,g_j$.

    Entries without variance are left out. Gradient signal-to-noise ratio; pure noise has $1/B$. Liu
    et al., *Understanding why neural networks generalize well through GSNR of parameters*, ICLR
    2020, eq. 3.
    """
    totals, counts = [], []
    for square, variance in m.entry_moments():
        totals.append(torch.where(variance > 0, square / variance, 0).sum())
        counts.append((variance > 0).sum())
    return torch.stack(on_one_device(totals)).sum() / torch.stack(on_one_device(counts)).sum()


@_quantity("batch_l2", "sum_grad_squared")
def early_stopping(m: Measurement) -> Tensor:
    r"""$1 - B\,\mathrm{mean}_j\,\bar g_j^2 / \widehat{\mathrm{Var}}\,g_j$: positive in mere noise.

    The evidence-based criterion; meant for plain SGD. Mahsereci et al., *Early stopping without a
    validation set*, arXiv:1703.09580, 2017, eq. 7.
    """
    return 1 - mean_gsnr(m) / m.concentration


@_quantity("batch_l2")
def grad_diversity(m: Measurement) -> float:
    r"""$\sum_n \|g_n\|^2 / \|\sum_n g_n\|^2$, from $1/B$ (equal gradients) upwards.

    Batches up to $B$ times this speed training up. Yin et al., *Gradient diversity*, AISTATS 2018,
    definition 1.
    """
    return _ratio(functional.gradient_diversity(*m.moments))


@_quantity("batch_l2")
def norm_test(m: Measurement) -> float:
    r"""$\sqrt{c\,\widehat{\mathrm{tr}\,\Sigma}} / \|\bar g\|$, relative error of the gradient.

    Above a θ of the user's choice the batch should grow. Byrd et al., *Sample size selection in
    optimization methods for machine learning*, Math. Programming 2012, eq. 3.5.
    """
    return np.sqrt(_ratio(functional.norm_test(*m.moments)))


@_quantity("batch_l2", "jacobian_grad")
def inner_product_test(m: Measurement) -> float:
    r"""$\sqrt{c\,\widehat{\mathrm{Var}}(g_n \cdot \bar g)} / \|\bar g\|^2$: error along $\bar g$.

    The part of the norm test's in that direction. Bollapragada, Byrd & Nocedal, *Adaptive sampling
    strategies for stochastic optimization*, SIAM J. Optim. 2018, eq. 2.6.
    """
    return np.sqrt(
        _ratio(functional.inner_product_test(m.dot_second, m.grad_sq_norm, m.concentration))
    )


@_quantity("batch_l2", "jacobian_grad")
def orthogonality_test(m: Measurement) -> float:
    r"""Relative error of the gradient orthogonal to $\bar g$.

    Root of the mean square of the $g_n$ orthogonal to $\bar g$, times $\sqrt{c / (1 - c)}$, over
    $\|\bar g\|$. The other part: its square and that of the inner product test add up to the norm
    test's. Bollapragada et al., 2018, eq. 3.2.
    """
    parts = functional.orthogonality_test(
        m.second_moment, m.dot_second, m.grad_sq_norm, m.concentration
    )
    return np.sqrt(_ratio(parts))


@_quantity("batch_l2", per_layer=False)
def cabs(m: Measurement) -> float:
    r"""$\mathrm{lr}\,\widehat{\mathrm{tr}\,\Sigma} / \ell$: batch size for plain SGD.

    For a loss $\ell$ with minimum 0. Balles, Romero & Hennig, *Coupling adaptive batch sizes with
    learning rates*, UAI 2017, eq. 22.
    """
    return _ratio(functional.coupled_batch_size(m.variance, m.loss, m.lr))


@_quantity("batch_l2", "ggn_trace_mc")
def tic_trace(m: Measurement) -> float:
    r"""$\sum_n w_n \|g_n\|^2 / \mathrm{tr}\,G$, approximates the Takeuchi information criterion.

    By scalars. Thomas et al., *On the interplay between noise and curvature and its effect on
    optimization and generalization*, AISTATS 2020, section 4.
    """
    return m.second_moment / (m.sum_of("ggn_trace_mc") + EPS)


@_quantity("batch_l2", "sum_grad_squared", "diag_ggn_mc")
def tic_diag(m: Measurement) -> Tensor:
    r"""$\sum_j \sum_n w_n g_{nj}^2 / G_{jj}$, the diagonal approximation; ibid."""
    diagonal = m.mean_of("diag_ggn_mc")
    terms = [
        (second / (diagonal[p] + EPS)).sum()
        for p, second in m.second_moments().items()
        if p in diagonal
    ]
    return torch.stack(on_one_device(terms)).sum()


# ‖θ_t − θ_0‖, ‖θ_{t+1} − θ_t‖ and the position in the local parabola: see `Trajectory`.
_of_the_course("update_size")
_of_the_course("distance")
_of_the_course("alpha")

# Counts of all entries of the $g_n$, and of pairs of such an entry and the value of its parameter,
# for loggers that take histograms and images. Schneider, Dangel & Hennig, *Cockpit*, NeurIPS 2021,
# section 2.2. All B times P entries are formed, a few samples at a time. See `histograms`.
_picture(ONE)
_picture(TWO)
