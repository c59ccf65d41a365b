"""Terms of rows to terms of samples: the rows of a sample become its shared positions."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from lightning_curv.errors import UnsupportedError
from lightning_curv.terms.owners import BatchAxis, ChosenOwners, Owners, RowOwners
from lightning_curv.terms.term import CHUNK_BYTES, DIAGONAL, Term

WASTE = 4  # how many times as much memory as their rows samples of different lengths may take


def grouped(term: Term, owners: Owners) -> Term:
    """Regroup rows to samples: the rows of a sample become its shared positions `r`.

    Args:
        term: Of rows.
        owners: Which sample owns each row.

    Returns:
        The term of N samples.

    Raises:
        RuntimeError: A cotangent arrives at a row that was found to belong to no sample.
    """
    if not isinstance(owners, BatchAxis):
        assert isinstance(owners, RowOwners)
        return _gathered(term, owners.to(term.g.device))
    rows = term.g.shape[1]
    samples = owners.count
    if rows == samples:
        return term
    positions = rows // samples

    def split(tensor: Tensor, axis: int) -> Tensor:
        if not owners.inner:
            return tensor.unflatten(axis, (samples, positions))
        by_position = tensor.unflatten(axis, (positions, samples))
        return by_position.transpose(axis, axis + 1)

    x = None if term.x is None else split(term.x, 0)
    inp = "r" + term.inp if x is not None else ""
    return replace(term, out="r" + term.out, inp=inp, g=split(term.g, 1), x=x)


def of_chosen(term: Term, owners: ChosenOwners, left: Tensor | None) -> Term:
    """Regroup the rows of some samples to these.

    Args:
        term: Of rows.
        owners: The samples, and which rows belong to them.
        left: The rows that the rule was asked for; it may have left out all others.

    Returns:
        The term of the chosen samples.
    """
    if left is not None and term.g.shape[1] == len(left):
        return grouped(term, owners.within)
    if isinstance(owners.whole, RowOwners):
        _refuse_unowned(term, owners.whole.to(term.g.device))
    rows = owners.rows(term.g.shape[1]).to(term.g.device)
    return grouped(term[rows], owners.within)


def _refuse_unowned(term: Term, owners: RowOwners) -> None:
    """Raise where a row that no sample owns has a cotangent, or an input that is not finite."""
    unowned = owners.index < 0
    cotangents = term.g[:, unowned]
    if cotangents.numel():
        # A cotangent that cancels is zero up to rounding of those that it was made of.
        eps = torch.finfo(term.g.dtype).eps
        rounding = 1e4 * eps * term.g.abs().amax()
        beyond_rounding = cotangents.abs() > rounding
        if bool(beyond_rounding.any()):
            raise RuntimeError(
                "Expected no gradient at rows that no sample depended on when the samples were "
                "found, found one. Pass `check=True` to `curvature`: the samples are then "
                "found anew."
            )
    if term.x is None or term.classes:
        return
    # Zero times infinity is not zero: such a row would reach the sum over all samples.
    unowned_inputs = term.x[unowned]
    if not bool(unowned_inputs.isfinite().all()):
        raise UnsupportedError(
            "Expected finite inputs in rows that no gradient arrives at, found others: which "
            "sample they make undefined cannot be told. Leave samples that are not finite out "
            "of the batch."
        )


def _gathered(term: Term, owners: RowOwners) -> Term:
    """The rows of every sample next to each other, filled up.

    Where that costs more memory than J, J itself is formed.
    """
    _refuse_unowned(term, owners)
    sizes = term.sizes()
    samples, longest = owners.table.shape
    row_entries = term.g[:, :1].numel()
    if term.x is not None:
        row_entries += term.x[:1].numel()
    # Both per sample.
    padded_entries = longest * row_entries
    formed_entries = len(term.g) * math.prod(sizes[letter] for letter in term.par)
    # One long sample among many short ones: every other one is padded to its length.
    wasteful = longest * samples > WASTE * len(owners.index)
    if wasteful and padded_entries > formed_entries and not term.classes:
        return _formed(term, owners)
    no_input = -1 if term.classes else 0  # a one-hot row of zeros, or zeros
    if term.x is None:
        x = None
    else:
        x = owners.padded(term.x, 0, no_input)
    positions = math.prod(sizes[letter] for letter in term.shared)
    inp = "" if x is None else "r" + term.inp
    return replace(
        term,
        out="r" + term.out,
        inp=inp,
        g=owners.padded(term.g, 1),
        x=x,
        lengths=owners.lengths * positions,
    )


def _formed(term: Term, owners: RowOwners) -> Term:
    """J itself, `[V, N, *par]`, some rows at a time."""
    sizes = term.sizes()
    shape = [sizes[letter] for letter in term.par]
    total = term.g.new_zeros(len(term.g), owners.count, *shape)
    row_bytes = total[:, :1].numel() * total.element_size()
    size = max(1, CHUNK_BYTES // max(1, row_bytes))
    for start in range(0, len(owners.index), size):
        index = owners.index[start : start + size]
        owned = (index >= 0).nonzero().squeeze(1)
        some_rows = term[(owned + start).tolist()]
        by_row = some_rows.contract(f"vn{term.par}")
        total.index_add_(1, index[owned], by_row)
    # Formed, J has no structure left: every axis is diagonal, and a number has one of size 1.
    if not shape:
        return Term("d", "", "d", total[..., None])
    letters = DIAGONAL[: len(shape)]
    return Term(letters, "", letters, total)
