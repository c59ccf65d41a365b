"""Warnings of the optimizers."""

from __future__ import annotations

import warnings


def warn(message: str) -> None:
    """Warn that the optimizer did not do what was asked of it."""
    warnings.warn(f"The optimizer {message}", RuntimeWarning, stacklevel=2)
