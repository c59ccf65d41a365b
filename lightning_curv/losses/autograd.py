"""Any other loss: its Hessian at outputs of the network, by automatic differentiation."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_curv.differentiation.internal_pass import internal_pass, nothing_below
from lightning_curv.differentiation.twice import differentiable, fused
from lightning_curv.errors import NoSecondDerivativeError, UnsupportedError, differentiating_loss
from lightning_curv.kernels.symmetric import eigh, root_product
from lightning_curv.losses.likelihoods import signs_of
from lightning_curv.losses.parts import LossPart, Multiplication, Signed
from lightning_curv.precision import wide
from lightning_curv.terms.owners import ChosenOwners, Owners, golden

LARGE = 256  # entries of a block; of more no matrix is formed to draw samples
STEPS = 32  # products that a sample of a larger block takes
MOST = 2**14  # entries of a block whose matrix is formed at all, 2 GiB


@dataclass(frozen=True)
class Rows:
    """Tensors as the entries of every sample.

    Attributes:
        likes: Tensors of their shapes, types and devices.
        owners: Which sample owns each row of them; `None`: the whole batch is one sample.
    """

    likes: Sequence[Tensor]
    owners: Sequence[Owners] | None

    @cached_property
    def sizes(self) -> list[int]:
        """The number of entries of a sample in every tensor."""
        if self.owners is None:
            return [like.numel() for like in self.likes]
        pairs = zip(self.owners, self.likes, strict=True)
        return [owners.split(like).shape[1] for owners, like in pairs]

    def split(self, tensors: Sequence[Tensor]) -> Tensor:
        """The entries of all tensors by sample, `[N, E]`."""
        if self.owners is None:
            return torch.cat([tensor.reshape(1, -1) for tensor in tensors], 1)
        pairs = zip(self.owners, tensors, strict=True)
        return torch.cat([owners.split(tensor) for owners, tensor in pairs], 1)

    def join(self, entries: Tensor) -> list[Tensor]:
        """The tensors whose `split` are `entries [N, E]`."""
        parts = entries.split(self.sizes, 1)
        tensors = []
        for number, (part, like) in enumerate(zip(parts, self.likes, strict=True)):
            part = part.to(like.dtype)
            if self.owners is None:
                tensors.append(part.reshape(like.shape))
            else:
                tensors.append(self.owners[number].join(part, like.shape))
        return tensors


@dataclass(frozen=True)
class Blocks:
    """How the entries of a sample fall into blocks that have no second derivatives in common.

    Entries `[N, E]` are `[N, outer, size, inner]`; a block is one place on the outer and the
    inner axis.
    """

    outer: int
    size: int
    inner: int = 1

    def split(self, entries: Tensor) -> Tensor:
        """`[N, E]` to `[N, blocks, size]`."""
        parts = entries.reshape(len(entries), self.outer, self.size, self.inner)
        entries_last = parts.transpose(2, 3)
        return entries_last.reshape(len(entries), self.outer * self.inner, self.size)

    def join(self, blocks: Tensor) -> Tensor:
        """Back to `[N, E]`."""
        parts = blocks.reshape(len(blocks), self.outer, self.inner, self.size)
        in_order = parts.transpose(2, 3)
        return in_order.reshape(len(blocks), self.outer * self.size * self.inner)


@dataclass
class Quadratic(LossPart):
    r"""The quadratic expansion of a loss around outputs f of a network: H = V Λ₊ Vᵀ per sample.

    With the eigenvalues $\nabla_f^2 \ell_n = V \Lambda V^\top$ the GGN takes the positive
    part Λ₊, the closest positive semi-definite matrix; for a loss that is convex in f that is the
    Hessian itself. There is no model to draw targets from: samples are V √Λ₊ ε with standard normal
    ε, whose expected outer product is H.

    Several outputs are one vector f, and what lies below one of them is held fixed when another is
    moved. Where entries of a sample have no second derivatives in common (the pixels of a sum over
    pixels, the tokens of a sum over tokens) H falls into blocks, which is found out by products
    with weighted vectors.

    Cost: one differentiation of the loss (not of the network) per entry of a block, and at most six
    more; N·E·B numbers of memory for E output entries of a sample in blocks of B. Samples of blocks
    of more than `LARGE` entries take `STEPS` differentiations and as many vectors, see
    `root_product`.

    Example:
        The quadratic f₀ f₁ has an indefinite Hessian; the GGN takes its positive part.

        >>> from torch.autograd.graph import get_gradient_edge
        >>> from lightning_curv.terms.owners import BatchAxis
        >>> f = torch.tensor([[1.0, 2.0]], requires_grad=True)
        >>> value = f.prod()
        >>> edges, owners = [get_gradient_edge(f)], [BatchAxis(1)]
        >>> part = Quadratic(edges, [f.detach()], owners, value, torch.ones(()))
        >>> part.multiplication()([torch.tensor([[1.0, 1.0]])])[0].round(decimals=3)
        tensor([[1., 1.]])

    Attributes:
        edges: Where the outputs are in the graph.
        likes: Tensors of their shapes, types and devices.
        owners: Which sample owns each row of them.
        root: The root of the backward pass.
        seed: The gradient it starts with.
        others: Nodes below which nothing belongs to this part: other parts of the loss, and the
            network.
        separate: Whether samples must not meet; else a loss in which they do is one function of the
            whole batch.
        chosen: Whether the user says that this is the output.
    """

    edges: Sequence[GradientEdge]
    likes: Sequence[Tensor]
    owners: Sequence[Owners]
    root: Tensor
    seed: Tensor
    others: Sequence[Node] = ()
    separate: bool = True
    chosen: bool = False

    @property
    def flat(self) -> bool:
        _, image = self._trial
        return not bool(image.any())

    def columns(self, complete: bool) -> Iterator[list[Tensor]]:
        """The columns √λ₊ v for every eigenvector v of a sample."""
        values, vectors = self._eigen
        if self.chosen and self.flat:
            warnings.warn(
                "The GGN is zero: the loss is linear in `output` of shape "
                f"{tuple(self.likes[0].shape)}. Choose an output further down, for example the "
                "logits below a log-softmax.",
                stacklevel=2,
            )
        values = values.clamp(min=0)
        used = _used(values, complete)
        return (self._column(values, vectors, block, k) for block, k in used)

    def sample(self, generator: torch.Generator) -> list[Tensor]:
        """The product V √Λ₊ ε; for blocks too large to be decomposed by products with H."""
        rows, blocks = self._layout
        decomposed = "_eigen" in self.__dict__  # another quantity has needed it
        if blocks.size > LARGE and not decomposed:
            outputs = blocks.split(rows.split(self.likes))
            noise = self._noise(outputs, generator)
            return self._joined(root_product(self._times_blocks, noise, STEPS))
        values, vectors = self._eigen
        noise = self._noise(values, generator)
        roots = values.clamp(min=0).sqrt()
        return self._joined(_product(vectors, roots * noise))

    def _noise(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """Standard normal numbers, `[N, ...]`.

        Some of the samples get what they would among all.
        """
        rows, _ = self._layout
        if rows.owners is not None:
            owners = self.owners[0]
        else:
            owners = None
        if not isinstance(owners, ChosenOwners):
            return torch.empty_like(like).normal_(generator=generator)
        every = like.new_empty(owners.whole.count, *like.shape[1:])
        every.normal_(generator=generator)
        return every[owners.chosen.to(like.device)]

    def multiplication(self) -> Multiplication:
        """The product V Λ₊ Vᵀ v as a function of v."""
        values, basis = self._eigen
        return partial(_positive_part, *self._layout, values.clamp(min=0), basis)

    def signed_columns(self) -> Iterator[Signed]:
        """The columns √|λ| v for every eigenvector v of a sample, with the signs of λ."""
        values, vectors = self._eigen
        for block, k in _used(values, complete=False):
            column = self._column(values.abs(), vectors, block, k)
            signs = signs_of(values[:, block, k])
            yield column, signs

    def _column(
        self,
        values: Tensor,
        vectors: Tensor,
        block: int,
        k: int,
    ) -> list[Tensor]:
        """The k-th eigenvector of a block times the root of its eigenvalue, zero elsewhere."""
        column = torch.zeros_like(values)
        roots = values[:, block, k].sqrt()
        column[:, block] = vectors[:, block, :, k] * roots.unsqueeze(1)
        return self._joined(column)

    def _joined(self, entries: Tensor) -> list[Tensor]:
        rows, blocks = self._layout
        return rows.join(blocks.join(entries))

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        """Λ `[N, blocks, B]` and V `[N, blocks, B, B]` of every sample's Hessian."""
        # Λ and V of all samples are decomposed in one call.
        hessian = self._hessian()
        self.__dict__.pop("_gradients", None)  # their graph is not needed any more
        # `eigh` takes no half precision.
        hessian = hessian.to(torch.promote_types(hessian.dtype, torch.float32))
        if hessian.shape[-1] == 1:
            return hessian[..., 0], torch.ones_like(hessian)
        # No decomposition takes the blocks of a diverging network.
        broken = ~hessian.isfinite().all(-1).all(-1)
        values, vectors = eigh(hessian.masked_fill(broken[..., None, None], 0))
        return values.masked_fill(broken[..., None], torch.nan), vectors

    def _hessian(self) -> Tensor:
        """The Hessian of every block, `[N, blocks, B, B]`.

        One differentiation gives a column of the matrices of all blocks and samples at once.
        """
        rows, blocks = self._layout
        if blocks.size > MOST:
            raise UnsupportedError(
                "The exact curvature of a loss that torch has no function for takes a matrix of "
                f"{blocks.size} x {blocks.size} numbers for outputs that have second derivatives "
                f"in common; at most {MOST} are taken. Use Monte-Carlo quantities (`DiagGGNMC`, "
                "`KFAC`), which take none, or `HMP`."
            )
        zeros = blocks.split(torch.zeros_like(rows.split(self.likes)))
        columns = []
        for entry in torch.arange(zeros.shape[2], device=zeros.device):
            direction = zeros.index_fill(2, entry, 1)
            columns.append(self._times_blocks(direction))
        if columns:
            # The differentiations have given its columns.
            hessian = torch.stack(columns, 2)
        else:
            hessian = zeros[..., None]
        return (hessian + hessian.mT) / 2  # rounding makes it asymmetric

    def _times_blocks(self, direction: Tensor) -> Tensor:
        """The Hessian times a direction, both `[N, blocks, B]`."""
        rows, blocks = self._layout
        return blocks.split(self._times(rows, blocks.join(direction)))

    @cached_property
    def _rows(self) -> Rows:
        return Rows(self.likes, self.owners)

    @cached_property
    def _trial(self) -> tuple[Tensor, Tensor]:
        """A direction that no structure annihilates, and its image: zero where the Hessian is."""
        if any(like.is_complex() for like in self.likes):
            raise UnsupportedError(
                "Expected real numbers at the outputs of the network, found complex ones. Let the "
                "last op with parameters return real and imaginary parts (`torch.view_as_real`), "
                "or use `HMP`."
            )
        outputs = self._rows.split(self.likes)
        different = golden(outputs.numel()).reshape(outputs.shape)
        # Added to the outputs: their type, their device and numbers of their magnitude.
        trial = outputs + 1 + different.to(outputs)
        return trial, self._times(self._rows, trial)

    @cached_property
    def _layout(self) -> tuple[Rows, Blocks]:
        """The smallest blocks that have no second derivatives in common.

        Raises:
            UnsupportedError: Second derivatives mix the samples, and they must be separate.
        """
        # The outputs as entries of every sample.
        rows = self._rows
        trial, image = self._trial
        # Rounding errors are relative to the image, and larger where much cancels, as in a
        # confident softmax: those of the same product computed otherwise tell.
        # Exactly zero, but for rounding.
        difference = self._times(rows, 1.1 * trial) / 1.1 - image
        noise = 10 * difference.abs()
        noise = noise + 100 * torch.finfo(image.dtype).eps * image.abs()
        for blocks in self._candidates(trial.shape[1]):
            if self._apart(rows, blocks, trial, image, noise.amax(1, keepdim=True)):
                return rows, blocks
        whole = Blocks(1, trial.shape[1])
        # Whoever found the owners of the outputs has verified that samples do not meet; an output
        # that the user has chosen was not looked at.
        verified = self.separate and not self.chosen
        if verified or not noise.numel():
            return rows, whole
        if self._apart(rows, whole, trial, image, 10 * noise.amax()):
            return rows, whole
        if self.separate:
            raise UnsupportedError(
                "Expected a loss that treats the samples of a batch separately, found one whose "
                "second derivatives mix them (statistics over the batch, a contrastive loss, a "
                "batch axis other than 0?). Use `GGNMP` or `HMP`, which need no samples."
            )
        return Rows(self.likes, None), Blocks(1, sum(like.numel() for like in self.likes))

    def _apart(
        self,
        rows: Rows,
        blocks: Blocks,
        trial: Tensor,
        image: Tensor,
        tolerance: Tensor,
    ) -> bool:
        """Whether blocks have no second derivatives in common.

        Then H maps a direction with a weight per block to the image with the same weights. NaN,
        which compares with nothing, is taken for that.
        """
        samples, count, size = blocks.split(trial).shape
        block_weights = golden(samples * count).reshape(samples, count, 1)
        weights = blocks.join(block_weights.to(trial).expand(samples, count, size))
        image_of_weighted = self._times(rows, weights * trial)
        error = image_of_weighted - weights * image
        too_large = error.abs() > tolerance
        return not bool(too_large.any())

    def _candidates(self, entries: int) -> list[Blocks]:
        """Ways in which the entries of a sample may fall into blocks, the smallest first."""
        candidates = [Blocks(entries, 1)]
        if len(self.likes) == 1:
            shape = self.likes[0].shape
            taken = {*self.owners[0].axes}
            # The last axis holds the classes, as of tokens [N, T, C] …
            if len(shape) > 1 and len(shape) - 1 not in taken and shape[-1]:
                candidates.append(Blocks(entries // shape[-1], shape[-1]))
            # … or the second one does, as of pixels [N, C, H, W].
            if len(shape) > 2 and taken == {0} and shape[1:].numel():
                inner = shape[2:].numel()
                candidates.append(Blocks(entries // (shape[1] * inner), shape[1], inner))
        # The whole sample is tried last, by the caller.
        smaller = [blocks for blocks in candidates if 0 < blocks.size < entries]
        return sorted(smaller, key=lambda blocks: blocks.size)

    def _times(self, rows: Rows, direction: Tensor) -> Tensor:
        """The Hessian of all samples jointly times a direction, both as entries `[N, E]`."""
        vectors = rows.join(direction)
        gradients = self._gradients
        if not gradients:
            return torch.zeros_like(direction)
        outputs = [gradient for _, gradient in gradients]
        seeds = [vectors[number] for number, _ in gradients]
        with (
            torch.enable_grad(),
            internal_pass(),
            nothing_below(self.others),
            differentiating_loss(),
        ):
            by_output = torch.autograd.grad(
                outputs,
                self.edges,
                seeds,
                retain_graph=True,
                allow_unused=True,
            )
        images = []
        for image, vector in zip(by_output, vectors, strict=True):
            images.append(torch.zeros_like(vector) if image is None else image)
        return rows.split(images)

    @cached_property
    def _gradients(self) -> list[tuple[int, Tensor]]:
        """The gradient at every output that this part depends on, with a graph of its own."""
        seed = self.seed.detach().clone().requires_grad_()
        with (
            torch.enable_grad(),
            internal_pass(),
            nothing_below(self.others),
            differentiating_loss(),
            differentiable(fused([self.root])),
        ):
            by_output = torch.autograd.grad(
                self.root,
                self.edges,
                seed,
                create_graph=True,
                allow_unused=True,
            )
        gradients = [(number, g) for number, g in enumerate(by_output) if g is not None]
        if gradients:
            self._refuse_lost([g for _, g in gradients], seed)
        # Those without a graph are constants: the loss is linear in these outputs.
        return [(number, g) for number, g in gradients if g.requires_grad]

    def _refuse_lost(self, gradients: Sequence[Tensor], seed: Tensor) -> None:
        """Raise where the graph of a `once_differentiable` function is lost.

        Torch drops it silently. Gradients are linear in the seed where their graph is whole.
        """
        # The gradient is linear in the seed s: its product with ∂g/∂s is ‖g‖², if nothing is lost.
        squares = [wide(g.detach()).square().sum() for g in gradients]
        size = torch.stack(squares).sum()
        whole = [g for g in gradients if g.requires_grad]

        def size_by_graph(scale: float) -> Tensor:
            """The same size if the graph is whole; other scales have other rounding errors."""
            directions = [scale * g.detach() for g in whole]
            with differentiating_loss():
                (share,) = torch.autograd.grad(
                    whole,
                    [seed],
                    directions,
                    retain_graph=True,
                    materialize_grads=True,
                )
            return wide(share * self.seed).sum() / scale

        first = 0 * size
        second = first
        if whole:
            first = size_by_graph(1.0)
            second = size_by_graph(1.1)
        eps = max(torch.finfo(g.dtype).eps for g in [seed, *gradients])
        rounding = 1e3 * eps * size + 100 * (first - second).abs()
        if bool((first - size).abs() > rounding):
            raise NoSecondDerivativeError(
                "Expected a loss that can be differentiated twice at the outputs of the network, "
                "found one with an op whose backward function leaves no graph. First-order "
                "quantities work with any loss."
            )


def _positive_part(
    rows: Rows,
    blocks: Blocks,
    values: Tensor,
    basis: Tensor,
    vectors: Sequence[Tensor],
) -> list[Tensor]:
    """The product V Λ₊ Vᵀ v, with the eigenvalues `values` and the eigenvectors `basis`."""
    entries = blocks.split(rows.split(vectors)).to(basis.dtype)
    along = torch.einsum("nbek,nbe->nbk", basis, entries)
    products = _product(basis, values * along)
    return rows.join(blocks.join(products))


def _product(basis: Tensor, along: Tensor) -> Tensor:
    """The matrix of every block times a vector, `[N, blocks, B]`."""
    return torch.einsum("nbek,nbk->nbe", basis, along)


def _used(values: Tensor, complete: bool) -> list[tuple[int, int]]:
    """The eigenvalues that are not zero up to rounding in all samples, as block and number.

    At least one, if there are any, so that parameters get zeros and not nothing.

    Args:
        values: The eigenvalues, `[N, blocks, B]`.
        complete: Take all of them.
    """
    if complete or not values.numel():
        used = torch.ones(values.shape[1:], dtype=torch.bool)
    else:
        magnitudes = values.abs()
        largest = magnitudes.amax(2, keepdim=True)
        rounding = torch.finfo(values.dtype).eps * values.shape[2] * largest
        used = ~(magnitudes <= rounding).all(0)  # NaN is used too
    numbers = [(block, k) for block, k in used.nonzero().tolist()]
    return numbers or [(0, 0)][: used.numel()]
