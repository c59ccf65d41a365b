"""What comes of a quantity on a network: right, refused (and for which reason), wrong, crash, slow or unverified."""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from measure import bounded
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import lightning_curv
import lightning_curv.errors
from lightning_curv import curvature
from zoo.network import Network, Problem
from zoo.references import NoReferenceError, Reference, largest

Check = Callable[[Reference, str, Any], tuple[float, float, float]]


@dataclass
class Cell:
    """One quantity on one network.

    Attributes:
        model: name of the network.
        suite: that it belongs to.
        quantity: name of the extension.
        outcome: ``right``, ``refused``, ``wrong``, ``crash``, ``slow``, ``unverified`` or
            ``skipped``.
        cause: of a refusal.
        justified: whether a refusal is the right answer.
        message: first lines of the error, or what is wrong.
        warning: of the library, for example that an op is slow.
        seconds: that the quantity took, with those that shared its backward pass.
    """

    model: str
    suite: str
    quantity: str
    outcome: str
    cause: str = ""
    justified: bool = True
    message: str = ""
    warning: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        blame = f" ({self.cause}{'' if self.justified else ', unjustified'})" if self.cause else ""
        what = f"{self.suite} {self.model} {self.quantity}: {self.outcome}{blame}"
        return f"{what} {self.seconds:.2f} s {self.message[:150]}"

    def report(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "seconds": round(self.seconds, 3)}


def _entries(wanted: Callable[[Reference], dict[str, Tensor]]) -> Check:
    """Compare with a reference: distance, size, and size of the largest over the parameters."""

    def check(reference: Reference, name: str, found: Any) -> tuple[float, float, float]:
        values = wanted(reference)
        if not isinstance(found, Tensor):
            found = found(reference.vector(name))
        if found.shape != values[name].shape:
            return math.inf, 0, 0
        return (
            largest(found - values[name]),
            largest(values[name]),
            max(map(largest, values.values())),
        )

    return check


def _finite(reference: Reference, name: str, found: Any) -> tuple[float, float, float]:
    """Tensors of the parameter's shape, or square factors, without inf and NaN."""
    shape = reference.parameters[name].shape
    if isinstance(found, Tensor):
        right = found.shape == shape and bool(found.isfinite().all())
    else:
        right = len(found) > 0 and all(bool(factor.isfinite().all()) for factor in found)
    return (0 if right else math.inf), 0, 0


CHECKS: dict[str, Check] = {
    "BatchGrad": _entries(lambda r: r.grad_batch),
    "BatchL2Grad": _entries(
        lambda r: {name: g.reshape(len(g), -1).square().sum(1) for name, g in r.grad_batch.items()}
    ),
    "Variance": _entries(
        lambda r: {name: g.var(0, unbiased=False) for name, g in r.grad_batch.items()}
    ),
    "SumGradSquared": _entries(
        lambda r: {name: g.square().sum(0) for name, g in r.grad_batch.items()}
    ),
    "DiagGGNExact": _entries(lambda r: r.diag_ggn),
    "DiagGGNMC": _finite,
    "KFAC": _finite,
    "KFLR": _finite,
    "GGNMP": _entries(lambda r: r.ggnmp),
    "HMP": _entries(lambda r: r.hmp),
}
# Quantities of one group share a backward pass. `BatchGrad` is alone: others would read their
# values off its result.
GROUPS = (
    ("BatchGrad",),
    ("BatchL2Grad", "Variance", "SumGradSquared"),
    ("DiagGGNExact", "KFLR"),
    ("DiagGGNMC", "KFAC"),
    ("GGNMP",),
    ("HMP",),
)
PASSES = 5  # a network may take that many times the limit of one backward pass
PER_SAMPLE = ("BatchGrad", "BatchL2Grad", "Variance", "SumGradSquared")
PRODUCTS = ("GGNMP", "HMP")
COUPLED, NO_SECOND, OTHER = "coupled samples", "no second derivative", "other"
CAUSES = {
    NO_SECOND: r"second derivative (of|at the outputs)|differentiated twice|without a second derivative",
    COUPLED: r"influence each other|no choice keeps the samples apart|statistics of the batch|mix(es)? (them|samples)",
}


def cause_of(message: str) -> str:
    """The kind of a refusal, told by its message."""
    return next((cause for cause, pattern in CAUSES.items() if re.search(pattern, message)), OTHER)


def cells(
    network: Network, samples: int, quantities: Sequence[str], limit: float, alone: bool = False
) -> list[Cell]:
    """All quantities of one network."""
    name = network.name if samples == network.samples[0] else f"{network.name} N={samples}"
    try:
        with bounded(limit):
            problem = network.make(samples)
            reference = Reference(problem)
    except Exception as error:
        return [Cell(name, network.suite, "building", "skipped", message=_line(error))]
    rows: list[Cell] = []
    deadline = time.perf_counter() + PASSES * limit
    for group in GROUPS:
        wanted = [q for q in group if q in quantities]
        for part in [[q] for q in wanted] if alone else [wanted] * bool(wanted):
            if time.perf_counter() > deadline:
                rows += [
                    Cell(
                        name, network.suite, q, "skipped", message=f"> {PASSES * limit:g} s before"
                    )
                    for q in part
                ]
            else:
                rows += _group(network, name, problem, reference, part, limit)
    return rows


