"""Passes through the graph of one loss: what extensions and their sources are built from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import islice
from typing import cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_curv.differentiation.internal_pass import internal_pass
from lightning_curv.errors import UnsupportedError, describe
from lightning_curv.graph.joins import Join, node_of, strided
from lightning_curv.graph.tape import Tape, parameters, plain_name
from lightning_curv.kernels import huge_pages
from lightning_curv.kernels.onednn import fast_products, is_large
from lightning_curv.losses import LOSSES, Likelihood
from lightning_curv.losses.parts import LossPart
from lightning_curv.passes.owned import Samples
from lightning_curv.passes.randomness import default_generator
from lightning_curv.passes.reparametrization import pulled_back
from lightning_curv.passes.signs import rises_with, weighs_nothing_negative
from lightning_curv.passes.summands import loss_parts
from lightning_curv.recording.records import LossCall, Use
from lightning_curv.rules import Call
from lightning_curv.rules.fallback import dense
from lightning_curv.terms.jacobian import Jacobian
from lightning_curv.terms.owners import BatchAxis, ChosenOwners, Owners
from lightning_curv.terms.regrouping import grouped, of_chosen
from lightning_curv.terms.term import Term

COLUMN_BYTES = 2**26  # of cotangents that are held at once
# Of those up to which one pass for all columns is faster than a pass for each, measured.
STACK_BYTES = 2**21
_STACKABLE = """
    AccumulateGrad AdaptiveAvgPool2D Add Addmm Alias AvgPool2D Baddbmm BinaryCrossEntropyWithLogits
    Bmm Clone Convolution Div Elu Expand Gelu LeakyRelu LogSoftmax MaxPool2DWithIndices Mean Mm
    MseLoss Mul NativeDropout NativeLayerNorm Neg NllLoss Permute Relu ReshapeAlias Select Sigmoid
    Silu Slice Softmax Softplus Squeeze Sub Sum T Tanh Transpose UnsafeView Unsqueeze View
