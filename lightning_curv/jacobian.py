"""The former home of `Jacobian`, which is `lightning_curv.terms.Jacobian` now."""

from lightning_curv.terms import Jacobian

__all__ = ["Jacobian"]
