"""Monte-Carlo estimates beside the exact value."""

import torch

RUNS = 100


def assert_unbiased(estimates: torch.Tensor, exact: torch.Tensor, label: str) -> None:
    """The mean of independent estimates [RUNS, …] is within six of its standard errors of the exact value.

    Six standard errors fail by chance about once in 1e8 entries; that the largest entry's tolerance
    stays below half its value shows that a wrong constant (2, N, M) would be found.
    """
    mean, error = estimates.mean(0), estimates.std(0) / len(estimates) ** 0.5
    largest = exact.abs().argmax()
    assert 6 * error.flatten()[largest] < 0.5 * exact.flatten()[largest].abs(), (
        f"{label}: too few samples to tell"
    )
    excess = (mean - exact).abs() - 6 * error - 1e-9 * exact.abs().max()
    assert excess.max() <= 0, f"{label}: {excess.max():.2e} beyond six standard errors"
