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

from lightning_curv.differentiation.internal_pass import internal_pass
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

# Nodes that are affine in what they write, too.
AFFINE = frozenset(("CopySlices", "IndexPut", "IndexPutImpl", "MaskedScatter"))


def own_curvature(passes: Passes) -> Iterator[dict[Tensor, Jacobian]]:
    """These second derivatives, or their diagonals, as Jacobians of dense signed columns."""
    times = Counter(p for group in passes.tape.parameters.values() for p in group)
    for node, use in passes.tape.uses.items():
        if isinstance(node, Join):  # linear, or among `curved_parameters`
            continue
        # A parameter that is used once, as it is, by an op that is affine in it has none.
        used_again = any(times[p] > 1 for p in passes.tape.parameters[node])
        names = []
        for name, operand in use.operands.items():
            if used_again or operand.derived or not use.rule.affine:
                names.append(name)
        if not names:
            continue
        (g,) = passes.gradients([GradientEdge(node, use.output_nr)])
        if g is None:
            continue
        for name in names:
            op = _Op(passes, node, use, name, g)
            yield from op.nonaffine()
            yield from op.recursive()
            yield from op.reparametrized()


def curved_parameters(passes: Passes) -> dict[Tensor, str]:
    """The parameters that meet the samples where second derivatives are not known, and the op.

    The op or what is below it is nonlinear in them, or the data uses them again.
    """
    op_names: dict[Tensor, str] = {}
    for node, use in passes.tape.uses.items():
        if isinstance(node, Join) and _curved(passes, node, use):
            op_names.update((p, name_of(node.node)) for p in passes.tape.parameters[node])
    return op_names