"""
# Ops through which `vmap` takes several cotangents at once.
STACKABLE = frozenset(_STACKABLE.split())
# Cotangents of several columns at one use: one by one, or `[V, *]`; `None`: there are none.
_OfColumns = Sequence[Tensor | None] | Tensor | None
_NOTHING = nullcontext()
# Multiplications that oneDNN has to make per node of the graph to be worth watching its ops: the
# watch costs some microseconds per op. Measured.
WATCHED = 2**21


@dataclass
class Column:
    """One column to backpropagate.

    Attributes:
        edges: Where it enters the graph.
        seeds: Its entries there.
        signs: Its sign per sample, `[N]`; `None`: positive.
    """

    edges: Sequence[GradientEdge]
    seeds: Sequence[Tensor]
    signs: Tensor | None = None


@dataclass
class Passes:
    """The graph of a loss and passes through it; every pass keeps the graph.

    Attributes:
        loss: The root.
        gradient: That at the root; `None`: one.
        tape: What is recorded below it.
        samples: Where the samples are.
        output: Where the curvature of the loss enters instead of at known loss functions.
        own_generator: Draws Monte-Carlo targets instead of `default_generator`.
        separate: Whether samples must not influence each other.
        joint: Whether a known loss function of several outputs is a function like any other, with
            the second derivatives between them.
    """

    loss: Tensor
    gradient: Tensor | None
    tape: Tape
    samples: Samples
    output: LossCall | None = None
    own_generator: torch.Generator | None = None
    separate: bool = True
    joint: bool = False
    _generators: dict[torch.device, torch.Generator] = field(default_factory=dict)

    @cached_property
    def seed(self) -> Tensor:
        """The gradient at the root, which most quantities never ask for."""
        return torch.ones_like(self.loss) if self.gradient is None else self.gradient

    def only(self, chosen: Tensor) -> Passes:
        """Passes for some of the samples only, `chosen [S]` in ascending order."""
        return replace(self, samples=self.samples.only(chosen))

    def forget(self) -> None:
        """Forget what depends on the samples, which are others now."""
        for name in ("use_edges", "parts"):
            self.__dict__.pop(name, None)

    @cached_property
    def generator(self) -> torch.Generator:
        """Draws Monte-Carlo targets."""
        return self.own_generator or default_generator(self.loss.device)

    def generator_on(self, device: torch.device) -> torch.Generator:
        """Draws on a device, where parameters are on several."""
        if device == self.generator.device:
            return self.generator
        if self.own_generator is None:
            return default_generator(device)
        if device not in self._generators:
            own = self.own_generator
            seed = torch.randint(2**62, (), generator=own, device=own.device)
            self._generators[device] = torch.Generator(device).manual_seed(int(seed))
        return self._generators[device]

    def gradients(self, edges: Sequence[GradientEdge]) -> tuple[Tensor | None, ...]:
        """The gradient of the loss at `edges`."""
        root = (self.loss.grad_fn, self.loss.output_nr)
        for edge in edges:
            if edge[:2] != root:
                return self.backward([self.loss], edges, [self.seed])
        return (self.seed,) * len(edges)

    def backward(
        self,
        outputs: Sequence[Tensor] | Sequence[GradientEdge],
        inputs: Sequence[GradientEdge],
        seeds: Sequence[Tensor],
        keep_graph: bool = True,
        stacked: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """Backpropagate `seeds` from `outputs` to `inputs`, or stacks of them in one pass."""
        # As a rule the context of fast products would do nothing, and take longer than that.
        with internal_pass(), fast_products(True) if self.multiplies else _NOTHING:
            gradients = torch.autograd.grad(
                outputs,
                inputs,
                seeds,
                retain_graph=keep_graph,
                allow_unused=True,
                is_grads_batched=stacked,
            )
        return tuple(map(strided, gradients))

    @cached_property
    def multiplies(self) -> bool:
        """Whether the products of matrices in a pass are worth `fast_products`."""
        count = 0
        for use in self.tape.uses.values():
            if use.rule.outputs is not None:  # recurrent: a node stands for many ops
                return False
            if use.inputs:
                count += _multiplications(use)
        return count > WATCHED * len(self.tape.structure)

    def pull(self, column: Column) -> tuple[Tensor | None, ...]:
        """Backpropagate a column to the outputs of all uses."""
        if self.ends_at(column.edges):
            return (column.seeds[0],) * len(self.use_edges)  # the last layer alone
        return self.backward(column.edges, self.use_edges, column.seeds)

    @cached_property
    def use_edges(self) -> list[GradientEdge]:
        """The outputs of all uses, in the order of the tape."""
        return use_edges(self.tape)

    def ends_at(self, edges: Sequence[GradientEdge]) -> bool:
        """Whether all uses have their output at one edge: what arrives costs no pass."""
        if len(edges) != 1 or not self.tape.uses:
            return False
        end, number = edges[0][:2]
        for key, use in self.tape.uses.items():
            if node_of(key) is not end or use.output_nr != number:
                return False
        return True

    @cached_property
    def parts(self) -> list[LossPart]:
        """The parts of the loss."""
        return loss_parts(self)

    def likelihood(self, node: Node) -> Likelihood:
        """The likelihood of a recorded loss call, scaled as in the final loss."""
        call = self.tape.losses[node]
        (scale,) = self.gradients([GradientEdge(node, call.output_nr)])
        likelihood = LOSSES[call.function](
            torch.zeros(call.shape) if scale is None else scale,
            **call.arguments,
        )
        if self._rises and weighs_nothing_negative(call):
            # The dataclasses are frozen.
            object.__setattr__(likelihood, "unsigned", True)
        return likelihood

    @cached_property
    def _rises(self) -> bool:
        """Whether the graph alone says that no loss call has a negative factor."""
        return self.gradient is None and rises_with(self.loss, self.tape.losses)

    def jacobians(self, columns: Iterable[Column]) -> Iterator[dict[Tensor, Jacobian]]:
        """Make the parameters' Jacobians, one parameter at a time.

        They are those of as many columns at a time as `COLUMN_BYTES` allow.
        """
        bytes_ = 0
        for use in self.tape.uses.values():
            bytes_ += use.shape.numel() * self.loss.element_size()
        most = max(1, COLUMN_BYTES // max(1, bytes_))
        in_one_pass = min(most, STACK_BYTES // max(1, bytes_))
        if in_one_pass > 1 and self._takes_stacks:
            chunks = self._pulled_together(columns, most, in_one_pass)
        else:
            chunks = self._pulled(columns, most)
        seen: set[int] = set()  # by `id`: the hash of a tensor is a function of Python's
        for signs, cotangents in chunks:
            for parameter, jacobian in self._jacobians(signs, cotangents):
                jacobian.continues = id(parameter) in seen
                seen.add(id(parameter))
                yield {parameter: jacobian}

    def jacobian(self, column: Column) -> dict[Tensor, Jacobian]:
        """The parameters' Jacobians for one column."""
        ((signs, cotangents),) = self._pulled([column], 1)
        return dict(self._jacobians(signs, cotangents))

    def _pulled(
        self, columns: Iterable[Column], most: int
    ) -> Iterator[tuple[Tensor | None, list[_OfColumns]]]:
        """The signs and cotangents of so many columns at a time, a pass for every column."""
        pulled = ((column.signs, self.pull(column)) for column in columns)
        while chunk := list(islice(pulled, most)):
            cotangents: list[_OfColumns] = [*zip(*(gs for _, gs in chunk), strict=True)]
            signs = self._signs([of_column for of_column, _ in chunk])
            chunk.clear()  # the cotangents are freed one by one
            yield signs, cotangents

    def _pulled_together(
        self, columns: Iterable[Column], most: int, in_one_pass: int
    ) -> Iterator[tuple[Tensor | None, list[_OfColumns]]]:
        """The same with one pass for several columns: what a pass costs on its way is paid once."""
        chunk: list[Column] = []
        for column in columns:
            # As a rule all are those of one part, with the very same edges.
            if (
                chunk
                and column.edges is not chunk[0].edges
                and _places(column) != _places(chunk[0])
            ):
                yield self._at_once(chunk, in_one_pass)
                chunk = []
            chunk.append(column)
            if len(chunk) == most:
                yield self._at_once(chunk, in_one_pass)
                chunk = []
        if chunk:
            yield self._at_once(chunk, in_one_pass)

    def _at_once(
        self, columns: Sequence[Column], in_one_pass: int
    ) -> tuple[Tensor | None, list[_OfColumns]]:
        """The signs and cotangents of columns of the same edges, which reach the same uses."""
        pieces = [
            self._pull_stack(columns[start : start + in_one_pass])
            for start in range(0, len(columns), in_one_pass)
        ]
        cotangents: list[_OfColumns] = [
            gs[0] if len(gs) == 1 or gs[0] is None else torch.cat(cast("list[Tensor]", gs))
            for gs in zip(*pieces, strict=True)
        ]
        return self._signs([column.signs for column in columns]), cotangents

    def _pull_stack(self, columns: Sequence[Column]) -> tuple[Tensor | None, ...]:
        """Backpropagate columns of the same edges, in one pass; cotangents are `[V, *output]`."""
        if len(columns) == 1:  # `vmap` takes longer than the pass of a small network
            return tuple([None if g is None else g[None] for g in self.pull(columns[0])])
        edges = columns[0].edges
        seeds_of_edges = zip(*[column.seeds for column in columns], strict=True)
        stacks = [torch.stack(seeds) for seeds in seeds_of_edges]
        if self.ends_at(edges):
            return (stacks[0],) * len(self.use_edges)
        try:
            return self.backward(edges, self.use_edges, stacks, stacked=True)
        except RuntimeError:
            # What is run again in the pass, such as dropout below a checkpoint, may not be mapped.
            one_by_one = [self.pull(column) for column in columns]
            return tuple(_stacked(gs) for gs in zip(*one_by_one, strict=True))

    def _signs(self, of_columns: Sequence[Tensor | None]) -> Tensor | None:
        """The signs of several columns, `[V, N]`; `None`: all are positive."""
        if [*of_columns] == [None] * len(of_columns):
            return None
        ones = self.seed.new_ones(self.samples.count)
        return torch.stack([ones if signs is None else signs for signs in of_columns])

    @cached_property
    def _takes_stacks(self) -> bool:
        """Whether `vmap` is known to do to every op what passes one by one do.

        Hooks of the user's, and those that look for anomalies, would see what is none of a pass.
        """
        if self.tape.watched or torch.is_anomaly_enabled():
            return False
        for node in self.tape.nodes:  # noqa: SIM110 - a generator takes twice as long
            if plain_name(node.name()) not in STACKABLE:
                return False
        return True

    def _jacobians(
        self, signs: Tensor | None, cotangents: list[_OfColumns]
    ) -> Iterator[tuple[Tensor, Jacobian]]:
        """Make every Jacobian as soon as its last use is there.

        The cotangents are taken out of the list, to be freed.
        """
        parameters = self.tape.parameters
        # By `id`: the hash of a tensor is a function of Python's.
        terms: dict[int, list[Term]] = {}
        waiting: dict[int, int] = {}
        reached: set[int] = set()
        count = 1
        for group, gs in zip(parameters.values(), cotangents, strict=True):
            if gs is not None:
                count = max(count, len(gs))
            some = _any(gs)
            for parameter in group:
                place = id(parameter)
                waiting[place] = waiting.get(place, 0) + 1
                if some:
                    reached.add(place)
        for i, (node, use) in enumerate(self.tape.uses.items()):
            g = _stacked(cotangents[i])
            cotangents[i] = None
            # A parameter has all of its uses in every Jacobian: its form is the same for the
            # columns of all summands of the loss, whichever uses they reach.
            if g is None and not reached.isdisjoint(map(id, parameters[node])):
                g = self.loss.new_zeros(count, *use.shape, dtype=use.dtype)
            for parameter, term in self.terms(node, use, g):
                terms.setdefault(id(parameter), []).append(term)
            for parameter in parameters[node]:
                place = id(parameter)
                waiting[place] -= 1
                if not waiting[place] and place in terms:
                    yield parameter, Jacobian(parameter, terms.pop(place), signs)

    def terms(
        self,
        node: Node | Join,
        use: Use,
        g: Tensor | None,
    ) -> list[tuple[Tensor, Term]]:
        """Make the terms of one use's parameters, for cotangents `[V, *output]`.

        `None`: the columns do not reach it.
        """
        g = strided(g)
        if g is None or not use.operands:
            return []
        if use.pull is not None:
            terms_by_name = {
                "value": dense(use.pull(g.reshape(g.shape[0], *use.shape), self.samples.uses[node]))
            }
        else:
            terms_by_name = apply_rule(use, self.samples.uses[node], g)
        terms: list[tuple[Tensor, Term]] = []
        for name, operand in use.operands.items():
            if operand.source is not None:
                terms += pulled_back(operand.source, operand.tensor, terms_by_name[name])
            else:
                terms.append((operand.tensor, terms_by_name[name]))
        return terms


