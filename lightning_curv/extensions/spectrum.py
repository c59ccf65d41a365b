r"""Traces and largest eigenvalues of the GGN and the Hessian, without their matrices."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from lightning_curv.devices import on_one_device
from lightning_curv.differentiation.internal_pass import internal_pass
from lightning_curv.errors import differentiating_twice
from lightning_curv.extensions.base import ExactGGN, Extension, GraphExtension
from lightning_curv.extensions.matvec import Product, all_parameters, ggn_product, hessian_product
from lightning_curv.kernels.onednn import fast_products
from lightning_curv.passes.passes import Passes
from lightning_curv.precision import widest
from lightning_curv.terms.jacobian import Jacobian
from lightning_curv.terms.squares import squared_sizes


class GGNTraceExact(Extension):
    r"""Trace of the parameter's block of the GGN, in `ggn_trace_exact`, a scalar.

    It is $\sum_{v,n} \|J[v, n]\|^2$. Cost: one backward pass per output entry of a sample; no
    matrix of the parameter's shape is formed.
    """

    savefield = "ggn_trace_exact"
    source = ExactGGN()

    def evaluate(self, jacobian: Jacobian) -> Tensor:
        """Sum all squared entries of J."""
        return jacobian.squared_norms().sum()


class HessianTraceMC(GraphExtension):
    r"""Estimate of the trace of the parameter's Hessian block, in `hessian_trace_mc`, a scalar.

    $\frac1M \sum_m v_m^\top (H v_m)$ with random signs $v_m$, restricted to the
    parameter's entries: the estimates of all blocks come from products with the Hessian of all
    parameters, and their sum estimates its trace. Unbiased for every differentiable network and
    loss. Hutchinson, *A stochastic estimator of the trace of the influence matrix*, Comm. Stat.
    1990.

    Args:
        mc_samples: M; each costs one backward pass, beside one with a graph.
    """

    savefield = "hessian_trace_mc"
    independent = False
    needs_samples = False
    needs_likelihood = False

    def __init__(self, mc_samples: int = 1) -> None:
        self.mc_samples = mc_samples

    def compute(self, passes: Passes) -> dict[Tensor, Tensor]:
        """Estimate one number per parameter."""
        params = all_parameters(passes)
        totals = {p: torch.zeros((), dtype=p.real.dtype, device=p.device) for p in params}
        with (
            torch.enable_grad(),
            internal_pass(),
            differentiating_twice(),
            fast_products(passes.multiplies),
        ):
            product = hessian_product(passes, params)
            for _ in range(self.mc_samples):
                signs = [_signs(p, passes.generator_on(p.device)) for p in params]
                for p, sign, image in zip(params, signs, product(signs), strict=True):
                    totals[p] += _products(sign, image).sum() / self.mc_samples
        return totals


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random signs; of a complex number one for its real and one for its imaginary part."""
    signs = torch.empty_like(like)
    parts = torch.view_as_real(signs) if like.is_complex() else signs
    parts.bernoulli_(generator=generator).mul_(2).sub_(1)
    return signs


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Products of entries; their sum is the inner product, of real and imaginary parts as well."""
    return (a.conj() * b).real if a.is_complex() else a * b


def _wide(tensor: Tensor) -> Tensor:
    """Half precision as float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class GGNTraceJointMC(GraphExtension):
    r"""Estimate of the trace of the parameter's GGN block from whole batches, a scalar.

    Saved in `ggn_trace_joint_mc`.

    $\frac1M \sum_m \|J^\top s_m\|^2$ with the Jacobian J of all outputs of the batch and
    random $s_m$ with $E\,s s^\top = H$. No samples are taken apart, so that they may
    influence each other (BatchNorm, a contrastive loss): the GGN is then that of the network as a
    function of the batch. Where they do not, `GGNTraceMC` varies less.

    Args:
        mc_samples: M; each costs one backward pass.
    """

    savefield = "ggn_trace_joint_mc"
    independent = False
    needs_samples = False
    batchwise = True

    def __init__(self, mc_samples: int = 1) -> None:
        self.mc_samples = mc_samples

    def compute(self, passes: Passes) -> dict[Tensor, Tensor]:
        """One number per parameter."""
        params = all_parameters(passes)
        edges = [get_gradient_edge(p) for p in params]
        totals = {p: torch.zeros((), dtype=_wide(p).real.dtype, device=p.device) for p in params}
        for part in passes.parts:
            for _ in range(self.mc_samples):
                gradients = passes.backward(part.edges, edges, part.sample(passes.generator))
                for p, gradient in zip(params, gradients, strict=True):
                    if gradient is not None:
                        totals[p] += squared_sizes(_wide(gradient)).sum() / self.mc_samples
        return totals


