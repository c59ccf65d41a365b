"""Warnings of the optimizers."""

import warnings


def warn(message: str) -> None:
    """Warn that the optimizer did not do what was asked of it."""
    warnings.warn(f"The optimizer {message}", RuntimeWarning, stacklevel=2)
