"""Extensions around the user's backward passes of one batch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_curv.backprop import Backprop
from lightning_curv.extensions.base import Extension, GraphExtension

AnyExtension = Extension | GraphExtension
Fields = dict[str, dict[Parameter, Any]]  # results by savefield and parameter


class Observation:
    """What is computed in one batch; nothing by default.

    Args:
        supplied: stays on the parameters until `release`.
        logged: leaves the parameters after every backward pass.
        generator: of random labels.
        output: the network's output, if the loss is no known function.
    """

    def __init__(
        self,
        supplied: Sequence[AnyExtension] = (),
        logged: Sequence[AnyExtension] = (),
        generator: torch.Generator | None = None,
        output: nn.Module | None = None,
    ) -> None:
        self.supplied, self.logged = list(supplied), list(logged)
        self._generator, self._output = generator, output
        self._backprop: Backprop | None = None
        self._failures: list[tuple[tuple[AnyExtension, ...], Exception]] = []

    def __bool__(self) -> bool:
        return bool(self.supplied or self.logged)

    def begin(self, loss: Tensor, seed: Tensor, check: bool) -> None:
        """Before a backward pass.

        Args:
            loss: the root of the pass, or a tensor below it.
            seed: the gradient there of the loss as the user returned it: curvature is that of this loss, not of what
                Lightning scaled. First-order quantities come from the user's own pass and carry its factor.
            check: do the per-sample gradients add up to the gradient?
        """
        fields = {extension.savefield for extension in self.supplied}
        extensions = [*self.supplied, *(e for e in self.logged if e.savefield not in fields)]
        backprop = self._backprop = Backprop(
            loss, extensions, self._generator, None, check, seed, defer=True, output=self._output
        )
        backprop.before()
        self._failures, backprop.failures = backprop.failures, []

    def finish(self) -> None:
        """After the backward pass: set the results on the parameters."""
        backprop, self._backprop = self._backprop, None
        if backprop is not None:
            backprop.after()
            self._failures = backprop.failures

    def failures(self) -> Iterator[tuple[set[str], Exception]]:
        """Savefields that could not be computed and why, each only once."""
        while self._failures:
            extensions, error = self._failures.pop()
            fields = {extension.savefield for extension in extensions}
            self.logged = [e for e in self.logged if e.savefield not in fields]
            self.supplied = [e for e in self.supplied if e.savefield not in fields]
            yield fields, error

    def collect(self, params: Iterable[Parameter]) -> Fields:
        """Take the logged results off the parameters."""
        params = list(params)
        found: Fields = {
            name: {p: getattr(p, name) for p in params if hasattr(p, name)}
            for name in (extension.savefield for extension in self.logged)
        }
        delete_fields(params, found.keys() - {extension.savefield for extension in self.supplied})
        return found

    def release(self, params: Iterable[Parameter]) -> None:
        """Leave nothing of this batch behind."""
        if self._backprop is not None:
            self._backprop.abort()
            self._backprop = None
        delete_fields(params, {extension.savefield for extension in (*self.supplied, *self.logged)})


def delete_fields(params: Iterable[Parameter], fields: Collection[str]) -> None:
    """Delete attributes of parameters, where they exist."""
    for param in params if fields else ():
        for field in vars(param).keys() & set(fields):
            delattr(param, field)


def required_extensions(optimizers: Iterable[Optimizer], partial: bool) -> list[AnyExtension]:
    """What optimizers ask for, of each savefield the first; `partial`: from a micro-batch that is not the last one."""
    wanted = "accumulated_extensions" if partial else "required_extensions"
    by_field: dict[str, AnyExtension] = {}
    for optimizer in optimizers:
        for extension in getattr(optimizer, wanted, tuple)():
            by_field.setdefault(extension.savefield, extension)
    return list(by_field.values())


def explained(error: Exception, names: Sequence[str]) -> RuntimeError:
    """The error with the quantities that it stops, and what to do."""
    kind = type(error) if isinstance(error, RuntimeError) else RuntimeError
    return kind(
        f"{error} (CurvatureCallback needs this for {', '.join(names)}. `mc_samples=0` leaves out the GGN trace and "
        "`quantities` chooses what is computed; `strict=False` trains on without.)"
    )
