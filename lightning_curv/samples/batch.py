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


# Not frozen, for one is made in every step, where that would take five times as long.
@dataclass
class Batch:
    """What the caller knows of the batch. Nobody changes it.

    Attributes:
        size: N, which the graph must agree with.
        expected: N, unless the graph disagrees.
        tensors: The tensors of the batch; `None`: unknown.
        tape: The graph that is looked at; `None`: none yet.
        tried: N, as long as it is tried in the place of the default.
    """

    size: int | None = None
    expected: int | None = None
    tensors: Sequence[Tensor] | None = None
    tape: Tape | None = field(default=None, compare=False)
    tried: int | None = field(default=None, compare=False)

    def holds(self, roots: Roots) -> bool:
        """Whether something computed from these roots depends on the samples.

        A tensor from outside does if it is one of the batch, or of N rows and made of Python's
        numbers. Where the tensors of the batch are not known, any other does too, unless a module
        holds it; but a number, or a row that is no piece of a batch, is shared.
        """
        if roots.data or self._gave(roots):
            return True
        single_rows = [root.shape for root in roots.tensors if root.ndim and len(root) == 1]
        most_alike = max(Counter(single_rows).values(), default=0)
        # Several rows of one shape: the batch came as a list of its samples.
        if self.tensors is None and most_alike > 1:
            return True
        return any(self._is_data(root) for root in roots.tensors)

    def _is_data(self, root: Root) -> bool:
        """Whether a tensor from outside has the samples on an axis."""
        whole = root.whole or root
        sizes = {len(whole), len(root)} if root.ndim else set()
        if root.ndim > 1 and len(root) == 1:
            sizes.add(root.shape[1])  # the batch may be second
        # A number, or one row: the same for all samples.
        if max(sizes, default=0) <= 1:
            return False
        has_batch_size = self.likely in sizes and self.likely > 1
        if not has_batch_size and (root.made or len(whole) == 1):
            return False
        # All tensors of the batch are known, and this is none: it was made of Python's numbers, or
        # it is a constant.
        if self.tensors is not None:
            return root.made
        return not self._is_held(whole, self.likely)

    def _is_held(self, root: Root, count: int) -> bool:
        parameters = () if self.tape is None else self.tape.all_parameters
        return HOLDERS.hold(root, count, parameters)

    @cached_property
    def likely(self) -> int:
        """N, as it is known or guessed before the graph is looked at."""
        if self.size is not None:
            return self.size
        if self.tried is not None:
            return self.tried
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
        if self.tensors is None:
            return self
        read = [roots for use in tape.uses.values() for roots in use.roots.values()]
        read += [call.roots for call in tape.losses.values()]
        read += [op.roots for op in tape.mapped]
        read += tape.read.values()
        return self if any(map(self._gave, read)) else Batch(self.size)

    def of(self, tape: Tape) -> Batch:
        """This batch, in the graph that is looked at."""
        return Batch(self.size, self.expected, self.tensors, tape, self.tried)

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
        inputs = _whole(_read(tape))
        target_roots = _whole(_read_by_losses(tape))
        # Targets of several lengths: weights of classes may be among them, which modules hold.
        if len({len(root) for root in target_roots}) > 1:
            target_roots = self._without_held(target_roots)
        targets = [len(root) for root in target_roots]
        agreed = [len(root) for root in inputs if len(root) in targets]
        if not agreed:  # what ops without trainable parameters read
            beside = [root for roots in tape.read.values() for root in roots.tensors if root.ndim]
            agreed = [len(root) for root in _whole(beside) if len(root) in targets]
        several_lengths = len({len(root) for root in inputs if len(root) > 1}) > 1
        if not agreed and several_lengths:
            inputs = self._without_held(inputs)
        read = [len(root) for root in inputs]
        known = [size for size in agreed if size > 1] or agreed or targets or read
        loss_shapes = [call.arguments["input"].shape for call in tape.losses.values()]
        if not known:  # nothing comes from outside: rows of the loss, or of the outputs
            outputs = [use.shape for use in tape.uses.values() if use.operands and sample_axes(use)]
            known = [int(shape[0]) for shape in [*loss_shapes, *outputs] if shape] or [1]
        # The batch may be second in what is read, but first in what the loss gets.
        behind_first = {size for root in inputs for size in root.shape[1:]}
        rows_of_losses = [int(shape[0]) for shape in loss_shapes if shape]
        swapped = [size for size in rows_of_losses if size in behind_first and size > 1]
        others = [size for size in [*known, *targets] if size > 1]
        # Every size costs a search: the fifth would be a guess too many.
        sizes = list(dict.fromkeys([*known[:1], *swapped, *others]))[:4]
        if self.expected is None:
            return sizes
        # The graph reads a piece of a tensor of the expected size: the batch is that piece.
        is_piece = any(
            root.whole is not None and len(root.whole) == self.expected != len(root)
            for root in inputs
        )
        in_order = [*sizes, self.expected] if is_piece else [self.expected, *sizes]
        return list(dict.fromkeys(in_order))

    def _without_held(self, roots: list[Root]) -> list[Root]:
        """Those that no module holds; all, if modules hold all."""
        return [root for root in roots if not self._is_held(root, 0)] or roots


def _whole(roots: Sequence[Root]) -> list[Root]:
    """Take several pieces of one tensor for that tensor: the batch was cut, not drawn."""
    pieces = Counter(root.whole for root in dict.fromkeys(roots))
    wholes = []
    for root in roots:
        if root.whole is not None and pieces[root.whole] > 1:
            wholes.append(root.whole)
        else:
            wholes.append(root)
    return wholes


def _read(tape: Tape) -> list[Root]:
    """What the network reads from outside, in the order in which it is read."""
    reading = []
    for node, use in tape.uses.items():
        # Operands are parameters: what they are computed from is no input of the network.
        inputs = [roots for name, roots in use.roots.items() if name not in use.operands]
        reading.append((node_of(node)._sequence_nr(), inputs))
    for op in tape.mapped:
        reading.append((op.edge.node._sequence_nr(), [op.roots]))
    # Autograd numbers nodes in the order of the forward pass.
    reading.sort(key=lambda pair: pair[0])
    in_order = [roots for _, inputs in reading for roots in inputs]
    return [root for roots in in_order for root in roots.tensors if root.ndim]


def _read_by_losses(tape: Tape) -> list[Root]:
    """What loss functions read from outside: targets, and weights."""
    return [root for call in tape.losses.values() for root in call.roots.tensors if root.ndim]


def sample_axes(use: Use) -> list[int]:
    """The axes of the output of a use that may carry the samples, as its rule says."""
    if use.pull is not None or not use.shape:
        return []
    try:
        return list(use.rule.axes(Call(use.shape, tuple(use.operands)), use.arguments))
    except UnsupportedError:  # no rule for these arguments
        return []