def _group(
    network: Network,
    name: str,
    problem: Problem,
    reference: Reference,
    quantities: Sequence[str],
    limit: float,
) -> list[Cell]:
    """Quantities of one backward pass; if it fails, each on its own."""
    run = _Run(network, name, problem, reference, limit)
    rows = run(quantities)
    if len(quantities) > 1 and any(cell.outcome in ("refused", "crash", "slow") for cell in rows):
        rows = [cell for quantity in quantities for cell in run([quantity])]
    if quantities[0] in PRODUCTS and rows[0].cause == NO_SECOND:
        rows += run(quantities, plain_attention=True)
    return rows


@dataclass
class _Run:
    """Runs of the library on one problem."""

    network: Network
    name: str
    problem: Problem
    reference: Reference
    limit: float

    def __call__(self, quantities: Sequence[str], plain_attention: bool = False) -> list[Cell]:
        """One backward pass, and what is wrong with its results."""
        suffix = " (plain attention)" if plain_attention else ""
        rows = [Cell(self.name, self.network.suite, q + suffix, "right") for q in quantities]
        extensions = [getattr(lightning_curv, quantity)() for quantity in quantities]
        start = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                attention = sdpa_kernel(SDPBackend.MATH) if plain_attention else nullcontext()
                with bounded(self.limit), attention:
                    with curvature(*extensions):
                        self.problem().backward()
                    fields = [self._values(extension) for extension in extensions]
            except Exception as error:
                for cell in rows:
                    self._failed(cell, error)
            else:
                for cell, quantity, values in zip(rows, quantities, fields):
                    self._judge(cell, quantity, values)
            finally:
                self._clear(extensions)
        slow = [
            str(w.message)
            for w in caught
            if "lightning_curv" in w.filename or "allback" in str(w.message)
        ]
        for cell in rows:
            cell.seconds, cell.warning = time.perf_counter() - start, slow[0][:300] if slow else ""
        return rows

    def _values(self, extension: Any) -> dict[str, Any]:
        """What the extension left on the parameters; products are carried out."""
        names = (
            self.reference.chosen
            if type(extension).__name__ in PRODUCTS
            else self.reference.parameters
        )
        values = {
            name: getattr(self.reference.parameters[name], extension.savefield, None)
            for name in names
        }
        return {
            name: f(self.reference.vector(name)) if callable(f) and not isinstance(f, Tensor) else f
            for name, f in values.items()
        }

    def _judge(self, cell: Cell, quantity: str, values: dict[str, Any]) -> None:
        """Compare with the reference."""
        if self.network.coupled and quantity in PER_SAMPLE:
            cell.outcome, cell.message = "wrong", "a value where samples influence each other"
            return
        if self.reference.hidden:
            cell.outcome, cell.message = (
                "wrong",
                f"nothing on {self.reference.hidden[0]}, which has a gradient",
            )
            return
        worst = 0.0
        try:
            with bounded(self.limit):
                for name, value in values.items():
                    if value is None:
                        cell.outcome, cell.message = "wrong", f"nothing on {name}"
                        return
                    distance, size, scale = CHECKS[quantity](self.reference, name, value)
                    error = distance / (self.reference.tolerance * (size + 0.1 * scale) or 1)
                    if not error <= max(1, worst):
                        worst = error if error == error else math.inf
                        cell.outcome = "wrong"
                        cell.message = (
                            f"{name}: off by {distance:.3g} of {size:.3g} (largest {scale:.3g})"
                        )
        except NoReferenceError as error:
            cell.outcome, cell.message = "unverified", str(error)
        except Exception as error:
            cell.outcome, cell.message = "unverified", f"the reference fails: {_line(error)}"

    def _failed(self, cell: Cell, error: Exception) -> None:
        """Refused, crashed or stopped."""
        cell.message = _line(error)
        if isinstance(error, TimeoutError):
            cell.outcome = "slow"
        elif isinstance(error, lightning_curv.errors.UnsupportedError):
            cell.outcome, cell.cause = "refused", cause_of(str(error))
            cell.justified = self._justified(cell.quantity, cell.cause)
        else:
            cell.outcome = "crash"

    def _justified(self, quantity: str, cause: str) -> bool:
        if self.reference.hidden:
            return True
        if cause in (COUPLED, OTHER):
            needs_samples = not quantity.startswith(PRODUCTS)
            return needs_samples and (
                self.network.penalty or (self.network.coupled and cause == COUPLED)
            )
        return cause == NO_SECOND

    def _clear(self, extensions: Sequence[Any]) -> None:
        for parameter in self.problem.model.parameters():
            parameter.grad = None
            for extension in extensions:
                if hasattr(parameter, extension.savefield):
                    delattr(parameter, extension.savefield)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
