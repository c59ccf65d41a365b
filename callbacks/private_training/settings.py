"""Checks of the arguments of the callback for private training."""

from __future__ import annotations

from lightning_curv.optimizers.privacy.accounting import METHODS
from lightning_curv.optimizers.settings import require_choice, require_count, require_positive

SAMPLINGS = ("poisson", "truncated_poisson", "epoch")


def check(
    epsilon: float | None,
    delta: float,
    sampling: str,
    max_batch_size: int | None,
    accountant: str,
    on_budget: str,
    max_physical_batch_size: int | None,
    same_shapes: bool,
) -> None:
    """Raise a `ValueError` for what is out of range, and for what does not belong together."""
    if same_shapes and sampling == "epoch":
        raise ValueError(
            "`same_shapes` fills Poisson batches up, found sampling='epoch', whose batches "
            "have the same size for all neighbouring data sets; leave it out."
        )
    if max_physical_batch_size is not None:
        require_count("max_physical_batch_size", max_physical_batch_size)
        if sampling == "epoch":
            raise ValueError(
                "`max_physical_batch_size` splits Poisson batches, found sampling='epoch', "
                "which leaves batches as they are; use a smaller `batch_size` and "
                "`accumulate_grad_batches`."
            )
    if epsilon is not None:
        require_positive("epsilon", epsilon)
    if not 0 < delta < 1:
        raise ValueError(
            f"`delta` must lie in (0, 1), well below 1 / data set size, found {delta}."
        )
    require_choice("sampling", sampling, SAMPLINGS)
    require_choice("accountant", accountant, METHODS)
    require_choice("on_budget", on_budget, ("stop", "warn"))
    if (max_batch_size is not None) != (sampling == "truncated_poisson"):
        raise ValueError(
            "`max_batch_size` belongs to `sampling='truncated_poisson'`, found "
            f"max_batch_size={max_batch_size} with sampling={sampling!r}."
        )
