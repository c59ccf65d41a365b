"""Brute force: one naive function per quantity, plain autograd loops in float64, independent of the library.

Notation: n sample, C entries of one sample's output, p parameter with P entries. A problem is
    anything with
`model`, `X`, `y`, `loss` (a row of `losses_table`). Every function returns a dict from parameter
name to tensor.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

Values = dict[str, Tensor]


def trainable(model: nn.Module) -> Values:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradient(scalar: Tensor, inputs: list[Tensor], seed: Tensor | None = None) -> list[Tensor]:
    """∂scalar/∂inputs, zero where the graph does not reach; `seed` is the cotangent if it is no scalar."""
    return list(
        torch.autograd.grad(
            scalar, inputs, seed, retain_graph=True, allow_unused=True, materialize_grads=True
        )
    )


def per_sample(rows: list[list[Tensor]], names) -> Values:
    return {name: torch.stack(column) for name, column in zip(names, zip(*rows))}


# --- first order -----------------------------------------------------------------------------------------------------


def grad_batch(problem) -> Values:
    """[N, *p]: gradient of the n-th summand."""
    params = trainable(problem.model)
    output = problem.model(problem.X)
    summands = [problem.loss.summand(output, problem.y, n) for n in range(len(output))]
    return per_sample([gradient(summand, list(params.values())) for summand in summands], params)


def batch_l2(problem) -> Values:
    return {
        name: torch.stack([(g_n**2).sum() for g_n in g]) for name, g in grad_batch(problem).items()
    }


def sum_grad_squared(problem) -> Values:
    return {name: sum(g_n**2 for g_n in g) for name, g in grad_batch(problem).items()}


def variance(problem) -> Values:
    return {
        name: sum((g_n - g.mean(0)) ** 2 for g_n in g) / len(g)
        for name, g in grad_batch(problem).items()
    }


# --- generalised Gauss-Newton ----------------------------------------------------------------------------------------


def jacobian(problem) -> Values:
    """[N, C, *p]: every entry of every output, one backward pass each."""
    params = trainable(problem.model)
    output = problem.model(problem.X)
    rows = [
        per_sample([gradient(entry, list(params.values())) for entry in output_n.flatten()], params)
        for output_n in output
    ]
    return {name: torch.stack([row[name] for row in rows]) for name in params}


def loss_hessian(problem) -> Tensor:
    """[N, C, C]: Hessian of the n-th summand in the n-th output."""
    output = problem.model(problem.X).detach()

    def hessian(n):
        def summand(output_n):
            return problem.loss.summand(
                torch.stack([*output[:n], output_n, *output[n + 1 :]]), problem.y, n
            )

        C = output[n].numel()
        return torch.autograd.functional.hessian(summand, output[n]).reshape(C, C)

    return torch.stack([hessian(n) for n in range(len(output))])


def ggn(problem) -> Values:
    """[N, P, P]: J_nᵀ H_n J_n for one parameter at a time, the n-th summand of the block."""
    H = loss_hessian(problem)
    blocks = {}
    for name, J in jacobian(problem).items():
        J = J.double().reshape(*H.shape[:2], -1)
        blocks[name] = torch.stack([J_n.T @ H_n @ J_n for J_n, H_n in zip(J, H)])
    return blocks


def diag_ggn_batch(problem) -> Values:
    params = trainable(problem.model)
    return {
        name: torch.stack([block_n.diagonal().reshape(params[name].shape) for block_n in block])
        for name, block in ggn(problem).items()
    }


def diag_ggn(problem) -> Values:
    return {name: diagonal.sum(0) for name, diagonal in diag_ggn_batch(problem).items()}


# --- Kronecker factors (Eschenhagen et al., NeurIPS 2023, equations 19 and 22) ---------------------------------------


class Uses:
    """Outputs of the Linear, Conv and Embedding modules of one forward pass."""

    def __init__(self, model: nn.Module):
        self.outputs: dict[str, Tensor] = {}
        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
        self.modules = {
            name: module for name, module in model.named_modules() if isinstance(module, kinds)
        }
        for name, module in self.modules.items():
            module.register_forward_hook(
                lambda _module, _inputs, output, name=name: self.keep(name, output)
            )

    def keep(self, name, output):
        self.outputs[name] = output
        return output.clone()  # whatever comes after must not write in place on what is kept


def groups(module: nn.Module) -> int:
    return getattr(module, "groups", 1)


def by_position(module: nn.Module, z: Tensor) -> Tensor:
    """[N, out, *spatial] or [N, *extra, out] → [N, S, G, out/G]."""
    if isinstance(module, nn.modules.conv._ConvNd):
        z = z.movedim(1, -1)
    return z.reshape(z.shape[0], -1, groups(module), z.shape[-1] // groups(module))


def positions_of_inputs(module: nn.Module, z: Tensor) -> Tensor:
    """a [N, S, G, I]: the module is linear in its weight, so an input patch is the gradient of one output entry."""
    z = by_position(module, z)
    rows = z.shape[3]  # output channels per group: the weight's rows of group q start at q·rows

    def patch(n, s, q):
        (grad,) = gradient(z[n, s, q, 0], [module.weight])
        return grad[:, 0] if isinstance(module, nn.Embedding) else grad[q * rows].flatten()

    N, S, G, _ = z.shape
    return torch.stack(
        [
            torch.stack([torch.stack([patch(n, s, q) for q in range(G)]) for s in range(S)])
            for n in range(N)
        ]
    )


def hessian_columns(problem) -> list[tuple[int, Tensor]]:
    """Pairs (n, column of R_n) with R_n R_nᵀ = H_n, from the eigendecomposition."""
    columns = []
    for n, H_n in enumerate(loss_hessian(problem)):
        eigenvalues, eigenvectors = torch.linalg.eigh(H_n)
        R_n = eigenvectors * eigenvalues.clamp(min=0).sqrt()
        columns += [(n, column) for column in R_n.T]
    return columns


def kronecker(problem, weight_sharing: str) -> dict[str, list[Tensor]]:
    """Factors in row-major order of the parameter's axes; leading group axis for grouped convolutions.

    expand: A = 1/(N·S) Σ_n Σ_s a aᵀ,  B = Σ_n Σ_c Σ_s g gᵀ;  reduce: A = 1/N Σ_n ā āᵀ with ā = 1/S
        Σ_s a,
    B = Σ_n Σ_c (Σ_s g)(Σ_s g)ᵀ. The cotangents g carry the loss' scale. A bias is a weight whose
    input is 1 (A = 1); groups do not split it.
    """
    model = copy.deepcopy(problem.model)  # the hooks stay on the copy
    uses = Uses(model)
    output = model(problem.X)
    factors = {}
    for name, module in uses.modules.items():
        z = uses.outputs[name]
        a = positions_of_inputs(module, z)
        A = sum(outer_products(a_n, "mean", weight_sharing) for a_n in a) / len(a)
        B, B_bias = 0, 0
        for n, column in hessian_columns(problem):
            seed = torch.zeros_like(output)
            seed[n] = column.reshape(output[n].shape)
            (cotangent,) = gradient(output, [z], seed)
            g = by_position(module, cotangent)[n]
            B = B + outer_products(g, "sum", weight_sharing)
            B_bias = B_bias + outer_products(g.flatten(1).unsqueeze(1), "sum", weight_sharing)[0]
        if groups(module) == 1:
            A, B = A[0], B[0]
        if isinstance(module, nn.Embedding):
            factors[f"{name}.weight"] = [A.diagonal(), B]
            continue
        factors[f"{name}.weight"] = [B, A]
        if module.bias is not None:
            factors[f"{name}.bias"] = [B_bias]
    return factors


def outer_products(rows: Tensor, over_positions: str, weight_sharing: str) -> Tensor:
    """rows [S, G, d] → [G, d, d]: expand takes outer products and then sums or averages over s, reduce the reverse."""
    combine = (lambda t: sum(t) / len(t)) if over_positions == "mean" else sum
    if weight_sharing == "expand":
        return combine([torch.stack([torch.outer(row_q, row_q) for row_q in row]) for row in rows])
    return torch.stack([torch.outer(row_q, row_q) for row_q in combine(list(rows))])
