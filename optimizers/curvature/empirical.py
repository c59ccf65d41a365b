"""Curvature for losses that have none: optimizers take the empirical Fisher matrix instead."""

from __future__ import annotations

from lightning_curv.errors import NoSecondDerivativeError, UnsupportedError
from lightning_curv.extensions import Extension
from lightning_curv.extensions.columns import Chosen, EmpiricalFisher, Source
from lightning_curv.optimizers.warn import warn
from lightning_curv.passes.passes import Passes


class Curved(Chosen):
    """The columns of a source, or the fitted `EmpiricalFisher` where the loss gives it none.

    A warning says so the first time. That is where a loss that torch has no function for has no
    second derivative, and where it is piecewise linear, so that all of its curvature is zero.

    Args:
        source: What is to be taken as long as there is curvature.
        told: Warnings that were given.
    """

    def __init__(self, source: Source, told: set[str]) -> None:
        self.source = source
        self._told = told

    def on(self, passes: Passes) -> Source:
        """The source for some passes."""
        try:
            is_flat = all(part.flat for part in passes.parts)
        except NoSecondDerivativeError:
            reason = "the loss has no second derivative"
        except UnsupportedError:
            # It is raised again, with its own message, by the source that needs what is missing.
            return self.source
        else:
            if not is_flat:
                return self.source
            reason = "the curvature of the loss is zero"
        if reason not in self._told:
            warn(
                "takes the empirical Fisher matrix (the gradients of the samples) as curvature: "
                f"{reason}."
            )
            self._told.add(reason)
        return EmpiricalFisher(fitted=True)


def curved(*extensions: Extension) -> None:
    """Make the columns of extensions of one optimizer `Curved`."""
    told: set[str] = set()
    for extension in extensions:
        assert not isinstance(extension.source, Chosen), "curvature of another optimizer"
        extension.source = Curved(extension.source, told)