class MaxEigenvalue(GraphExtension):
    r"""Largest eigenvalue of a curvature matrix of all parameters, in `{matrix}_max_eigenvalue`.

    The matrix is the Hessian or the GGN of all parameters jointly, and the number the same on every
    parameter. It is found by Lanczos' recurrence, whose largest Ritz value after k
    products is at least as good as k steps of power iteration and never too large, up to rounding.
    For the Hessian it is the largest algebraic eigenvalue, the sharpness, also where a negative one
    is larger in magnitude. Memory: three vectors and the graph of a gradient. Golub & Van Loan,
    *Matrix Computations*, 2013, section 10.1; Ghorbani et al., *An investigation into neural net
    optimization via Hessian eigenvalue density*, ICML 2019.

    Args:
        matrix: Which of the two.
        products: At most that many products with the matrix.
        tolerance: Stop once a product changes the value by less than this, relatively.

    Example:
        >>> from lightning_curv import curvature
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> with curvature(MaxEigenvalue("hessian")):
        ...     output = layer(torch.tensor([[1.0, 2.0]]))
        ...     torch.nn.functional.mse_loss(output, torch.zeros(1, 1)).backward()
        >>> layer.weight.hessian_max_eigenvalue.round(decimals=3)
        tensor(10.)
    """

    independent = False
    needs_samples = False
    batchwise = True

    def __init__(
        self,
        matrix: Literal["hessian", "ggn"] = "hessian",
        products: int = 20,
        tolerance: float = 1e-3,
    ) -> None:
        self.savefield = f"{matrix}_max_eigenvalue"
        self.matrix = matrix
        self.products = products
        self.tolerance = tolerance
        self.needs_likelihood = matrix == "ggn"

    def compute(self, passes: Passes) -> dict[Tensor, Tensor]:
        """Find the value, the same for all parameters."""
        params = all_parameters(passes)

        def random_like(parameter: Tensor) -> Tensor:
            shape = parameter.shape
            dtype = parameter.dtype
            device = parameter.device
            generator = passes.generator_on(device)
            noise = torch.randn(shape, dtype=dtype, device=device, generator=generator)
            return noise.contiguous()

        start = [random_like(parameter) for parameter in params]
        with (
            torch.enable_grad(),
            internal_pass(),
            differentiating_twice(),
            fast_products(passes.multiplies),
        ):
            if self.matrix == "hessian":
                make_product = hessian_product
            else:
                make_product = ggn_product
            product = make_product(passes, params)
            value = largest_eigenvalue(product, start, self.products, self.tolerance)
        return {p: passes.seed.new_tensor(value) for p in params}


def largest_eigenvalue(
    product: Product,
    start: list[Tensor],
    products: int,
    tolerance: float,
) -> float:
    """Largest Ritz value of a symmetric matrix after at most that many products with it.

    Lanczos' recurrence: `alpha` and `beta` are the entries of the tridiagonal matrix.
    """
    norm = _dot(start, start) ** 0.5
    current = [x / norm for x in start]
    previous = [torch.zeros_like(x) for x in start]
    diagonal: list[float] = []
    beside: list[float] = []
    value = math.nan
    beta = 0.0
    for _ in range(products):
        image = product(current)
        alpha = _dot(current, image)
        diagonal.append(alpha)
        last = value
        value = _largest(diagonal, beside)
        rest = [y - alpha * x - beta * z for y, x, z in zip(image, current, previous, strict=True)]
        beta = _dot(rest, rest) ** 0.5
        # NaN compares false: not in the first round, and not for ever where the loss is not finite
        if abs(value - last) <= tolerance * abs(value) or not beta > 1e-6 * abs(value):
            break
        beside.append(beta)
        previous = current
        current = [x / beta for x in rest]
    return value


def _largest(diagonal: list[float], beside: list[float]) -> float:
    """The largest eigenvalue of a symmetric tridiagonal matrix; NaN if it is not finite."""
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if beside:
        off = torch.tensor(beside, dtype=torch.float64)
        matrix += torch.diag(off, 1) + torch.diag(off, -1)
    if not bool(matrix.isfinite().all()):
        return math.nan
    return float(torch.linalg.eigvalsh(matrix)[-1])


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    """The dot product, summed in the widest type and read from the device once."""
    products = [_products(x, y).sum(dtype=widest(x.device)) for x, y in zip(a, b, strict=True)]
    return float(torch.stack(on_one_device(products)).sum())
