"""Ops that no sample owns, or whose rule cannot be applied: their parameters act at joins."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.utils.weak import WeakIdKeyDictionary

from lightning_curv.errors import names_of
from lightning_curv.graph.heads import Head
from lightning_curv.graph.joins import Join, node_of
from lightning_curv.recording.provenance import Roots
from lightning_curv.recording.records import Use, edge_of
from lightning_curv.rules import Call
from lightning_curv.rules.fallback import FallbackWarning
from lightning_curv.samples.batch import sample_axes
from lightning_curv.samples.groups import owner_of_rows
from lightning_curv.samples.meeting import Mixed, find_joins
from lightning_curv.samples.probing import Finding, Place, Probe
from lightning_curv.samples.search import Search
from lightning_curv.terms.owners import Owners

# Ops that write rows to numbered places.
_WRITING = frozenset(("index_add", "index_copy", "index_put", "index_reduce", "setitem"))
_PRICED: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameters whose price was named


def joins_of(
    search: Search,
    heads: Sequence[tuple[Head, Owners]],
    uses: Mapping[Node | Join, Finding],
    probe: Probe,
    count: int,
) -> tuple[dict[Join, Owners], list[Node]]:
    """Where what depends on no sample meets the samples.

    And the ops that are no uses of their own then.
    """
    unplaced = [
        node
        for node, finding in uses.items()
        if finding.mixed or not _has_rule(search, node, finding)
    ]
    # Parameters that reach the loss through ops that were not recorded.
    strays = dict.fromkeys(edge_of(parameter).node for parameter, _ in search.tape.stray)
    slow = [(parameter, op) for parameter, op in search.tape.stray]
    # The usual case: every op has rows of the samples, and a rule.
    if not unplaced and not strays:
        return {}, []
    here: dict[Join, Owners] = {}
    mixed: list[Node] = []
    anywhere = [
        Place.anywhere(GradientEdge(node_of(n), search.uses[n].output_nr), count) for n in unplaced
    ]
    for node, finding in zip(unplaced, probe.findings(anywhere), strict=True):
        use = search.uses[node]
        if finding.owners is not None:
            if not _keeps(use, finding.owners):
                _refuse_inner_mixing(search, use, uses[node], probe, count)
            # The rule cannot be applied, but the rows of the output are known: the op is its own
            # join.
            direct = {after[:2] for after in node_of(node).next_functions}
            slow += [(parameter, use.name) for parameter in search.tape.parameters[node]]
            for operand in use.operands.values():
                join = Join(
                    node_of(node),
                    use.output_nr,
                    operand.edge,
                    None if operand.edge[:2] in direct else use,
                )
                here[join] = finding.owners
            continue
        if any(
            search.batch.holds(roots)
            and not _single(use, name)
            and not _numbers_a_parameter(use, name, roots)
            for name, roots in use.roots.items()
        ):
            raise Mixed(
                f"in what is computed from the output of `{use.name}` (if its input is the same "
                "for all samples, let the module hold it as a buffer)"
            )
        # What it reads is the same for all samples: the join is further up.
        mixed.append(node_of(node))
    if mixed or strays:
        here |= find_joins(
            search.tape,
            [head for head, _ in heads],
            mixed,
            strays,
            probe,
            search.batch.holds,
        )
    if slow:
        _warn_of_price(slow, count, search.most)
    return here, [node_of(node) for node in unplaced]


def _has_rule(search: Search, node: Node | Join, finding: Finding) -> bool:
    """Whether the rule of a use can be applied; those of single ops always can."""
    use = search.uses[node]
    if not search.axes[node] or finding.owners is None:
        return False
    if use.rule.parameters:
        return True
    # A column of ones at rows that a sample owns: whether the rule takes it is all that matters.
    owned = owner_of_rows(use, finding.owners) >= 0
    column = owned.to(search.passes.loss.device, use.dtype).expand(1, *use.shape)
    from lightning_curv.passes.passes import terms_of_rule

    try:
        terms_of_rule(use, finding.owners, column)
    except NotImplementedError:
        return False
    return True


def _keeps(use: Use, owners: Owners) -> bool:
    """Whether what an op's output has of a sample reads nothing that its data have of another."""
    kept = use.rule.keeps(Call(use.shape, tuple(use.operands)), use.arguments)
    return {*owners.axes} <= {*kept}


def _refuse_inner_mixing(
    search: Search,
    use: Use,
    by_rule: Finding,
    probe: Probe,
    count: int,
) -> None:
    """Raise if an op may mix samples that its outputs keep apart.

    It may if they lie on axes that its rule excludes.

    Raises:
        Mixed: Its inputs mix samples, or tell nothing.
    """
    # The output keeps samples apart on an axis that the rule does not allow: is that true inside?
    excluded = by_rule.mixed and bool(sample_axes(use))
    places = [Place.anywhere(edge, count) for edge in use.inputs.values()]
    if excluded or not use.rule.parameters:
        findings = probe.findings(places)
    else:
        findings = []
    if any(finding.mixed for finding in findings) or (excluded and not findings):
        raise Mixed(f"in `{use.name}`")


def _single(use: Use, name: str) -> bool:
    """Whether an argument is a single number, which all samples share."""
    value = use.arguments.get(name)
    return isinstance(value, Tensor) and value.numel() == 1


def _numbers_a_parameter(use: Use, name: str, roots: Roots) -> bool:
    """Whether an argument says where the rows of a parameter are written, a number for each.

    Numbers that recorded code made may be some of the batch if there are N of them; but a parameter
    has not a row per sample.
    """
    value = use.arguments.get(name)
    if use.name not in _WRITING or not isinstance(value, Tensor) or value.is_floating_point():
        return False
    made = not roots.data and all(root.made for root in roots.tensors)
    written = [operand.tensor.shape for operand in use.operands.values()]
    return made and any(s[:1] == value.shape and len(s) == len(use.shape) for s in written)


def _warn_of_price(
    slow: Sequence[tuple[Tensor, str]],
    count: int,
    most: int | None,
) -> None:
    """Once for every parameter."""
    # Every step of a training asks: the price is named once.
    if all(parameter in _PRICED for parameter, _ in slow):
        return
    _PRICED.update((parameter, None) for parameter, _ in slow)
    names = sorted(set(names_of([parameter for parameter, _ in slow])))
    some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    ops = ", ".join(sorted({op for _, op in slow})[:3])
    if most is None or most >= count:
        price = f"the {count} samples"
    else:
        price = f"{most} of the {count} samples"
    warnings.warn(
        f"Parameters {some} are used by ops without a rule for this use of them ({ops}): their "
        "quantities are exact but slow, every column takes a pass through such an op for each of "
        f"{price}. A rule for the op (`@lightning_curv.rule`) is the fast path; "
        "`CurvatureCallback(max_samples=)` logs estimates from fewer samples.",
        FallbackWarning,
        stacklevel=2,
    )
