"""Every op of torch's own database between the parameters and the loss: right, or refused for a reason."""

from __future__ import annotations

from typing import Any

import op_database
import pytest
import torch
from op_database import Case, Tally
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten

from lightning_curv import curvature, record
from lightning_curv.errors import UnsupportedError
from lightning_curv.extensions import GGNMP, HMP, BatchGrad, DiagGGNExact, DiagHessian
from lightning_curv.samples.batch import Batch

PARTS = 4


def weighted(case: Case, h: Tensor) -> Tensor:
    """A loss of all outputs in which every entry has a weight of its own."""
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=torch.float64)
    for out in case.outputs(h):
        weights = torch.rand(out.shape, generator=generator, dtype=torch.float64)
        total = total + (out.atan() * weights).sum()
    return total


def batch_of(case: Case, *targets: Tensor) -> Batch:
    """What is data; all other arguments of an op are constants."""
    return Batch(case.samples, tensors=[case.input, *targets])


def gradient_of(case: Case, h: Tensor) -> Tensor:
    h = h.detach().requires_grad_()
    return torch.autograd.grad(weighted(case, h), h)[0]


def reference(case: Case, weight: Tensor) -> tuple[Tensor, bool] | None:
    """The per-sample gradients and whether samples are coupled; ``None``: there is no gradient."""
    h = (case.input * weight).detach()
    try:
        base = gradient_of(case, h)
        joined = op_database.coupled(lambda other: gradient_of(case, other), h, base)
    except (RuntimeError, NotImplementedError, ValueError, IndexError, TypeError):
        return None  # torch cannot differentiate this call
    expected = base * case.input
    if not bool(expected.isfinite().all()) or not bool(expected.any()):
        return None
    return expected, joined


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(PARTS))
def test_per_sample_gradients_below_every_op_are_right_or_refused(part):
    tally = Tally()
    for case in op_database.cases(part, PARTS, per_op=2):
        weight = nn.Parameter(torch.full(case.input.shape[1:], 1.1, dtype=torch.float64))
        found = reference(case, weight)
        if found is None:
            continue
        expected, joined = found
        try:
            with curvature(BatchGrad(), batch_size=batch_of(case)):
                weighted(case, case.input * weight).backward()
        except UnsupportedError as error:
            tally.add(
                "refused, coupled" if joined else "refused", case.name, not joined, str(error)
            )
            continue
        except Exception as error:
            tally.add("crash", case.name, True, f"{type(error).__name__}: {error}")
            continue
        right = torch.allclose(weight.grad_batch, expected, rtol=1e-8, atol=1e-10)
        outcome = "wrong" if not right else "accepted, coupled" if joined else "right"
        tally.add(outcome, case.name, outcome != "right")
    assert not tally.bad, "\n".join(tally.bad)
    assert tally.counts["right"] > 50  # of some 75, in every part
    assert tally.counts["refused, coupled"] > 15  # of some 23


# --- curvature --------------------------------------------------------------------------------------------------------

# Calls whose results are rounded to a coarser type in between, where no digit of a second derivative is left.
COARSE = ("bfloat16", "half", "float", "to.")
# Calls that put entries of other samples into the row whose target is one sample's: samples meet there, though the
# gradient at no row depends on another row.
MOVED = ("take.", "take_along_dim.")


