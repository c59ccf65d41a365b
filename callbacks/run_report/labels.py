"""What charts are called, which series they show, and the units of their axes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Chart:
    """Series that share an axis.

    Args:
        title: of the chart.
        unit: of its vertical axis.
        series: their names.
        note: what to look for.
    """

    title: str
    unit: str
    series: tuple[str, ...]
    note: str = ""


CHARTS = (
    Chart("Training loss", "loss", ("loss",), "Of the logged batches."),
    Chart(
        "Noise scale",
        "samples",
        ("noise_scale", "suggested_batch_size", "samples"),
        "The batch size at which a gradient is as much noise as signal.",
    ),
    Chart(
        "Gradient norm",
        "norm",
        ("grad_norm",),
        "Of the whole gradient, before clipping.",
    ),
    Chart(
        "Entries of the gradient",
        "derivative",
        ("grad_max", "grad_std", "grad_mean"),
        "Of all parameters together.",
    ),
    Chart("Zeros in the gradient", "share of the entries", ("sparsity",)),
    Chart(
        "Gradient norms of samples",
        "norm",
        ("sample_norm_median", "sample_norm_p5", "sample_norm_p95", "sample_norm_max"),
        "The band holds 90 % of the samples.",
    ),
    Chart(
        "Noise of the gradient",
        "norm²",
        ("grad_variance",),
        "Trace of the covariance of the gradients of the samples.",
    ),
    Chart(
        "Signal of the gradient",
        "norm²",
        ("grad_signal",),
        "Squared norm without the noise of the batch; negative where it is not resolved.",
    ),
    Chart(
        "Trace of the curvature",
        "trace",
        ("ggn_trace", "ggn_trace_exact", "hessian_trace"),
        "Of the generalized Gauss-Newton matrix and of the Hessian.",
    ),
    Chart(
        "Largest eigenvalue of the curvature",
        "eigenvalue",
        ("ggn_max_eigenvalue", "hessian_max_eigenvalue"),
        "The sharpness: what limits the learning rate.",
    ),
    Chart("Learning rate", "learning rate", ("learning_rate",), "Of the first parameter group."),
    Chart("Size of the updates", "norm", ("update_size",), "How far a step moves the parameters."),
    Chart("Distance from the start", "norm", ("distance",)),
    Chart(
        "Position in the local parabola",
        "α",
        ("alpha",),
        "-1 is the start of a step, 0 the minimum along it, 1 the other side.",
    ),
    Chart(
        "Relative errors of the gradient",
        "share of the norm",
        ("norm_test", "inner_product_test", "orthogonality_test"),
        "Above a threshold of yours, the batch should grow.",
    ),
    Chart("Gradient diversity", "ratio", ("grad_diversity",)),
    Chart("Signal-to-noise ratio", "ratio", ("mean_gsnr",), "Mean over the entries."),
    Chart("Batch size by CABS", "samples", ("cabs",), "For plain SGD."),
    Chart("Early-stopping criterion", "criterion", ("early_stopping",), "Positive: mere noise."),
    Chart("Takeuchi information criterion", "TIC", ("tic_trace", "tic_diag")),
)

NAMES = {
    "loss": "loss",
    "samples": "batch of this run",
    "noise_scale": "noise scale",
    "suggested_batch_size": "suggested batch",
    "grad_norm": "gradient norm",
    "grad_max": "largest magnitude",
    "grad_std": "standard deviation",
    "grad_mean": "mean",
    "grad_signal": "gradient signal",
    "grad_variance": "gradient noise",
    "ggn_trace": "GGN trace",
    "ggn_trace_exact": "GGN trace, exact",
    "hessian_trace": "Hessian trace",
    "ggn_max_eigenvalue": "GGN",
    "hessian_max_eigenvalue": "Hessian",
    "sample_norm_median": "median",
    "sample_norm_p5": "5 %",
    "sample_norm_p95": "95 %",
    "sample_norm_max": "maximum",
}


def name_of(series: str) -> str:
    """As a legend says it.

    Example:
        >>> name_of("ggn_trace_exact"), name_of("my_number")
        ('GGN trace, exact', 'my number')
    """
    return NAMES.get(series, series.replace("_", " "))


def charts_of(series: Collection[str]) -> list[Chart]:
    """The charts for these series; one that is unknown gets a chart of its own.

    Example:
        >>> [chart.title for chart in charts_of(["samples", "grad_norm", "my_number"])]
        ['Gradient norm', 'my number']
    """
    charts = [
        Chart(chart.title, chart.unit, shown, chart.note)
        for chart in CHARTS
        if (shown := tuple(name for name in chart.series if name in series))
        # the batch is a mark beside the noise scale, no chart of its own
        and shown != ("samples",)
    ]
    known = {name for chart in CHARTS for name in chart.series}
    return charts + [Chart(name_of(n), name_of(n), (n,)) for n in series if n not in known]


def split(name: str) -> tuple[str, str]:
    """A series and the optimizer that it is of, if there are several.

    Example:
        >>> split("grad_norm/optimizer_1"), split("grad_norm")
        (('grad_norm', 'optimizer_1'), ('grad_norm', ''))
    """
    series, _, optimizer = name.partition("/")
    return series, optimizer