def _places(column: Column) -> list[tuple[Node, int]]:
    """The edges of a column: torch makes a new one every time it is asked."""
    return [edge[:2] for edge in column.edges]


def _any(gs: _OfColumns) -> bool:
    """Whether some column has a cotangent."""
    return isinstance(gs, Tensor) or (gs is not None and any(g is not None for g in gs))


def _stacked(gs: _OfColumns) -> Tensor | None:
    """The cotangents of all columns in one tensor; `None`: no column has one."""
    if gs is None or isinstance(gs, Tensor):
        return gs
    like = next((g for g in gs if g is not None), None)
    if like is None or len(gs) == 1:
        return None if like is None else like[None]
    return huge_pages.stack([torch.zeros_like(like) if g is None else g for g in gs])


def use_edges(tape: Tape) -> list[GradientEdge]:
    """The outputs of all uses, in the order of the tape."""
    return [GradientEdge(node_of(key), use.output_nr) for key, use in tape.uses.items()]


def apply_rule(
    use: Use,
    owners: Owners,
    g: Tensor,
    inputs: dict[str, Tensor] | None = None,
) -> dict[str, Term]:
    """Make the terms of a use by argument name, for cotangents `[V, *output]`.

    What `inputs` has replaces the recorded arguments.
    """
    try:
        return terms_of_rule(use, owners, g, inputs)
    except UnsupportedError:
        raise
    except NotImplementedError as error:
        name = describe(parameters(use)[0])
        raise UnsupportedError(
            f"No rule for `{use.name}` using parameter {name}: {error}. Register one with "
            "`@lightning_curv.rule`."
        ) from error


