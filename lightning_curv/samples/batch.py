"""The user's batch: what is known of it, how many samples it may have, and what belongs to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from lightning_curv.errors import UnsupportedError
from lightning_curv.graph.joins import node_of
from lightning_curv.graph.tape import Tape
from lightning_curv.recording.holders import HOLDERS
from lightning_curv.recording.provenance import Root, Roots, pointer_of
from lightning_curv.recording.records import Use
from lightning_curv.rules import Call


@dataclass(frozen=True)
class Batch:
    """What the caller knows of the batch.

    Attributes:
        size: N, which the graph must agree with.
        expected: N, unless the graph disagrees.
        tensors: The tensors of the batch; ``None``: unknown.
        tape: The graph that is looked at; ``None``: none yet.
    """

    size: int | None = None
    expected: int | None = None
    tensors: Sequence[Tensor] | None = None
    tape: Tape | None = field(default=None, compare=False)

    def holds(self, roots: Roots) -> bool:
        """Whether something computed from these roots depends on the samples.

        A tensor from outside does if it is one of the batch, or of N rows and made of Python's
        numbers. Where the tensors of the batch are not known, any other does too, unless a module
        holds it; but a number, or a row that is no piece of a batch, is shared.
        """
        rows = Counter(root.shape for root in roots.tensors if root.ndim and len(root) == 1)
        listed = (
            self.tensors is None and max(rows.values(), default=0) > 1
        )  # the batch came as a list of rows
        return (
            roots.data
            or listed
            or self._gave(roots)
            or any(self._is_data(root) for root in roots.tensors)
        )

    def _is_data(self, root: Root) -> bool:
        whole = root.whole or root
        sizes = {len(whole), len(root)} if root.ndim else set()
        if root.ndim > 1 and len(root) == 1:
            sizes.add(root.shape[1])  # the batch may be second
        if max(sizes, default=0) <= 1:
            return False
        rows = self.likely in sizes and self.likely > 1
        if not rows and (root.made or len(whole) == 1):
            return False
        if self.tensors is not None:
            return root.made
        return not self._is_held(whole, self.likely)

    def _is_held(self, root: Root, count: int) -> bool:
        return HOLDERS.hold(root, count, () if self.tape is None else self.tape.all_parameters)

    @cached_property
    def likely(self) -> int:
        """N, as it is known or guessed before the graph is looked at."""
        if self.size is not None:
            return self.size
        if self.tape is None:
            return self.expected or 0
        return self.candidates(self.tape)[0]

    @cached_property
    def _pointers(self) -> set[int]:
        return {pointer_of(tensor) for tensor in self.tensors or ()}

    def _gave(self, roots: Roots) -> bool:
        wholes = [root.whole for root in roots.tensors if root.whole is not None]
        return any(root.pointer in self._pointers for root in (*roots.tensors, *wholes))

    def read_by(self, tape: Tape) -> Batch:
        """This batch; or only its size, if the graph reads none of its tensors."""
        read = [roots for use in tape.uses.values() for roots in use.roots.values()]
        read += [call.roots for call in tape.losses.values()] + [op.roots for op in tape.mapped]
        read += tape.read.values()
        if self.tensors is None or any(map(self._gave, read)):
            return self
        return Batch(self.size)

    def given(self, tape: Tape) -> tuple[bool, ...]:
        """Which of the tensors that ops read come from the batch, where its tensors are known."""
        if self.tensors is None:
            return ()
        read = [roots for use in tape.uses.values() for roots in use.roots.values()]
        return tuple(self._gave(roots) for roots in [*read, *tape.read.values()])

    def candidates(self, tape: Tape) -> list[int]:
        """Possible numbers of samples, the default first.

        The default is the leading axis of what the network reads first and a target of the loss has
        too. Tables of constants are read as well: without such an agreement targets come first, and
        what modules hold is left out. One sample agrees with every graph, so it comes into question
        only where nothing else does, or where it is the default. If the graph does not agree with
        the default, other leading axes come into question, one of which must then agree.
        """
        if self.size is not None:
            return [self.size]
        roots = _whole(_read(tape))
        found = _whole(
            [root for call in tape.losses.values() for root in call.roots.tensors if root.ndim]
        )
        if len({len(root) for root in found}) > 1:
            found = [root for root in found if not self._is_held(root, 0)] or found
        targets = [len(root) for root in found]
        both = [len(root) for root in roots if len(root) in targets]
        if not both:  # beside what ops with trainable parameters read
            beside = [root for found in tape.read.values() for root in found.tensors if root.ndim]
            both = [len(root) for root in _whole(beside) if len(root) in targets]
        if not both and len({len(root) for root in roots if len(root) > 1}) > 1:
            roots = [root for root in roots if not self._is_held(root, 0)] or roots
        read = [len(root) for root in roots]
        known = [size for size in both if size > 1] or both or targets or read
        if not known:  # nothing comes from outside: rows of the loss, or of the outputs
            heads = [call.arguments["input"].shape for call in tape.losses.values()]
            outputs = [use.shape for use in tape.uses.values() if use.operands and sample_axes(use)]
            known = [int(shape[0]) for shape in [*heads, *outputs] if shape] or [1]
        shapes = {
            size for root in roots for size in root.shape[1:]
        }  # the batch may be second in what is read
        second = [
            int(shape[0])
            for call in tape.losses.values()
            if (shape := call.arguments["input"].shape)
        ]
        swapped = [size for size in second if size in shapes and size > 1]
        others = [size for size in [*known, *targets] if size > 1]
        sizes = list(dict.fromkeys([*known[:1], *swapped, *others]))[:4]
        if self.expected is None:
            return sizes
        piece = any(
            root.whole is not None and len(root.whole) == self.expected != len(root)
            for root in roots
        )
        return list(dict.fromkeys([*sizes, self.expected] if piece else [self.expected, *sizes]))


def _whole(roots: Sequence[Root]) -> list[Root]:
    """Take several pieces of one tensor for that tensor: the batch was cut, not drawn."""
    pieces = Counter(root.whole for root in dict.fromkeys(roots))
    return [
        root.whole if root.whole is not None and pieces[root.whole] > 1 else root for root in roots
    ]


def _read(tape: Tape) -> list[Root]:
    """What the network reads from outside, in the order in which it is read."""
    reading = [
        (
            node_of(node)._sequence_nr(),
            [found for name, found in use.roots.items() if name not in use.operands],
        )
        for node, use in tape.uses.items()
    ]
    reading += [(op.edge.node._sequence_nr(), [op.roots]) for op in tape.mapped]
    ordered = sorted(reading, key=lambda pair: pair[0])
    return [root for _, read in ordered for found in read for root in found.tensors if root.ndim]


def sample_axes(use: Use) -> list[int]:
    """The axes of the output of a use that may carry the samples, as its rule says."""
    if use.pull is not None or not use.shape:
        return []
    try:
        return list(use.rule.axes(Call(use.shape, tuple(use.operands)), use.arguments))
    except UnsupportedError:  # no rule for these arguments
        return []
