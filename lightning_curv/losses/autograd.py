"""Any other loss: its Hessian at an output of the network, by automatic differentiation."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_curv.errors import UnsupportedError
from lightning_curv.losses.likelihoods import Likelihood, signs_of
from lightning_curv.losses.registry import LOSSES
from lightning_curv.own_passes import unheard
from lightning_curv.owners import BatchAxis, Owners
from lightning_curv.symmetric import eigh
from lightning_curv.twice import differentiable, fused


@dataclass(frozen=True)
class Quadratic(Likelihood):
    r"""The quadratic expansion of a loss around the output f of a network: H = V Λ₊ Vᵀ per sample.

    With the eigenvalues :math:`\nabla_f^2 \ell_n = V \Lambda V^\top` the GGN takes the positive part Λ₊, the closest
    positive semi-definite matrix; for a loss that is convex in f that is the Hessian itself. There is no model to draw
    targets from: samples are V √Λ₊ ε with standard normal ε, whose expected outer product is H.

    Cost: one differentiation of the loss (not of the network) per output entry E of a sample, N·E² numbers of memory.

    Attributes:
        root: The root of the backward pass.
        seed: The gradient it starts with.
        edge: Where f is in the graph.
        like: A tensor of f's shape, type and device.
        owners: Which sample owns each row of f.
    """

    root: Tensor
    seed: Tensor
    edge: GradientEdge
    like: Tensor
    owners: Owners

    def columns(self, owners: Owners) -> Iterator[Tensor]:
        """√λ₊ times every eigenvector of a sample."""
        values, vectors = self.eigen
        if not bool(values.any()):
            warnings.warn(
                f"The GGN is zero: the loss is linear in `output` of shape {tuple(self.like.shape)}. Choose an output "
                "further down, for example the logits below a log-softmax.",
                stacklevel=2,
            )
        roots = vectors * values.clamp(min=0).sqrt().unsqueeze(1)
        yield from (self._joined(column) for column in roots.unbind(-1))

    def sample(self, generator: torch.Generator) -> Tensor:
        """V √Λ₊ ε."""
        values, vectors = self.eigen
        noise = torch.empty_like(values).normal_(generator=generator)
        return self._joined(torch.einsum("nek,nk->ne", vectors, values.clamp(min=0).sqrt() * noise))

    def product(self, v: Tensor) -> Tensor:
        """V Λ₊ Vᵀ v."""
        values, vectors = self.eigen
        along = torch.einsum("nek,ne->nk", vectors, self._split(v))
        return self._joined(torch.einsum("nek,nk->ne", vectors, values.clamp(min=0) * along))

    def hessian_columns(self, owners: Owners, fewest: bool = True) -> Iterator[tuple[Tensor, Tensor | None]]:
        """√|λ| times every eigenvector of a sample, with the signs of λ."""
        values, vectors = self.eigen
        roots = vectors * values.abs().sqrt().unsqueeze(1)
        for column, value in zip(roots.unbind(-1), values.unbind(-1), strict=True):
            yield self._joined(column), signs_of(value)

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """Λ ``[N, E]`` and V ``[N, E, E]`` of every sample's Hessian."""
        return eigh(self._hessian().to(_precise(self.like.dtype)))

    def _hessian(self) -> Tensor:
        """``[N, E, E]``, one differentiation per entry, all samples at once."""
        unit = self._split(torch.zeros_like(self.like))
        trial = self._split(torch.linspace(1, 2, self.like.numel()).to(self.like).reshape(self.like.shape))
        with torch.enable_grad():
            try:
                g = self._gradient()
                rows = [self._derivative(g, unit.index_fill(1, e, 1)) for e in torch.arange(unit.shape[1])]
                image = self._derivative(g, trial)
            except RuntimeError as error:
                raise UnsupportedError(
                    f"`output=` needs a loss that can be differentiated twice, found one that cannot: {error}"
                ) from error
        hessian = torch.stack(rows, 1) if rows else unit.new_zeros(self.owners.count, 0, 0)
        self._refuse_coupled(torch.einsum("nef,nf->ne", hessian, trial), image)
        return (hessian + hessian.mT) / 2

    def _gradient(self) -> Tensor:
        """The gradient at f with a graph of its own."""
        seed = self.seed.detach().clone().requires_grad_()
        with unheard(), differentiable(fused([self.root])):
            (g,) = torch.autograd.grad(self.root, [self.edge], seed, create_graph=True)
        # torch drops the graph of `once_differentiable` functions silently; g is linear in the seed where it is whole
        size = g.detach().square().sum()
        (share,) = torch.autograd.grad(g, [seed], g.detach(), retain_graph=True, materialize_grads=True)
        if not torch.allclose((share * self.seed).sum(), size, rtol=1e3 * torch.finfo(g.dtype).eps, atol=0):
            raise RuntimeError("the backward function of one of its ops leaves no graph.")
        return g

    def _derivative(self, g: Tensor, direction: Tensor) -> Tensor:
        """The Hessian of all samples jointly times a direction ``[N, E]``."""
        (image,) = torch.autograd.grad(g, [self.edge], self._joined(direction), retain_graph=True, allow_unused=True)
        return torch.zeros_like(direction) if image is None else self._split(image)

    @staticmethod
    def _refuse_coupled(separate: Tensor, joint: Tensor) -> None:
        tolerance = 1e3 * torch.finfo(joint.dtype).eps * float(joint.abs().max() if joint.numel() else 0)
        if not torch.allclose(separate, joint, rtol=0, atol=tolerance):
            raise UnsupportedError(
                "`output=` needs a loss that treats the samples of a batch separately, found one whose second "
                "derivatives mix them (statistics over the batch, a contrastive loss, a batch axis other than 0?)."
            )

    def _split(self, tensor: Tensor) -> Tensor:
        return self.owners.split(tensor)

    def _joined(self, entries: Tensor) -> Tensor:
        return self.owners.join(entries.to(self.like.dtype), self.like.shape)


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)  # eigh takes no half precision


def by_autograd(
    scale: Tensor, input: Tensor, root: Tensor, edge: GradientEdge, owners: Owners | None = None
) -> Quadratic:
    """The loss ``root`` as a function of the output at ``edge``, where no closed form is known."""
    return Quadratic(root, scale, edge, input, owners or BatchAxis(1))


LOSSES[by_autograd] = by_autograd
