r"""How much each sample may contribute: factors $c_i$ with $\|c_i g_i\| \le C$."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_curv.optimizers.settings import require_choice, require_positive


class Clipping(ABC):
    r"""A rule that bounds the contribution of every sample by `clip_norm`.

    A subclass says by which factor $c_i$ the gradient of sample i is multiplied; whatever it
    says must depend on that sample alone.

    Args:
        clip_norm: C > 0, the largest norm of a sample's contribution over all parameters together;
            kept under this name.

    Raises:
        ValueError: C is not positive.

    Example:
        >>> import torch
        >>> class Halved(Clipping):  # gradients of half their size, or none
        ...     def factors(self, norms, parameters):
        ...         small = norms.norm(dim=0, keepdim=True) <= 2 * self.clip_norm
        ...         return small / 2
        >>> Halved(clip_norm=1.0).factors(torch.tensor([[1.0, 3.0]]), parameters=1)
        tensor([[0.5000, 0.0000]])
    """

    def __init__(self, clip_norm: float = 1.0) -> None:
        require_positive("clip_norm", clip_norm)
        self.clip_norm = float(clip_norm)

    def set_clip_norm(self, clip_norm: float) -> None:
        """Change C between two steps, as a schedule does.

        Args:
            clip_norm: The new C > 0.
        """
        self.clip_norm = clip_norm

    @abstractmethod
    def factors(self, norms: Tensor, parameters: int) -> Tensor:
        """Factors of the per-sample gradients.

        Args:
            norms: Norms of the gradients of every parameter and sample, `[P, N]`; parameters
                without a gradient are left out.
            parameters: Number of all parameters.

        Returns:
            `[P, N]` or `[1, N]`; zero where the norm is not finite.
        """

    def factors_of(
        self, norms: Tensor, rows: Sequence[Tensor], parameters: Sequence[Tensor]
    ) -> Tensor:
        """`factors` for rules that need to know whose gradients these are.

        Args:
            norms: Norms of the gradients of every parameter and sample, `[P, N]`.
            rows: The parameter of every row of `norms`.
            parameters: All parameters.

        Returns:
            `[P, N]` or `[1, N]`; zero where the norm is not finite.
        """
        return self.factors(norms, len(parameters))

    def negligible(self, eps: float) -> float:
        """By how much a gradient may change without a change of its share in the sum.

        A share that changes by a few last digits of C is covered by what is stated of rounding.

        Args:
            eps: The relative distance of two numbers of the sum's type.

        Returns:
            The norm of such a change; 0 for a rule of which nothing is known.
        """
        return 0.0

    def noise_multiplier(self, accounted: float, expected_batch_size: float) -> float:
        """The noise multiplier of the gradient, which may pay for other releases of the step too.

        Args:
            accounted: σ that the accountant is told of.
            expected_batch_size: B̄, samples per step over all processes.

        Returns:
            The noise multiplier of the gradient; `accounted` unless the rule releases counts.

        Raises:
            ValueError: What else is released would cost more than σ allows.
        """
        return accounted

    def counts(self) -> Tensor | None:
        """What the rule has counted since the last step.

        Returns:
            The count of this process, `[]`, to be summed over all of them; `None` if the rule
            counts nothing.
        """
        return None

    def end_step(self, counts: Tensor | None, expected_batch_size: float) -> None:
        """Take in what the step released besides the gradient.

        Args:
            counts: `counts`, summed over the processes and noised, `[]`.
            expected_batch_size: B̄, samples per step over all processes.
        """
        return None

    def count_noise(self, expected_batch_size: float) -> float:
        """The noise that `counts` gets.

        Args:
            expected_batch_size: B̄, samples per step over all processes.

        Returns:
            Its standard deviation; 0 for a rule that counts nothing.
        """
        return 0.0

    def forget(self) -> None:
        """Drop what was counted since the last step."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What changes during training.

        Returns:
            Plain types; empty for a rule that stays as it is.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Args:
            state: What `state_dict` returned.
        """
        return None


def joint_norms(norms: Tensor) -> Tensor:
    """The norm of every sample's gradient by all parameters, `[N]`, of `[P, N]`.

    The norms are of the widest type: squares of those of float32 neither underflow nor overflow.
    """
    return norms.square().sum(0).sqrt_()


def _joint(norms: Tensor) -> Tensor:
    """The norm over all parameters, `[1, N]`."""
    return joint_norms(norms)[None]


def _where_finite(norms: Tensor, factors: Tensor) -> Tensor:
    """The factors; zero where a norm is not finite, of which a finite factor makes no bound."""
    return factors.where(norms < math.inf, 0.0)


class AtMostOne(Clipping):
    """A rule whose factors are at most 1: a share changes by no more than twice its gradient."""

    def negligible(self, eps: float) -> float:
        """Four last digits of C: eight in the sum, half of what rounding may do."""
        return 4 * eps * self.clip_norm


class FlatClipping(AtMostOne):
    r"""One norm over all parameters, $c_i = \min(1, C / \|g_i\|)$.

    Abadi et al., *Deep Learning with Differential Privacy*, CCS 2016, algorithm 1.

    Args:
        clip_norm: C > 0.

    Example:
        >>> import torch
        >>> norms = torch.tensor([[0.5, 3.0], [0.0, 4.0]])
        >>> FlatClipping(clip_norm=1.0).factors(norms, parameters=2)
        tensor([[1.0000, 0.2000]])
    """

    def factors(self, norms: Tensor, parameters: int) -> Tensor:
        """Factors of the per-sample gradients, `[1, N]`."""
        joint = _joint(norms)
        return _where_finite(joint, (self.clip_norm / joint).clamp(max=1))


class AutomaticClipping(Clipping):
    r"""Normalisation, $c_i = C / (\|g_i\| + \gamma)$; C is then a part of the learning rate.

    Bu, Wang, Zha & Karypis, *Automatic Clipping: Differentially Private Deep Learning Made Easier
    and Stronger*, NeurIPS 2023, eq. 4.1.

    Args:
        clip_norm: C > 0.
        stability: γ > 0; samples with much smaller gradients count less.

    Raises:
        ValueError: An argument is not positive.

    Example:
        >>> import torch
        >>> rule = AutomaticClipping(clip_norm=1.0, stability=1.0)
        >>> rule.factors(torch.tensor([[1.0, 3.0]]), parameters=1)
        tensor([[0.5000, 0.2500]])
    """

    def __init__(self, clip_norm: float = 1.0, stability: float = 0.01) -> None:
        super().__init__(clip_norm)
        require_positive("stability", stability)
        self.stability = stability

    def factors(self, norms: Tensor, parameters: int) -> Tensor:
        """Factors of the per-sample gradients, `[1, N]`."""
        joint = _joint(norms)
        return _where_finite(joint, self.clip_norm / (joint + self.stability))

    def negligible(self, eps: float) -> float:
        """Four last digits of γ, where the factor is C / γ."""
        return 4 * eps * self.stability


class PerLayerClipping(AtMostOne):
    r"""Every parameter on its own, by $C / \sqrt P$ with P parameters; together at most C.

    McMahan, Ramage, Talwar & Zhang, *Learning Differentially Private Recurrent Language Models*,
    ICLR 2018, section 3.

    Args:
        clip_norm: C > 0, over all parameters together.

    Example:
        >>> import torch
        >>> rule = PerLayerClipping(clip_norm=2.0)
        >>> rule.factors(torch.tensor([[1.0], [4.0], [0.5], [2.0]]), parameters=4).flatten()
        tensor([1.0000, 0.2500, 1.0000, 0.5000])
    """

    def factors(self, norms: Tensor, parameters: int) -> Tensor:
        """Factors of the per-sample gradients, `[P, N]`.

        A sample with any norm that is not finite counts nowhere.
        """
        # P bounds of C / √P are one of C: the squares add up.
        factors = (self.clip_norm / math.sqrt(parameters) / norms).clamp(max=1)
        return _where_finite(_joint(norms), factors)


class AdaptiveClipping(FlatClipping):
    r"""C follows a quantile of the norms, estimated privately.

    The step's share b̃ of samples with $\|g_i\| \le C$ is counted with noise of its own, and
    $C \leftarrow C \exp(-\eta (b̃ - \gamma))$. The noise multiplier σ that is accounted pays
    for both: the gradient gets $(\sigma^{-2} - (2\sigma_b)^{-2})^{-1/2}$. The count is
    divided by the *expected* batch size. Andrew, Thakkar, McMahan & Ramaswamy, *Differentially
    Private Learning with Adaptive Clipping*, NeurIPS 2021, algorithm 1 and theorem 1.

    Args:
        clip_norm: The first C > 0.
        quantile: γ in [0, 1], the share of samples that are not clipped.
        rate: η > 0, by how much C moves in a step.
        count_noise: σ_b, standard deviation of the count's noise; default: a twentieth of the
            expected batch size, and no less than the accounted σ.

    Raises:
        ValueError: An argument is out of range; in `noise_multiplier`, the noise of the count is
            too small for the σ that is accounted.

    Example:
        >>> rule = AdaptiveClipping(clip_norm=1.0, count_noise=10.0)
        >>> round(rule.noise_multiplier(1.0, expected_batch_size=100), 4)  # σ = 1 pays for both
        1.0013
    """

    def __init__(
        self,
        clip_norm: float = 1.0,
        quantile: float = 0.5,
        rate: float = 0.2,
        count_noise: float | None = None,
    ) -> None:
        super().__init__(clip_norm)
        if not 0 <= quantile <= 1:
            raise ValueError(f"`quantile` must lie in [0, 1], found {quantile}.")
        require_positive("rate", rate)
        if count_noise is not None:
            require_positive("count_noise", count_noise)
        self.quantile, self.rate, self._count_noise = quantile, rate, count_noise
        self._count: Tensor | None = None
        self._accounted = 0.0

    def factors(self, norms: Tensor, parameters: int) -> Tensor:
        """Factors of the per-sample gradients, `[1, N]`; counts the samples."""
        # Counted as ±1/2, a sample changes the count by a half, and by no more if it is removed.
        below = (_joint(norms) <= self.clip_norm).to(norms.dtype) - 0.5
        self._count = below.sum() + (0.0 if self._count is None else self._count)
        return super().factors(norms, parameters)

    def set_clip_norm(self, clip_norm: float) -> None:
        """Refuse any other norm: this rule moves C itself.

        Args:
            clip_norm: The C of a schedule.

        Raises:
            ValueError: C follows the norms already.
        """
        raise ValueError(
            "AdaptiveClipping moves C by itself, found a schedule for `clip_norm` too; pass a "
            "number, the first C, or use another `clipping`."
        )

    def noise_multiplier(self, accounted: float, expected_batch_size: float) -> float:
        """The larger noise multiplier of the gradient that leaves room for the noisy count.

        Theorem 1 of the paper: the inverse squares of both multipliers add up to that of σ, where
        the count has sensitivity 1/2.

        Raises:
            ValueError: The count alone would cost more than σ allows.
        """
        # For `count_noise`, which is asked afterwards.
        self._accounted = accounted
        if accounted == 0:
            return 0.0
        count_noise = self.count_noise(expected_batch_size)
        if 2 * count_noise <= accounted:
            raise ValueError(
                f"`count_noise` must be more than half of the noise multiplier {accounted}, found "
                f"{count_noise}: the count alone would spend the budget."
            )
        return float((accounted**-2 - (2 * count_noise) ** -2) ** -0.5)

    def count_noise(self, expected_batch_size: float) -> float:
        """The standard deviation σ_b; 0 where the gradient gets no noise either."""
        if self._accounted == 0:
            return 0.0
        if self._count_noise is not None:
            return self._count_noise
        # B̄ / 20 is the paper's choice. For small batches σ: of less than σ / 2 the count would
        # spend all.
        return max(expected_batch_size / 20, self._accounted)

    def counts(self) -> Tensor | None:
        """The number of samples below C minus those above, halved."""
        return torch.zeros(()) if self._count is None else self._count

    def end_step(self, counts: Tensor | None, expected_batch_size: float) -> None:
        """Move C towards the quantile."""
        if counts is not None:
            # The noise may take the share out of [0, 1], and C far away with it.
            share_below = min(max(float(counts) / expected_batch_size + 0.5, 0.0), 1.0)
            self.clip_norm *= math.exp(-self.rate * (share_below - self.quantile))
        self.forget()

    def forget(self) -> None:
        """Drop the count."""
        self._count = None

    def state_dict(self) -> dict[str, Any]:
        """The C that the norms have led to."""
        return {"clip_norm": self.clip_norm}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the saved C."""
        self.clip_norm = float(state["clip_norm"])


_RULES: dict[str, type[Clipping]] = {
    "flat": FlatClipping,
    "per_layer": PerLayerClipping,
    "automatic": AutomaticClipping,
    "adaptive": AdaptiveClipping,
}


def clipping_rule(name: str | Clipping, clip_norm: float) -> Clipping:
    """The rule of this name, or the rule itself."""
    if isinstance(name, Clipping):
        return name
    require_choice("clipping", name, (*_RULES, "per_group"))
    return _RULES[name](clip_norm)
