"""Second derivatives that a parameter's own ops add to its block of the Hessian.

Most ops are affine in their parameters and add none. The exceptions: an op that is not (a division
by a temperature), an op whose input depends on the same parameter (a layer applied to its own
output), and a parameter behind a nonlinear transform (weight normalisation).
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_curv.differentiation.internal_pass import unheard
from lightning_curv.differentiation.twice import differentiable, fused
from lightning_curv.errors import differentiating_twice, names_of
from lightning_curv.graph.dependence import uses_below
from lightning_curv.graph.heads import BILINEAR, is_piecewise_linear, name_of
from lightning_curv.graph.joins import Join
from lightning_curv.graph.tape import leaves, parameters
from lightning_curv.kernels.symmetric import eigh
from lightning_curv.passes.passes import Column, Passes, apply_rule
from lightning_curv.passes.reparametrization import pulled_back
from lightning_curv.recording.records import Operand, Use
from lightning_curv.rules.fallback import FallbackWarning, dense
from lightning_curv.samples.probing import owners_at
from lightning_curv.second_derivatives.local_curvature import trial_vectors
from lightning_curv.second_derivatives.per_sample import gradients_per_sample
from lightning_curv.terms.jacobian import Jacobian

AFFINE = frozenset(
    ("CopySlices", "IndexPut", "IndexPutImpl", "MaskedScatter")
)  # in what they write, too


def own_curvature(passes: Passes) -> Iterator[dict[Tensor, Jacobian]]:
    """These second derivatives, or their diagonals, as Jacobians of dense signed columns."""
    times = Counter(p for found in passes.tape.parameters.values() for p in found)
    for node, use in passes.tape.uses.items():
        if isinstance(node, Join):  # linear, or among `curved_parameters`
            continue
        again = any(times[p] > 1 for p in passes.tape.parameters[node])
        names = [
            k
            for k, operand in use.operands.items()
            if again or operand.derived or not use.rule.affine
        ]
        if names and (g := passes.gradients([GradientEdge(node, use.output_nr)])[0]) is not None:
            for op in [_Op(passes, node, use, name, g) for name in names]:
                yield from op.bent()
                yield from op.fed_back()
                yield from op.transformed()


def curved_parameters(passes: Passes) -> dict[Tensor, str]:
    """The parameters that meet the samples where the second derivatives are not known, and in which op.

    The op or what is below it is nonlinear in them, or the data uses them again.
    """
    found: dict[Tensor, str] = {}
    for node, use in passes.tape.uses.items():
        if isinstance(node, Join) and _curved(passes, node, use):
            found.update((p, name_of(node.node)) for p in passes.tape.parameters[node])
    return found


def _curved(passes: Passes, join: Join, use: Use) -> bool:
    (operand,) = use.operands.values()
    found = leaves(operand.edge)
    inputs = [(after, number) for after, number in join.node.next_functions if after is not None]
    data = [GradientEdge(after, number) for after, number in inputs if after is not join.edge.node]
    below = {p for other in uses_below(passes.tape, data) for p in parameters(other)}
    linear = is_piecewise_linear(join.node) or name_of(join.node) in BILINEAR | AFFINE
    if not linear or join.recorded is not None or below.intersection(found):
        return True
    return not _is_linear(operand, found)


def differentiated_diagonals(
    passes: Passes,
    curved: Mapping[Tensor, str],
) -> Iterator[dict[Tensor, Jacobian]]:
    """The Hessian's diagonals of some parameters, entry by entry, as Jacobians of signed columns.

    Every per-sample gradient is differentiated by autograd, once per entry of the parameter.
    """
    if not curved:
        return
    count = passes.samples.count
    passes_needed = count * sum(parameter.numel() for parameter in curved)
    names = ", ".join(names_of([*curved]))
    warnings.warn(
        f"The Hessian's diagonal needs a rule for {', '.join(sorted({*curved.values()}))} using "
        f"{names}, found none: it is exact but slow, {passes_needed} backward passes, one per "
        "sample and entry. A rule for the op (`@lightning_curv.rule`) is the fast path, `HMP` "
        "multiplies by the Hessian, and `lightning_curv.extensions.spectrum.HessianTraceMC` "
        "estimates its trace.",
        FallbackWarning,
        stacklevel=2,
    )
    with differentiable(fused([passes.loss])):
        gradients = gradients_per_sample(passes)
    for parameter in curved:
        rows = gradients.get(parameter)
        if rows is None:  # the loss does not depend on it
            continue
        yield _diagonal(parameter, _differentiated(rows, parameter))


def _differentiated(rows: Tensor, parameter: Tensor) -> Tensor:
    """The derivative of every entry ``[N, *p]`` by the same entry of the parameter."""
    diagonal = torch.zeros_like(rows).detach()
    if not rows.requires_grad:
        return diagonal
    places = diagonal.view(-1)
    with torch.enable_grad(), differentiating_twice(), unheard():
        for place, entry in enumerate(rows.flatten()):
            (second,) = torch.autograd.grad(
                entry,
                parameter,
                retain_graph=True,
                allow_unused=True,
            )
            if second is not None:
                places[place] = second.flatten()[place % parameter.numel()]
    return diagonal


@dataclass
class _Op:
    """One operand of one use, and the gradient at its output."""

    passes: Passes
    node: Node
    use: Use
    name: str
    g: Tensor

    @property
    def operand(self) -> Operand:
        return self.use.operands[self.name]

    @property
    def count(self) -> int:
        return self.passes.samples.count

    def gradient(self, **arguments: Tensor) -> Tensor:
        """K, the per-sample gradient by the operand: a function of the arguments, ``[N, *D]``."""
        owners = self.passes.samples.uses[self.node]
        term = apply_rule(self.use, owners, self.g[None], arguments)[self.name]
        return Jacobian(self.operand.tensor, [term]).per_sample()[0]

    def derivative(self, argument: str, at: Tensor, direction: Tensor) -> Tensor:
        """∂K/∂argument · direction."""
        return torch.func.jvp(
            lambda value: self.gradient(**{argument: value}),
            (at,),
            (direction,),
        )[1]

    def pulled(self, jacobian: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """``[V, N, *D]`` by the leaves that the operand was computed from."""
        if not self.operand.derived:
            yield self.operand.tensor, jacobian
            return
        for parameter, term in pulled_back(self.operand.edge, self.operand.tensor, dense(jacobian)):
            yield parameter, term.g.reshape(*jacobian.shape[:2], *parameter.shape)

    def bent(self) -> Iterator[dict[Tensor, Jacobian]]:
        """∂K/∂D of an op that is not affine in D."""
        if self.use.rule.affine:
            return
        value = self.operand.tensor.detach()
        units = torch.eye(value.numel(), dtype=value.dtype, device=value.device).reshape(
            -1, *value.shape
        )
        columns = [
            self.derivative(self.name, value, unit).reshape(self.count, -1) for unit in units
        ]
        values, vectors = eigh(torch.stack(columns, -1))  # [N, D], [N, D, D]
        jacobian = (vectors * values.abs().sqrt()[:, None]).permute(2, 0, 1)
        for parameter, found in self.pulled(jacobian.reshape(*jacobian.shape[:2], *value.shape)):
            yield {parameter: Jacobian(parameter, [dense(found)], values.sign().mT)}

    def fed_back(self) -> Iterator[dict[Tensor, Jacobian]]:
        """2 Σ_k ∂K/∂x_k · ∂x_k/∂p where the input x depends on p; its diagonal."""
        inputs = {
            k: edge for k, edge in self.use.inputs.items() if self.use.arguments[k] is not None
        }
        if self.operand.derived:
            found = leaves(self.operand.edge)
        else:
            found = [self.operand.tensor]
        below = {
            p for use in uses_below(self.passes.tape, inputs.values()) for p in parameters(use)
        }
        if not below.intersection(found):
            return
        for argument, edge in inputs.items():
            owners = owners_at(self.passes, [edge])[edge]
            x = self.use.arguments[argument]
            if owners is None:
                continue
            entries = owners.split(x).shape[1]
            for entry in range(entries):
                unit = x.new_zeros(self.count, entries)
                unit[:, entry] = 1
                direction = owners.join(unit, x.shape)
                reached = self.passes.jacobian(Column([edge], [direction]))
                for parameter, change in self.pulled(self.derivative(argument, x, direction)[None]):
                    if parameter in reached:
                        yield _diagonal(
                            parameter,
                            2 * change[0] * reached[parameter].per_sample()[0],
                        )

    def transformed(self) -> Iterator[dict[Tensor, Jacobian]]:
        """Σ_k K_k ∂²D_k/∂p_j² of a nonlinear transform D(p); its diagonal, by N·P small passes."""
        edge = self.operand.edge
        found = leaves(self.operand.edge)
        if not self.operand.derived or _is_linear(self.operand, found):
            return
        result = {p: self.g.new_zeros(self.count, *p.shape) for p in found}
        with torch.enable_grad(), unheard(), differentiable(fused([edge])):
            for n, cotangent in enumerate(self.gradient()):
                pulled = torch.autograd.grad(
                    edge,
                    found,
                    cotangent,
                    create_graph=True,
                    allow_unused=True,
                )
                for p, first in zip(found, pulled, strict=True):
                    for j, entry in enumerate(
                        first.flatten() if first is not None and first.requires_grad else ()
                    ):
                        (second,) = torch.autograd.grad(
                            entry,
                            p,
                            retain_graph=True,
                            allow_unused=True,
                        )
                        if second is not None:
                            result[p][n].view(-1)[j] = second.flatten()[j]
        for parameter, diagonal in result.items():
            yield _diagonal(parameter, diagonal)


def _diagonal(parameter: Tensor, diagonal: Tensor) -> dict[Tensor, Jacobian]:
    """The Jacobian of two columns whose signed squares are ``diagonal [N, *p]``."""
    roots = torch.stack([diagonal.clamp(min=0).sqrt(), (-diagonal).clamp(min=0).sqrt()])
    signs = torch.stack([diagonal.new_ones(len(diagonal)), -diagonal.new_ones(len(diagonal))])
    return {parameter: Jacobian(parameter, [dense(roots)], signs)}


def _is_linear(operand: Operand, found: list[Tensor]) -> bool:
    with torch.enable_grad(), unheard(), differentiable(fused([operand.edge])):
        (trial,) = trial_vectors([operand.tensor])
        pulled = torch.autograd.grad(
            operand.edge,
            found,
            trial,
            create_graph=True,
            allow_unused=True,
        )
        first = [g for g in pulled if g is not None and g.requires_grad]
        if not first:
            return True
        second = torch.autograd.grad(
            first,
            found,
            trial_vectors(first),
            retain_graph=True,
            allow_unused=True,
        )
    return not any(h is not None and bool(h.any()) for h in second)
