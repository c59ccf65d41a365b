"""Findings in words: a function per rule, each with its threshold.

Nothing is said where the data do not carry it, which a rule tells by `Lacking`.

"Three quarters of the values" means that the quartile of a series is beyond the threshold, so that
single values decide nothing. Curves are those of the second half of a run, or its last third beside
the first.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from lightning_curv.callbacks.run_report.evidence import (
    Evidence,
    Finding,
    Lacking,
    enough,
    factor,
    number,
    quartiles,
    rule,
)

BATCH_FACTOR = 2.0  # between batch size and noise scale
LEAST_NOISE = 20  # noise scales, each a running average, of half a run
UNRESOLVED = 0.5  # share of steps whose gradient is not told from noise
GROWTH = 3.0  # of the noise scale
EXPLOSION = 10.0  # of the gradient norm
SPIKE = 20.0  # times the median
VANISHED = 1e-4  # of the largest layer, per entry
LEAST_LAYERS = 4
OUTLIER = 10.0  # the largest gradient of a sample beside their median
NOISE_ONLY = 0.0  # of the criterion of early stopping
EDGE = 0.8  # of the sharpness at which SGD becomes unstable
OFF_CENTRE = 0.5  # of alpha, in which 0 is the minimum and -1 the start


@rule(f"Three quarters of the noise scales in the second half are above {BATCH_FACTOR:g} batches.")
def batch_below_noise_scale(seen: Evidence) -> Finding | None:
    """Larger batches would save steps."""
    batch, (low, middle, high) = _batch(seen), quartiles(_noise_scales(seen))
    if low < BATCH_FACTOR * batch:
        return None
    return Finding(
        "advice",
        f"The batch of {number(batch)} is {factor(middle / batch)} below the noise scale",
        f"In the second half of the run the noise scale is {_range(low, middle, high)} samples. "
        "Up to about that size a larger batch, or more accumulated ones, saves steps almost in "
        "proportion; at this one, a step is mostly noise.",
    )


@rule(f"Three quarters of the noise scales in the second half are below 1/{BATCH_FACTOR:g} batch.")
def batch_above_noise_scale(seen: Evidence) -> Finding | None:
    """Smaller batches would save samples."""
    batch, (low, middle, high) = _batch(seen), quartiles(_noise_scales(seen))
    if high * BATCH_FACTOR > batch:
        return None
    return Finding(
        "advice",
        f"The batch of {number(batch)} is {factor(batch / middle)} above the noise scale",
        f"In the second half of the run the noise scale is {_range(low, middle, high)} samples. "
        "Samples beyond it hardly change the gradient: a smaller batch reaches the same loss "
        "with fewer of them.",
    )


@rule(f"In {UNRESOLVED:.0%} of the steps of the second half the measured signal is not positive.")
def gradient_is_not_resolved(seen: Evidence) -> Finding | None:
    """The signal is zero within its error."""
    signals = seen.second_half("grad_signal")
    share = sum(signal <= 0 for signal in signals) / len(signals)
    if share < UNRESOLVED:
        return None
    return Finding(
        "warning",
        "The batches are too small to tell the gradient from noise",
        f"In {share:.0%} of the logged steps of the second half the squared norm of the gradient, "
        "less its noise, is not positive. The noise scale is then larger than these batches can "
        "show.",
    )


@rule(f"The median noise scale of the last third is {GROWTH:g} × that of the first third.")
def noise_scale_grows(seen: Evidence) -> Finding | None:
    """A schedule of batch sizes would pay."""
    first, last = map(statistics.median, seen.thirds("noise_scale"))
    if last < GROWTH * first:
        return None
    return Finding(
        "note",
        f"The noise scale grew {factor(last / first)}",
        f"From {number(first)} samples in the first third of the run to {number(last)} in the "
        "last one. A batch that grows on the way has the small batch's economy early and the "
        "large one's progress late.",
    )


@rule("The median loss of the last third is not below that of the first third.")
def loss_does_not_fall(seen: Evidence) -> Finding | None:
    """Nothing was learned, or it was lost again."""
    first, last = map(statistics.median, seen.thirds("loss"))
    if last < first:
        return None
    return Finding(
        "warning",
        "The training loss did not fall",
        f"Its median is {number(first)} in the first third of the run and {number(last)} in the "
        "last one.",
    )


@rule(f"The median gradient norm of the last third is {EXPLOSION:g} × that of the first third.")
def gradient_norm_explodes(seen: Evidence) -> Finding | None:
    """Over the course of the run."""
    first, last = map(statistics.median, seen.thirds("grad_norm"))
    if first <= 0 or last < EXPLOSION * first:
        return None
    return Finding(
        "warning",
        f"The gradient norm grew {factor(last / first)}",
        f"Its median is {number(first)} in the first third of the run and {number(last)} in the "
        "last one. A smaller learning rate or clipping keeps it in bounds.",
    )


@rule(f"The largest gradient norm of the run is {SPIKE:g} × the median.")
def gradient_norm_has_a_spike(seen: Evidence) -> Finding | None:
    """In a single step."""
    middle = statistics.median(enough(seen.values("grad_norm"), "values of grad_norm"))
    step, largest = seen.largest.get("grad_norm", (0, 0.0))
    if middle <= 0 or largest < SPIKE * middle:
        return None
    return Finding(
        "warning",
        f"The gradient norm had a spike at step {step}",
        f"It was {number(largest)}, {factor(largest / middle)} the median of the run. Look at the "
        "batch of that step.",
    )


@rule(
    "In three quarters of the steps of the second half, a layer's gradient is per entry below "
    f"{VANISHED:g} × that of the layer with the largest ({LEAST_LAYERS} layers or more)."
)
def gradients_of_layers_vanish(seen: Evidence) -> Finding | None:
    """Root mean square of a gradient's entries, beside that of the layer where it is largest."""
    layers = {name: enough(s, "steps with layers") for name, s in _relative_norms(seen).items()}
    shares = {name: quartiles(values) for name, values in layers.items()}
    # Zero in all steps is another finding.
    vanished = [
        name for name, (_, _, high) in shares.items() if high < VANISHED and any(layers[name])
    ]
    if not vanished:
        return None
    smallest = min(vanished, key=lambda name: shares[name][1])
    largest = max(shares, key=lambda name: shares[name][1])
    names = "layer" if len(vanished) == 1 else "layers"
    return Finding(
        "warning",
        f"Gradients of {names} {_listed(vanished)} vanish",
        f"In the second half of the run the gradient of {smallest} is, per entry, "
        f"{number(shares[smallest][1])} × that of {largest}. Such layers hardly learn under one "
        "learning rate for all, unless the optimizer rescales them.",
    )


