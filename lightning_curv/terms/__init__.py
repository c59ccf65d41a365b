"""The mathematics: derivatives of samples as contractions that are not carried out, and sums."""

from lightning_curv.terms.jacobian import Jacobian
from lightning_curv.terms.term import Term

__all__ = ["Jacobian", "Term"]