def terms_of_rule(
    use: Use,
    owners: Owners,
    g: Tensor,
    inputs: dict[str, Tensor] | None = None,
) -> dict[str, Term]:
    """The same, where a rule that does not cover these arguments raises `NotImplementedError`."""
    if g.shape[1:] != use.shape:
        g = g.reshape(g.shape[0], *use.shape)
    # The axis with the rows, and how many leading axes carry them together.
    axes = owners.axes
    axis, lead = axes[0], len(axes)
    if lead > 1:
        g = g.flatten(1, lead)
    elif axis:
        g = g.movedim(axis + 1, 1)
    # The type of most is asked first: an abstract class takes longer to say what it is no class of.
    whole = type(owners) is BatchAxis or not isinstance(owners, ChosenOwners)
    some = None if whole else cast("ChosenOwners", owners)
    if some is None:
        chosen = None
        call = _whole_call(use.shape, tuple(use.operands), axis, lead)
    else:
        chosen = some.rows(g.shape[1])
        call = Call(use.shape, tuple(use.operands), axis, lead, chosen)
    arguments = dict(use.arguments)
    complex_ = g.is_complex()
    for name, operand in use.operands.items():
        arguments[name] = value = operand.tensor.detach()
        complex_ = complex_ or value.is_complex()
    if inputs:
        arguments.update(inputs)
        if use.rule.outputs:
            arguments["output"] = None  # the recorded output is not that of these inputs
    if complex_:
        raise UnsupportedError(
            "Expected real numbers in every op with parameters, found complex ones in "
            f"`{use.name}` using parameter {describe(parameters(use)[0])}. Multiply real and "
            "imaginary parts (`torch.view_as_real`), or use `HMP`."
        )
    terms_by_name = use.rule.function(call, g, **arguments)
    if some is not None:
        return {name: of_chosen(terms_by_name[name], some, chosen) for name in use.operands}
    terms = {}
    for name in use.operands:
        term = terms_by_name[name]
        # As a rule every row is a sample, and there is nothing to group.
        plain = type(owners) is BatchAxis and owners.count == term.g.shape[1]
        terms[name] = term if plain else grouped(term, owners)
    return terms


@lru_cache(1024)
def _whole_call(shape: torch.Size, operands: tuple[str, ...], axis: int, lead: int) -> Call:
    """A call of which all rows are asked for: the same in every step."""
    return Call(shape, operands, axis, lead)


def _multiplications(use: Use) -> int:
    """Of the products of matrices that oneDNN would make in a pass through an op, from below."""
    total = 0
    for operand in use.operands.values():
        matrix = operand.tensor
        if matrix.ndim == 2:
            count = use.shape.numel() * min(matrix.shape)
            if is_large(matrix, count):
                total += count
    return total
