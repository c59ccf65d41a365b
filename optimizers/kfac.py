"""K-FAC: gradient descent preconditioned by Kronecker-factored curvature."""

from __future__ import annotations

from typing import Literal

from torch.optim.optimizer import ParamsT

from lightning_curv.extensions import KFLR, Extension, JacobianExact, JacobianMC
from lightning_curv.extensions.unevaluated import JacobianEmpirical
from lightning_curv.optimizers.curvature.base import ParamGroup
from lightning_curv.optimizers.curvature.eigenbasis import EigenCurvature
from lightning_curv.optimizers.curvature.empirical import curved
from lightning_curv.optimizers.curvature.kronecker import KroneckerCurvature
from lightning_curv.optimizers.second_order import SecondOrderOptimizer
from lightning_curv.optimizers.settings import (
    require_choice,
    require_count,
    require_fraction,
    require_positive,
)
from lightning_curv.optimizers.step.schedule import Schedule
from lightning_curv.optimizers.step_size.levenberg_marquardt import LevenbergMarquardt
from lightning_curv.optimizers.step_size.rules import QuadraticModel, StepRule, TrustClip

# Steps that `factor_interval="auto"` keeps curvature for at most.
LONGEST = 8
# Rows of the diagonal blocks of factors, at most, where the batch has as many samples.
LARGEST = 1000