class Curved:
    """A squared error of the first output of an op, and its matrices by plain autograd."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.weight = nn.Parameter(torch.full(case.input.shape[1:], 1.1, dtype=torch.float64))
        out = self.output(self.weight)
        generator = torch.Generator().manual_seed(1)
        self.target = torch.rand(out.shape, generator=generator, dtype=torch.float64)

    def output(self, weight: Tensor) -> Tensor:
        out = self.case.outputs(self.case.input * weight)[0]
        return out.atan().reshape(len(out), -1)

    def loss(self, weight: Tensor) -> Tensor:
        return F.mse_loss(self.output(weight), self.target)

    def coupled(self) -> bool:
        h = (self.case.input * self.weight).detach()

        def gradient(h: Tensor) -> Tensor:
            h = h.detach().requires_grad_()
            out = self.case.outputs(h)[0].atan().reshape(self.target.shape)
            return torch.autograd.grad(F.mse_loss(out, self.target), h)[0]

        return op_database.coupled(gradient, h, gradient(h))

    def ggn(self) -> Tensor:
        out = self.output(self.weight)
        rows = [torch.autograd.grad(z, self.weight, retain_graph=True)[0] for z in out.flatten()]
        J = torch.stack(rows).reshape(len(rows), -1)
        return 2 / out.numel() * J.T @ J

    def hessian(self) -> Tensor | None:
        """``None``: torch has no second derivative of the op."""
        weight = self.weight.detach().requires_grad_()
        try:
            (first,) = torch.autograd.grad(self.loss(weight), weight, create_graph=True)
            if not first.requires_grad:
                return None
            rows = [
                torch.autograd.grad(
                    entry, weight, retain_graph=True, allow_unused=True, materialize_grads=True
                )[0]
                for entry in first.flatten()
            ]
        except (RuntimeError, NotImplementedError):
            return None
        matrix = torch.stack(rows).reshape(len(rows), -1)
        return matrix if bool(matrix.isfinite().all()) else None


def small_enough(case: Case) -> bool:
    """Whether an op has a matrix that torch can make, of a few entries."""
    if case.input[0].numel() > 24 or case.name.startswith(COARSE):
        return False
    try:
        outputs = case.outputs((case.input * 1.1).requires_grad_())
        return bool(outputs) and outputs[0].numel() <= 60
    except (RuntimeError, NotImplementedError, ValueError, IndexError, TypeError):
        return False


def entries(weight: Tensor, extension) -> Tensor:
    """A quantity as a vector: a diagonal, or a product with a vector without structure."""
    found = getattr(weight, extension.savefield)
    return found.flatten() if isinstance(found, Tensor) else found(probe_of(weight)).flatten()


def probe_of(weight: Tensor) -> Tensor:
    return torch.cos(torch.arange(1.0, weight.numel() + 1).double()).reshape(weight.shape)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(PARTS))
def test_curvature_below_every_op_is_right_or_refused(part):
    tally = Tally()
    for case in filter(small_enough, op_database.cases(part, PARTS, per_op=1)):
        problem = Curved(case)
        ggn, hessian, joined = problem.ggn(), problem.hessian(), problem.coupled()
        if not bool(ggn.isfinite().all()) or not bool(ggn.any()):
            continue
        vector = probe_of(problem.weight).flatten()
        expected = {DiagGGNExact: ggn.diagonal(), GGNMP: ggn @ vector}
        if hessian is not None:  # not symmetric where torch takes an input for symmetric
            expected |= {DiagHessian: hessian.diagonal(), HMP: vector @ hessian}
        for kind, value in expected.items():
            name, extension = f"{kind.__name__} {case.name}", kind()
            try:
                with curvature(extension, batch_size=batch_of(case, problem.target)):
                    problem.loss(problem.weight).backward()
                found = entries(problem.weight, extension)
            except UnsupportedError as error:
                mixing = joined or case.name.startswith(MOVED)
                allowed = mixing and kind in (DiagGGNExact, DiagHessian)
                outcome = "refused, coupled" if allowed else "refused"
                tally.add(outcome, name, not allowed, str(error))
                continue
            except Exception as error:
                tally.add("crash", name, True, f"{type(error).__name__}: {error}")
                continue
            largest = float((ggn if kind in (DiagGGNExact, GGNMP) else hessian).abs().max())
            right = torch.allclose(found, value, rtol=1e-7, atol=1e-9 * max(1e-6, largest))
            tally.add(f"right {kind.__name__}" if right else "wrong", name, not right)
    assert not tally.bad, "\n".join(tally.bad)
    for products, diagonals in ((GGNMP, DiagGGNExact), (HMP, DiagHessian)):
        assert tally.counts[f"right {products.__name__}"] > 30  # of some 50, in every part
        assert tally.counts[f"right {diagonals.__name__}"] > 20  # of some 35
    assert tally.counts["refused, coupled"] > 10  # of some 25


# --- recording --------------------------------------------------------------------------------------------------------


def equal(one: Any, other: Any) -> bool:
    """Whether two results are the same, bit for bit; NaN is NaN."""
    pairs = zip(tree_flatten(one)[0], tree_flatten(other)[0], strict=True)
    return all(same(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


def same(one: Tensor, other: Tensor) -> bool:
    if one.layout != torch.strided:
        one, other = one.to_dense(), other.to_dense()
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if one.is_complex():
        one, other = (
            torch.view_as_real(one.resolve_conj()),
            torch.view_as_real(other.resolve_conj()),
        )
    return torch.equal(one.nan_to_num(), other.nan_to_num())


def run(op, sample) -> tuple[Any, list[Tensor | None]]:
    """The result of a call, and the gradients of the sum of its absolute values."""
    torch.manual_seed(0)
    result = op(sample.input, *sample.args, **sample.kwargs)
    outputs = [t for t in tree_flatten(result)[0] if isinstance(t, Tensor) and t.requires_grad]
    given = tree_flatten((sample.input, sample.args, sample.kwargs))[0]
    leaves = [t for t in given if isinstance(t, Tensor) and t.requires_grad and t.is_leaf]
    if not outputs or not leaves:
        return result, []
    sums = [out.abs().sum() for out in outputs]
    return result, [*torch.autograd.grad(sums, leaves, allow_unused=True)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("dtype", "most", "least"),
    [(torch.float64, 1, 500), (torch.complex128, 1, 300), (torch.int64, 1, 300)],
    ids=str,
)
def test_recording_changes_no_result_of_any_op(dtype, most, least):
    tally = Tally()
    for op in op_database.all_ops():
        if "empty" in op.name:  # whose values are whatever was in memory
            continue
        differentiable = dtype != torch.int64 and op.supports_autograd
        for sample in op_database.calls(op, dtype, differentiable, most):
            try:
                expected = run(op, sample)
            except Exception:  # torch cannot make this call, or differentiate it
                continue
            try:
                with record():
                    found = run(op, sample)
            except Exception as error:
                tally.add("crash", op.name, True, f"{type(error).__name__}: {error}")
                continue
            tally.add(
                "same" if equal(found, expected) else "different",
                op.name,
                not equal(found, expected),
            )
    assert not tally.bad, "\n".join(tally.bad)
    assert tally.counts["same"] >= least
