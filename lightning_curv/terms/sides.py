"""The two sides of a term, and what their axes are for: the words in which quantities ask.

A term multiplies cotangents, its outputs, by inputs. Where the parameter is a matrix (one group,
or as many as a grouped convolution has), each side has a Kronecker factor. Letters are read here
and in the other files of this folder; whoever uses a term asks for groups, features and positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from lightning_curv.terms.term import GROUP, KERNEL, Term

SideName = Literal["outputs", "inputs"]
# Letters of the axes that make up a matrix, beside those of its groups: x y z belong to the patches
# of the input or of the output.
MATRIX = "oi" + KERNEL


# One is made for every factor: a frozen one takes five times as long.
@dataclass(slots=True)
class Side:
    """One of the two tensors of a term. Nobody changes it.

    Attributes:
        tensor: Cotangents `[V, N, *]`, or inputs `[N, *]`.
        lead: The number of axes of columns and samples.
        letters: Those of the other axes.
        par: The letters of the parameter.
        classes: The number of classes that the features of inputs stand for, which then are no axis
            of the tensor, else 0.
    """

    tensor: Tensor
    lead: int
    letters: str
    par: str
    classes: int = 0

    @property
    def groups(self) -> tuple[int, ...]:
        """The axis of the groups, if there is one."""
        return _axes(self.letters, self.par, self.lead)[0]

    @property
    def features(self) -> tuple[int, ...]:
        """The axes that are rows of the Kronecker factor."""
        return _axes(self.letters, self.par, self.lead)[1]

    @property
    def positions(self) -> tuple[int, ...]:
        """The axes of shared positions, which the parameter does not have."""
        return _axes(self.letters, self.par, self.lead)[2]

    @property
    def width(self) -> int:
        """The number of rows of the Kronecker factor, of one group if there are any."""
        shape = self.tensor.shape
        return math.prod(shape[axis] for axis in self.features) * (self.classes or 1)

    @property
    def layout(self) -> tuple[object, ...]:
        """What tells two sides of one tensor apart."""
        return self.letters, *self.positions, self.classes

    def paired_features(self, products: Tensor, by_position: bool) -> Tensor:
        """Sum products of all entries with each other over the pairs of positions.

        Args:
            products: Of the entries behind the lead, `[*, *]`.
            by_position: Whether only products within a position count, instead of those of the sums
                over the positions. Products within a group count in any case.

        Returns:
            Those of the features, `[(q), D, D]`.
        """
        same_on_both = GROUP
        if by_position:
            same_on_both += "".join(letter for letter in self.letters if letter not in self.par)
        # Capitals are the letters of the second factor.
        second = "".join(
            letter if letter in same_on_both else letter.upper() for letter in self.letters
        )
        features = "".join(
            letter for letter in self.letters if letter in self.par and letter != GROUP
        )
        group = GROUP if GROUP in self.letters else ""
        equation = f"{self.letters}{second}->{group}{features}{features.upper()}"
        sums = torch.einsum(equation, products)
        by_columns = sums.flatten(-len(features))
        return by_columns.flatten(len(group), -2).clone()


@cache
def _axes(
    letters: str, par: str, lead: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The axes of groups, features and positions behind the lead."""
    groups, features, positions = [], [], []
    for axis, letter in enumerate(letters, lead):
        if letter == GROUP:
            groups.append(axis)
        elif letter in par:
            features.append(axis)
        if letter not in par:
            positions.append(axis)
    return tuple(groups), tuple(features), tuple(positions)


def side_of(term: Term, name: SideName) -> Side:
    """One side of a term.

    Args:
        term: The term.
        name: `"outputs"`, or `"inputs"`, which it must have.
    """
    if name == "outputs":
        return Side(term.g, 2, term.out, term.par)
    assert term.x is not None
    letters = term.inp.replace("i", "") if term.classes else term.inp
    return Side(term.x, 1, letters, term.par, term.classes)


def kronecker_sides(terms: Sequence[Term]) -> tuple[SideName, ...]:
    """Name the sides whose Kronecker factors make up the block of a parameter.

    Args:
        terms: All terms of the parameter.

    Returns:
        The sides in the order of the parameter's axes; none where it has no Kronecker structure.
        Outputs are first where they are in between the inputs, see `interleaved`.
    """
    if len(terms) > 1:
        return ()
    return _sides_of(terms[0].out, terms[0].inp, terms[0].par)


@cache
def _sides_of(outputs: str, inputs: str, parameter: str) -> tuple[SideName, ...]:
    """The same for the letters of the only term."""
    if any(letter not in GROUP + MATRIX for letter in parameter):
        return ()
    par = parameter.removeprefix(GROUP)
    out = "".join(letter for letter in outputs if letter in par)
    inp = "".join(letter for letter in inputs if letter in par)
    if not inp:
        return ("outputs",) if par and par == out else ()
    if par == out + inp:
        return ("outputs", "inputs")
    if par == inp + out:
        return ("inputs", "outputs")
    # A transposed convolution: the channels of the input, those of the output, the kernel.
    return ("outputs", "inputs") if par == inp[:1] + out + inp[1:] else ()


def interleaved(terms: Sequence[Term]) -> tuple[int, int] | None:
    """Groups, and inputs per group, of a weight whose outputs are in between its inputs.

    That is the weight of a transposed convolution, `[in, out/groups, *kernel]`: its factors are
    those of it with its first two axes swapped. `None` for all others.
    """
    if kronecker_sides(terms) != ("outputs", "inputs"):
        return None
    term = terms[0]
    letters = term.par.removeprefix(GROUP)
    if letters[0] in term.out or letters[-1] in term.out:
        return None
    sizes = term.sizes()
    return sizes.get(GROUP, 1), sizes[letters[0]]


def as_matrix(term: Term, sides: Sequence[SideName]) -> Term:
    """The term with one axis of features per side, and no axis of a single position.

    Args:
        term: That of a parameter with these sides.
        sides: In the order of the axes that the parameter is to have.

    Returns:
        A term of the same values, whose features are the last axes of `g` and `x`.
    """
    group = GROUP if GROUP in term.par else ""
    term = term.canonical()
    has_positions = term.g.shape[2] != 1 or term.classes
    position = "s" if has_positions else ""
    g = term.g.flatten(3 + len(group))
    g = g if has_positions else g.squeeze(2)
    x = term.x
    if x is not None and not term.classes:
        x = x.flatten(2 + len(group))
        x = x if has_positions else x.squeeze(1)
    letter_of = {"outputs": "o", "inputs": "i"}
    out = position + group + "o"
    inp = "" if x is None else position + group + "i"
    par = group + "".join(letter_of[side] for side in sides)
    return replace(term, out=out, inp=inp, par=par, g=g, x=x)