def _curved(passes: Passes, join: Join, use: Use) -> bool:
    (operand,) = use.operands.values()
    at_join = leaves(operand.edge)
    inputs = [(after, number) for after, number in join.node.next_functions if after is not None]
    data = [GradientEdge(after, number) for after, number in inputs if after is not join.edge.node]
    below = {p for other in uses_below(passes.tape, data) for p in parameters(other)}
    linear = is_piecewise_linear(join.node) or name_of(join.node) in BILINEAR | AFFINE
    if not linear or join.recorded is not None or below.intersection(at_join):
        return True
    return not _is_linear(operand, at_join)


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
    """The derivative of every entry `[N, *p]` by the same entry of the parameter."""
    diagonal = torch.zeros_like(rows).detach()
    if not rows.requires_grad:
        return diagonal
    places = diagonal.view(-1)
    with torch.enable_grad(), differentiating_twice(), internal_pass():
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
        """K, the per-sample gradient by the operand: a function of the arguments, `[N, *D]`."""
        owners = self.passes.samples.uses[self.node]
        term = apply_rule(self.use, owners, self.g[None], arguments)[self.name]
        return Jacobian(self.operand.tensor, [term]).per_sample()[0]

    def derivative(self, argument: str, at: Tensor, direction: Tensor) -> Tensor:
        """∂K/∂argument · direction."""

        def gradient(value: Tensor) -> Tensor:
            return self.gradient(**{argument: value})

        value_and_change = torch.func.jvp(gradient, (at,), (direction,))
        return value_and_change[1]

    def pulled(self, jacobian: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """`[V, N, *D]` by the leaves that the operand was computed from."""
        if not self.operand.derived:
            yield self.operand.tensor, jacobian
            return
        columns_and_samples = jacobian.shape[:2]
        operand = self.operand
        for parameter, term in pulled_back(operand.edge, operand.tensor, dense(jacobian)):
            yield parameter, term.g.reshape(*columns_and_samples, *parameter.shape)

    def nonaffine(self) -> Iterator[dict[Tensor, Jacobian]]:
        """∂K/∂D of an op that is not affine in D."""
        if self.use.rule.affine:
            return
        value = self.operand.tensor.detach()
        units = torch.eye(value.numel(), dtype=value.dtype, device=value.device)
        columns = []
        for unit in units.reshape(-1, *value.shape):
            column = self.derivative(self.name, value, unit)
            columns.append(column.reshape(self.count, -1))
        # One matrix per sample, whose eigenvectors are the columns: V |Λ|½ with the signs of Λ.
        values, vectors = eigh(torch.stack(columns, -1))  # [N, D], [N, D, D]
        roots = values.abs().sqrt()[:, None]
        jacobian = (vectors * roots).permute(2, 0, 1)
        signs = values.sign().mT
        shaped = jacobian.reshape(*jacobian.shape[:2], *value.shape)
        for parameter, by_parameter in self.pulled(shaped):
            yield {parameter: Jacobian(parameter, [dense(by_parameter)], signs)}

    def recursive(self) -> Iterator[dict[Tensor, Jacobian]]:
        """2 Σ_k ∂K/∂x_k · ∂x_k/∂p where the input x depends on p; its diagonal."""
        inputs = {}
        for argument, edge in self.use.inputs.items():
            if self.use.arguments[argument] is not None:
                inputs[argument] = edge
        if self.operand.derived:
            own = leaves(self.operand.edge)
        else:
            own = [self.operand.tensor]
        below = {
            p for use in uses_below(self.passes.tape, inputs.values()) for p in parameters(use)
        }
        if not below.intersection(own):
            return
        for argument, edge in inputs.items():
            owners = owners_at(self.passes, [edge])[edge]
            x = self.use.arguments[argument]
            if owners is None:
                continue
            # One pass below the op per entry of the input of a sample, in all samples at once.
            entries = owners.split(x).shape[1]
            for entry in range(entries):
                unit = x.new_zeros(self.count, entries)
                unit[:, entry] = 1
                direction = owners.join(unit, x.shape)
                reached = self.passes.jacobian(Column([edge], [direction]))
                change_of_gradient = self.derivative(argument, x, direction)[None]
                for parameter, change in self.pulled(change_of_gradient):
                    if parameter in reached:
                        change_of_input = reached[parameter].per_sample()[0]
                        # Twice: the product is one of two mixed derivatives.
                        yield _diagonal(parameter, 2 * change[0] * change_of_input)

    def reparametrized(self) -> Iterator[dict[Tensor, Jacobian]]:
        """Σ_k K_k ∂²D_k/∂p_j² of a nonlinear transform D(p); its diagonal, by N·P small passes."""
        edge = self.operand.edge
        behind = leaves(edge)
        if not self.operand.derived or _is_linear(self.operand, behind):
            return
        result = {p: self.g.new_zeros(self.count, *p.shape) for p in behind}
        with torch.enable_grad(), internal_pass(), differentiable(fused([edge])):
            for n, cotangent in enumerate(self.gradient()):
                pulled = torch.autograd.grad(
                    edge,
                    behind,
                    cotangent,
                    create_graph=True,
                    allow_unused=True,
                )
                for p, first in zip(behind, pulled, strict=True):
                    # Without a graph: the transform is linear in this parameter.
                    if first is None or not first.requires_grad:
                        continue
                    for j, entry in enumerate(first.flatten()):
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
    """The Jacobian of two columns whose signed squares are `diagonal [N, *p]`."""
    roots = torch.stack([diagonal.clamp(min=0).sqrt(), (-diagonal).clamp(min=0).sqrt()])
    signs = torch.stack([diagonal.new_ones(len(diagonal)), -diagonal.new_ones(len(diagonal))])
    return {parameter: Jacobian(parameter, [dense(roots)], signs)}


def _is_linear(operand: Operand, behind: list[Tensor]) -> bool:
    """Whether an operand is linear in the parameters that it was computed from.

    Its second derivatives are then zero in a direction that no structure annihilates.
    """
    with torch.enable_grad(), internal_pass(), differentiable(fused([operand.edge])):
        (trial,) = trial_vectors([operand.tensor])
        pulled = torch.autograd.grad(
            operand.edge,
            behind,
            trial,
            create_graph=True,
            allow_unused=True,
        )
        first = [g for g in pulled if g is not None and g.requires_grad]
        if not first:
            return True
        second = torch.autograd.grad(
            first,
            behind,
            trial_vectors(first),
            retain_graph=True,
            allow_unused=True,
        )
    return not any(h is not None and bool(h.any()) for h in second)