@rule("A layer's gradient is zero in every step of the second half.")
def layers_get_no_gradient(seen: Evidence) -> Finding | None:
    """Dead, or not part of the loss."""
    norms = _second_half_of_layers(seen)
    dead = [name for name, values in norms.items() if not any(enough(values, "steps with layers"))]
    if not dead:
        return None
    names, verb = ("Layer", "gets") if len(dead) == 1 else ("Layers", "get")
    return Finding(
        "warning",
        f"{names} {_listed(dead)} {verb} no gradient",
        "It is exactly zero in all logged steps of the second half of the run: dead units, or no "
        "path to the loss.",
    )


@rule(
    "Three quarters of the largest gradients of a sample in the second half are above "
    f"{OUTLIER:g} × those of the median sample."
)
def single_samples_dominate(seen: Evidence) -> Finding | None:
    """Outliers, wrong labels."""
    largest, middle = (
        seen.second_half("sample_norm_max"),
        seen.second_half("sample_norm_median"),
    )
    if len(largest) != len(middle):
        raise Lacking("needs both sample norms in the same steps")
    ratios = [top / usual for top, usual in zip(largest, middle, strict=True) if usual > 0]
    low, typical, _ = quartiles(enough(ratios, "steps with sample norms that are not zero"))
    if low < OUTLIER:
        return None
    return Finding(
        "note",
        f"Single samples dominate: the largest gradient is {factor(typical)} the median one",
        "So it is in the typical batch of the second half of the run. Where most samples are "
        "learned the few others stand out; where not, look for outliers and wrong labels.",
    )


@rule("Three quarters of the values of `early_stopping` in the second half are positive.")
def gradient_is_noise(seen: Evidence) -> Finding | None:
    """The evidence-based criterion (Mahsereci et al., 2017)."""
    low, _, _ = quartiles(seen.second_half("early_stopping"))
    if low <= NOISE_ONLY:
        return None
    return Finding(
        "note",
        "The gradient is mere noise: training could stop",
        "The evidence-based criterion of Mahsereci et al. is positive in the second half of the "
        "run: gradients are no larger than chance would make them.",
    )


