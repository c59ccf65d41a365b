"""What a private run guarantees, as a table for people."""

from __future__ import annotations

from lightning_curv.optimizers.privacy.accounting import (
    EpochSampling,
    PoissonSampling,
    PrivacyAccountant,
    Sampling,
    TruncatedPoissonSampling,
)


def guarantee(epsilon: float, delta: float, sampling: Sampling | None) -> str:
    """One line: ε, δ and the neighbouring relation they hold for."""
    relation = "no release yet" if sampling is None else f"neighbours: {sampling.neighbours}"
    return f"ε = {epsilon:.4g} at δ = {delta:g}, {relation}"


def summary_table(
    accountant: PrivacyAccountant,
    budget: float | None,
    delta: float,
    clip_norm: float | None,
    sampling: Sampling | None,
) -> str:
    """A table of the guarantee and of the releases that it is made of.

    Args:
        accountant: The account.
        budget: ε that is not to be exceeded.
        delta: δ.
        clip_norm: C as it is now.
        sampling: Of the next release.
    """
    history = accountant.history
    known = history[-1][0] if history else sampling
    limit = "no budget" if budget is None else f"budget {budget:g}"
    facts = {
        "epsilon": f"{accountant.epsilon(delta):.4g} ({limit})",
        "delta": f"{delta:g}",
        "relation": "not known before the first batch"
        if known is None
        else f"{known.relation}: {known.neighbours}",
        "released": "all weights during and after training",
        "accountant": f"dp-accounting, {accountant.method.upper()}",
        "clip norm C": "not known before the first batch"
        if clip_norm is None
        else f"{clip_norm:.4g}",
    }
    rows = [("sampling", "rate q", "noise multiplier", "releases")]
    rows += [
        (*_drawn(how), f"{sigma:.4g}", f"{count} {_unit(how)}") for how, sigma, count in history
    ]
    widths = [max(len(row[k]) for row in rows) for k in range(4)]
    lines = [f"{name:<12} {value}" for name, value in facts.items()]
    lines += [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def _drawn(sampling: Sampling) -> tuple[str, str]:
    if isinstance(sampling, TruncatedPoissonSampling):
        kept = f"at most {sampling.max_batch_size} of {sampling.dataset_size}"
        return f"truncated Poisson, {kept}", f"{sampling.sampling_rate:.4g}"
    if isinstance(sampling, PoissonSampling):
        return "Poisson", f"{sampling.sampling_rate:.4g}"
    return "every sample once per epoch", "1"


def _unit(sampling: Sampling) -> str:
    return "epochs" if isinstance(sampling, EpochSampling) else "steps"