class KFACOptimizer(SecondOrderOptimizer):
    r"""Kronecker-factored approximate curvature that chooses its own step and damping.

    The generalized Gauss-Newton block of each layer is approximated by $C = \bigotimes_i F_i$, one
    factor per axis of the weight (a linear or convolution layer: $B \otimes A$, its bias included
    as one more input), each a running mean over batches. A step moves along
    $d = \bigotimes_i (F_i + \gamma_i I)^{-1} g$.

    `lr="auto"`: the update is $\delta = \eta_t (-\alpha d + \beta \delta_{\text{last}})$ with the
        $\alpha, \beta$ that
    minimize the quadratic model $g^\top \delta + \tfrac12 \delta^\top (G + \lambda) \delta$ of the
    loss; $G$ is the generalized Gauss-Newton matrix of this batch itself, by per-sample dot
    products with what its backward pass recorded. $d$ is then made of a running mean of the
    gradients: along the gradient of a single batch that batch promises more than the loss will
    hold, its noise being part of both. Where every step has the same batch there is no noise, and
    $d$ is made of the gradient itself. $\eta_t$ is 1 unless a schedule or a parameter group says
    otherwise.

    A number $\eta$ as `lr`: $\delta = -\eta_t \nu d + \mu \delta_{\text{last}}$ with
    $\nu = \min(1, \sqrt{\kappa / \sum d^\top g})$: rate and schedule act after this trust-region
    clip.

    The damping $\lambda$ of a block is split by the traces of the factors,
    $\prod_i \gamma_i = \lambda$. "auto" damps in the coordinates (inputs − mean, 1) of a layer with
    bias, where the loss has a least damping those of standardized inputs, and sets
    $\lambda = c \, \bar\mu + \lambda_0$: $\bar\mu$ is the mean eigenvalue of the block there,
    $\lambda_0$ the least damping of the loss (`LossLimits`), and $c$ is adapted by Levenberg
    and Marquardt's rule if `step` is given `loss_fn`, or `optimizer.loss_fn` is set; otherwise it
    decays to 0.01.

    Parameters without curvature take Adam steps at `fallback_lr` $\eta_t / \eta_0$, with the
    rate $\eta_0$ that the optimizer was built with; `summary()` says which.

    Args:
        params: Parameters, or dicts of parameter groups.
        lr: "auto", or the learning rate $\eta$, per group. Values that schedulers set are relative
            to this one.
        damping: "auto", or $\lambda$, per group, in the unit of the loss' curvature: scale it with
            the loss.
        momentum: $\mu$ in [0, 1), per group; not used with `lr="auto"`.
        weight_decay: $w$, decoupled, per group: parameters shrink by $\eta_t w$, with `lr="auto"`
            by $\alpha \eta_t w$.
        factor_decay: Decay in [0, 1) of the running means of the factors, per group.
        gradient_decay: Decay in [0, 1) of the running mean of the gradients, per group; not used
            with a number as `lr`.
        factor_interval: Measure factors every so many steps; `lr="auto"` measures its quadratic
            model in every step even so. "auto" measures both in the first 10 steps, then keeps them
            for twice as long each time that the curvature along the step has grown by less than a
            factor of four, 8 steps at most: a step between reads nothing but the loss. Where
            `loss_fn` is given, or the loss has no known lower bound, they are measured in every
            step; so they are with a number as `lr`.
        inverse_interval: Refresh each inverse every so many steps, spread over the steps; more
            often in the first 20, and half as many times more rarely as curvature is kept for
            steps: every 40 where it is kept for 8.
        kl_clip: $\kappa$, bound on the squared length of a step of learning rate 1 in the
            curvature's metric; None for no bound; not used with `lr="auto"`.
        curvature: "mc" draws targets from the model, "exact" propagates one column per output,
            "empirical" takes the gradients themselves. Where the loss has no second derivative or
            is piecewise linear, the others take the gradients too, divided by the root of the loss,
            and warn.
        mc_samples: Targets drawn per example if `curvature="mc"`.
        weight_sharing: "expand" or "reduce", how factors treat convolutions and sequences.
        eigen: EKFAC: damp exactly, and correct the eigenvalues, in the eigenbasis of the factors.
        positions: Number of positions of a convolution, drawn anew for every batch, that its
            factors are computed from; None: all.
        split_factors: Larger factors are replaced by diagonal blocks of about this many rows, in
            coordinates in which the mean of the inputs of a layer with bias stays exact; None: none
            are. "auto": 144, so that preconditioning costs no more than a backward pass; with
            `lr="auto"` as many as the first batch has samples, 256 to 1,000.
        max_factor_size: Factors with more rows are replaced by their diagonal.
        shard_inverses: In distributed training every inverse is computed by one process. False
            sends it to all when it is renewed; True keeps it there, one copy in all processes
            together, and sends the preconditioned gradients in every step. Checkpoints then lack
            the inverses, which the first step after a restart computes anew; those of sharded
            parameters have them.
        fallback_lr: Adam's learning rate for parameters without curvature, per group.
        safeguards: Bound how far layers move together, shorten the steps of `lr="auto"` for small
            batches, where the loss no longer falls and where the next batches confirm less than
            was promised, average the curvature along a step over small batches, and take a step
            back after which the loss is far above its running mean.
            False: the step is that of the formulas above.

    Attributes:
        last_step: Learning rate, momentum, damping $c$ and reduction ratio of the last step, for
            logs.

    Raises:
        ValueError: A setting is out of range.
        TypeError: A parameter is complex or sparse.

    Cost: per step $|\theta| \sum_i d_i$ time; when curvature is measured, one more backward pass,
        without parameter gradients, and with `lr="auto"` about a forward pass on top; $d_i^3$ per
        inversion. Memory: two copies of all factors, two of the parameters, and the activations of
        the batch until `step`.

    Example:
        >>> import torch
        >>> from lightning_curv import KFACOptimizer, curvature
        >>> x = torch.linspace(-1, 1, 20, dtype=torch.float64)[:, None]
        >>> layer = torch.nn.Linear(1, 1, dtype=torch.float64)
        >>> optimizer = KFACOptimizer(
        ...     layer.parameters(), damping=1e-9, curvature="exact", safeguards=False
        ... )
        >>> with curvature(*optimizer.required_extensions()):
        ...     torch.nn.functional.mse_loss(layer(x), 3 * x + 1).backward()
        >>> optimizer.step()
        >>> # Least squares, solved in one step:
        >>> round(layer.weight.item(), 3), round(layer.bias.item(), 3)
        (3.0, 1.0)

    Source: J. Martens, R. Grosse, *Optimizing Neural Networks with Kronecker-factored Approximate
        Curvature*,
    ICML 2015; convolutions: R. Grosse, J. Martens, ICML 2016; the clip: J. Ba, R. Grosse, J.
    Martens, *Distributed Second-Order Optimization using Kronecker-Factored Approximations*, ICLR
    2017, section 5.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Literal["auto"] = "auto",
        damping: float | Literal["auto"] = "auto",
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        factor_decay: float = 0.9,
        gradient_decay: float = 0.7,
        factor_interval: int | Literal["auto"] = "auto",
        inverse_interval: int = 10,
        kl_clip: float | None = 0.1,
        curvature: Literal["mc", "exact", "empirical"] = "mc",
        mc_samples: int = 1,
        weight_sharing: Literal["expand", "reduce"] = "expand",
        eigen: bool = False,
        positions: int | None = 16,
        split_factors: int | Literal["auto"] | None = "auto",
        max_factor_size: int = 8192,
        shard_inverses: bool = False,
        fallback_lr: float = 1e-3,
        safeguards: bool = True,
    ) -> None:
        if shard_inverses and eigen:
            raise ValueError(
                "`shard_inverses=True` needs `eigen=False`: every process measures in the "
                "eigenbasis."
            )
        keeps = lr == "auto" and factor_interval == "auto"
        if factor_interval == "auto":
            factor_interval = LONGEST if keeps else 1
        require_count("factor_interval", factor_interval)
        require_count("inverse_interval", inverse_interval)
        require_count("mc_samples", mc_samples)
        require_count("max_factor_size", max_factor_size)
        require_choice("curvature", curvature, ("mc", "exact", "empirical"))
        require_choice("weight_sharing", weight_sharing, ("expand", "reduce"))
        most = 0
        if split_factors == "auto":
            split_factors = 256 if lr == "auto" else 144
            most = LARGEST if lr == "auto" else 0
        for name, count in {"positions": positions, "split_factors": split_factors}.items():
            if count is not None:
                require_count(name, count)
        if kl_clip is not None:
            require_positive("kl_clip", kl_clip)
        columns: dict[str, Extension] = {
            "mc": JacobianMC(mc_samples),
            "exact": JacobianExact(),
            "empirical": JacobianEmpirical(),
        }
        extension = columns[curvature]
        if curvature != "empirical":
            curved(extension)
        rule: StepRule = (
            QuadraticModel(extension, safeguards, keeps) if lr == "auto" else TrustClip(kl_clip)
        )
        model = EigenCurvature if eigen else KroneckerCurvature
        super().__init__(
            params,
            {
                "lr": 1.0 if lr == "auto" else lr,
                "damping": damping,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "factor_decay": factor_decay,
                "gradient_decay": gradient_decay if lr == "auto" else 0.0,
                "fallback_lr": fallback_lr,
            },
            curvature=model(
                extension,
                KFLR(weight_sharing),
                positions,
                max_factor_size,
                split_factors,
                shard_inverses,
                most,
            ),
            schedule=Schedule(factor_interval, inverse_interval, keeps=keeps),
            step_rule=rule,
            safeguards=safeguards,
            adaptation=LevenbergMarquardt(),
        )

    def _check_group(self, group: ParamGroup) -> None:
        super()._check_group(group)
        require_fraction("momentum", group["momentum"])
        for name in ("factor_decay", "gradient_decay"):
            require_fraction(name, group[name])