@rule(
    "SGD: three quarters of the largest Hessian eigenvalues in the second half are above "
    f"{EDGE:g} × 2 (1 + momentum) / learning rate."
)
def sharpness_is_at_the_edge(seen: Evidence) -> Finding | None:
    """The eigenvalue hovers around the limit.

    Cohen et al., *Gradient descent on neural networks typically occurs at the edge of stability*,
    ICLR 2021.
    """
    if seen.sgd is None:
        raise Lacking("needs plain SGD")
    sharpness, rates = seen.second_half("hessian_max_eigenvalue"), _rates(seen)
    # The limit of gradient descent with heavy-ball momentum on a quadratic.
    limits = [2 * (1 + seen.sgd) / rate for rate in rates]
    low, typical, _ = quartiles([s / limit for s, limit in zip(sharpness, limits, strict=True)])
    if low < EDGE:
        return None
    return Finding(
        "note",
        "Training is at the edge of stability",
        f"The largest eigenvalue of the Hessian is typically {factor(typical)} the limit 2 (1 + "
        "momentum) / learning rate, above which steps grow along its eigenvector. A larger "
        "learning rate will not train faster.",
    )


@rule(f"Three quarters of the values of `alpha` in the second half are below -{OFF_CENTRE:g}.")
def steps_are_short(seen: Evidence) -> Finding | None:
    """Of the minimum along their direction."""
    _, middle, high = quartiles(seen.second_half("alpha"))
    if high > -OFF_CENTRE:
        return None
    return Finding(
        "advice",
        "Steps end far before the minimum along their direction",
        f"The median of alpha is {number(middle)} in the second half of the run (-1 is the start, "
        "0 the minimum of a parabola through the step): a larger learning rate goes further.",
    )


@rule(f"Three quarters of the values of `alpha` in the second half are above {OFF_CENTRE:g}.")
def steps_overshoot(seen: Evidence) -> Finding | None:
    """The minimum along their direction."""
    low, middle, _ = quartiles(seen.second_half("alpha"))
    if low < OFF_CENTRE:
        return None
    return Finding(
        "advice",
        "Steps overshoot the minimum along their direction",
        f"The median of alpha is {number(middle)} in the second half of the run (0 is the minimum "
        "of a parabola through the step, 1 its other side): a smaller learning rate jumps less.",
    )


def _batch(seen: Evidence) -> float:
    return statistics.median(seen.second_half("samples"))


def _noise_scales(seen: Evidence) -> Sequence[float]:
    """In the second half, where most steps tell the gradient from noise."""
    noise = seen.second_half("noise_scale")
    if "grad_signal" in seen.series:
        steps, signals = seen.series["grad_signal"]
        half = len(signals) // 2
        positive = sum(signal > 0 for signal in signals[half:])
        if positive <= (1 - UNRESOLVED) * len(signals[half:]):
            raise Lacking(
                f"needs a signal above zero in most steps, there are {positive} of "
                f"{len(signals[half:])}"
            )
        points = zip(*seen.series["noise_scale"], strict=True)
        # By step: the noise scale has gaps, so that half of its values is not half of the run.
        noise = [value for step, value in points if step >= steps[half]]
    return enough(noise, "noise scales in the second half", LEAST_NOISE)


def _rates(seen: Evidence) -> list[float]:
    """Learning rates at the steps that have an eigenvalue, of the second half."""
    by_step = dict(zip(*seen.series.get("learning_rate", ((), ())), strict=True))
    steps = seen.series["hessian_max_eigenvalue"][0]
    rates = [by_step.get(step, 0.0) for step in steps[len(steps) // 2 :]]
    if not all(rate > 0 for rate in rates):
        raise Lacking("needs the learning rate of every step")
    return rates


def _second_half_of_layers(seen: Evidence) -> dict[str, list[float]]:
    """Gradient norms by layer."""
    if "grad_norm" not in seen.layers:
        raise Lacking("needs grad_norm of the layers")
    rows: Sequence[Mapping[str, float]] = seen.layers["grad_norm"][1]
    rows = rows[len(rows) // 2 :]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row[name] for row in rows if name in row] for name in names}


def _relative_norms(seen: Evidence) -> dict[str, list[float]]:
    """Root mean squares of gradients' entries over the largest of them, in the second half."""
    norms = _second_half_of_layers(seen)
    if len(norms) < LEAST_LAYERS:
        raise Lacking(f"needs {LEAST_LAYERS} layers, there are {len(norms)}")
    steps = {len(values) for values in norms.values()}
    if len(steps) > 1:
        raise Lacking("needs all layers in the same steps")
    roots = {
        # norms grow with the root of a layer's size
        name: [value / seen.sizes.get(name, 1) ** 0.5 for value in values]
        for name, values in norms.items()
    }
    largest = [max(column) for column in zip(*roots.values(), strict=True)]
    return {
        name: [value / most for value, most in zip(values, largest, strict=True) if most > 0]
        for name, values in roots.items()
    }


def _range(low: float, middle: float, high: float) -> str:
    return f"{number(middle)} (half of the time between {number(low)} and {number(high)})"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
