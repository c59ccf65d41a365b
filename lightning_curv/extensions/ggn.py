r"""The generalised Gauss-Newton matrix: its diagonal and its square root.

$$G = s \sum_n J_n^\top H_n J_n = \sum_n V_n V_n^\top, \qquad V_n = J_n^\top \sqrt{s H_n}$$

with the network's Jacobian $J_n$ and the loss Hessian $H_n = \nabla_f^2 \ell_n$.
"Exact" backpropagates one column of $\sqrt{s H_n}$ per output entry; "MC" M gradients for
targets drawn from the model, whose expectation is G. Dangel, Kunstner & Hennig, *BackPACK*, ICLR
2020, section 2.3; Martens, *New insights and perspectives on the natural gradient method*, JMLR
2020, section 9.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_curv.extensions.base import ExactGGN, Extension, MonteCarloGGN, Source
from lightning_curv.extensions.subsampling import wanted_samples

# Here was their home in version 0.1.0.
from lightning_curv.extensions.unevaluated import JacobianExact as JacobianExact
from lightning_curv.extensions.unevaluated import JacobianMC as JacobianMC
from lightning_curv.kernels import huge_pages
from lightning_curv.terms.jacobian import Jacobian


class DiagGGNExact(Extension):
    r"""Diagonal of the GGN, in `diag_ggn_exact` of the parameter's shape.

    It is $s \sum_n \mathrm{diag}(J_n^\top H_n J_n)$. Cost: as many backward passes as a
    sample has output entries. Memory: one pass.

    Example:
        >>> import torch
        >>> from lightning_curv import DiagGGNExact, curvature
        >>> layer = torch.nn.Linear(2, 1)
        >>> with curvature(DiagGGNExact()):
        ...     output = layer(torch.tensor([[1.0, 2.0]]))
        ...     torch.nn.functional.mse_loss(output, torch.zeros(1, 1)).backward()
        >>> layer.weight.diag_ggn_exact.round(decimals=4)
        tensor([[2., 8.]])
    """

    savefield = "diag_ggn_exact"
    source: Source = ExactGGN()

    def evaluate(self, jacobian: Jacobian) -> Tensor:
        """Sum the squares of J over columns and samples."""
        return jacobian.sum_squares()


class BatchDiagGGNExact(Extension):
    """The summands of `DiagGGNExact`, in `diag_ggn_exact_batch` of shape `[N, *p]`.

    They carry the scale of the loss: their sum over the samples is the diagonal. Cost: as
    `DiagGGNExact`; memory: N times the parameters.

    Example:
        >>> import torch
        >>> from lightning_curv import BatchDiagGGNExact, curvature
        >>> layer = torch.nn.Linear(2, 1)
        >>> with curvature(BatchDiagGGNExact()):
        ...     output = layer(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        ...     torch.nn.functional.mse_loss(output, torch.zeros(2, 1)).backward()
        >>> layer.weight.diag_ggn_exact_batch.squeeze(1).round(decimals=4)
        tensor([[ 1.,  4.],
                [ 9., 16.]])
    """

    savefield = "diag_ggn_exact_batch"
    source: Source = ExactGGN()

    def evaluate(self, jacobian: Jacobian) -> Tensor:
        """Sum the squares of J over columns."""
        return jacobian.sum_squares_per_sample()

    def accumulate(self, previous: Tensor, jacobian: Jacobian) -> Tensor:
        """Add those of further columns in place."""
        return jacobian.sum_squares_per_sample(previous)


class SqrtGGNExact(Extension):
    r"""Square root V of the GGN block, in `sqrt_ggn_exact` of shape `[C, N, *p]`.

    $\sum_{c,n} V_{cn} V_{cn}^\top = G$, where C is the number of output entries of a sample
    (classes times extra axes). Cost: as `DiagGGNExact`; memory: C N times the parameters.

    Args:
        subsampling: Indices of the samples that are wanted, in the wanted order; default: all.

    Raises:
        IndexError: In `backward`: a batch has no such sample.
        TypeError: In `backward`: an index is no integer.

    Example:
        >>> import torch
        >>> from lightning_curv import SqrtGGNExact, curvature
        >>> layer = torch.nn.Linear(2, 1)
        >>> with curvature(SqrtGGNExact()):
        ...     output = layer(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        ...     torch.nn.functional.mse_loss(output, torch.zeros(2, 1)).backward()
        >>> v = layer.weight.sqrt_ggn_exact.flatten(0, 1).flatten(1)
        >>> (v.T @ v).round(decimals=4)  # the Hessian of a least-squares problem: 2/N XᵀX
        tensor([[10., 14.],
                [14., 20.]])
    """

    savefield = "sqrt_ggn_exact"
    forms = True
    source: Source = ExactGGN(complete=True)

    def __init__(self, subsampling: list[int] | None = None) -> None:
        self.subsampling = subsampling

    def evaluate(self, jacobian: Jacobian) -> Tensor:
        """Form J, of the samples that are wanted."""
        return wanted_samples(jacobian, self.subsampling).per_sample()

    def merge(self, previous: Tensor, new: Tensor, jacobian: Jacobian) -> Tensor:
        """Stack the columns."""
        both = huge_pages.empty(new, len(previous) + len(new), *new.shape[1:])
        return torch.cat([previous, new], out=both)


class DiagGGNMC(DiagGGNExact):
    """Monte-Carlo estimate of `DiagGGNExact` from `mc_samples` draws, in `diag_ggn_mc`.

    Its expectation is the exact diagonal; the standard error falls with √M.

    Args:
        mc_samples: M, the number of target draws; each costs one backward pass.

    Example:
        >>> import torch
        >>> from lightning_curv import DiagGGNMC, curvature
        >>> layer = torch.nn.Linear(2, 1)
        >>> with curvature(DiagGGNMC(mc_samples=10)):
        ...     torch.nn.functional.mse_loss(layer(torch.ones(5, 2)), torch.zeros(5, 1)).backward()
        >>> layer.weight.diag_ggn_mc.shape
        torch.Size([1, 2])
    """

    savefield = "diag_ggn_mc"

    def __init__(self, mc_samples: int = 1) -> None:
        self.source = MonteCarloGGN(mc_samples)


class BatchDiagGGNMC(BatchDiagGGNExact):
    """The summands of `DiagGGNMC`, in `diag_ggn_mc_batch` of shape `[N, *p]`.

    They carry the scale of the loss: their sum over the samples is the estimate.

    Args:
        mc_samples: M, the number of target draws; each costs one backward pass.

    Example:
        >>> import torch
        >>> from lightning_curv import BatchDiagGGNMC, curvature
        >>> layer = torch.nn.Linear(2, 1)
        >>> with curvature(BatchDiagGGNMC()):
        ...     torch.nn.functional.mse_loss(layer(torch.ones(5, 2)), torch.zeros(5, 1)).backward()
        >>> layer.weight.diag_ggn_mc_batch.shape
        torch.Size([5, 1, 2])
    """

    savefield = "diag_ggn_mc_batch"

    def __init__(self, mc_samples: int = 1) -> None:
        self.source = MonteCarloGGN(mc_samples)


class SqrtGGNMC(SqrtGGNExact):
    """Monte-Carlo estimate of `SqrtGGNExact`, in `sqrt_ggn_mc` of shape `[M, N, *p]`.

    The columns are divided by √M: the sum of their outer products estimates the GGN block.

    Args:
        mc_samples: M, the number of target draws; each costs one backward pass.
        subsampling: Indices of the samples that are wanted, in the wanted order; default: all.

    Raises:
        IndexError: In `backward`: a batch has no such sample.
        TypeError: In `backward`: an index is no integer.

    Example:
        >>> import torch
        >>> from lightning_curv import SqrtGGNMC, curvature
        >>> layer = torch.nn.Linear(2, 1)
        >>> with curvature(SqrtGGNMC(mc_samples=3, subsampling=[4, 0])):
        ...     torch.nn.functional.mse_loss(layer(torch.ones(5, 2)), torch.zeros(5, 1)).backward()
        >>> layer.weight.sqrt_ggn_mc.shape
        torch.Size([3, 2, 1, 2])
    """

    savefield = "sqrt_ggn_mc"

    def __init__(self, mc_samples: int = 1, subsampling: list[int] | None = None) -> None:
        super().__init__(subsampling)
        self.source = MonteCarloGGN(mc_samples)


class GGNTraceMC(Extension):
    """Estimate of the trace of the parameter's GGN block, in `ggn_trace_mc`, a scalar.

    A draw costs no more than `BatchL2Grad`: no matrix of the parameter's shape is formed.

    Args:
        mc_samples: M, the number of target draws; each costs one backward pass.

    Example:
        >>> import torch
        >>> from lightning_curv import curvature
        >>> from lightning_curv.extensions import GGNTraceMC
        >>> layer = torch.nn.Linear(2, 1)
        >>> with curvature(GGNTraceMC()):
        ...     torch.nn.functional.mse_loss(layer(torch.ones(5, 2)), torch.zeros(5, 1)).backward()
        >>> layer.weight.ggn_trace_mc.shape
        torch.Size([])
    """

    savefield = "ggn_trace_mc"

    def __init__(self, mc_samples: int = 1) -> None:
        self.source = MonteCarloGGN(mc_samples)

    def evaluate(self, jacobian: Jacobian) -> Tensor:
        """Sum all squared entries of J."""
        return jacobian.squared_norms().sum()
