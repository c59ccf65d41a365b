"""What of the chosen quantities a model has, by which path, and how that is said to somebody who has a Trainer."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from lightning_curv.callbacks.parts import PARTS
from lightning_curv.callbacks.quantities import Quantity

PATHS = {PARTS: "from micro-batches", "ggn_trace_products": "by products"}  # other than the first one
# What errors advise to those who call `curvature`, for those who have a Trainer.
ADVICE = (
    (r",? inside `curvature\(\.\.\.\)` or `record\(\)` or as an extended module", " in `training_step`"),
    (r"`curvature\(\.\.\., output=\.\.\.\)`", '`CurvatureCallback(output="name of the module")`'),
    (r"Run the forward pass inside `curvature\(\.\.\.\)` or `record\(\)`, or `extend` the model\.",
     "Run the forward pass inside `training_step`."),
    (r"[Pp]ass `batch_size=`(?! of)", "Pass `CurvatureCallback(batch_size=)`"),
)  # fmt: skip


def for_trainers(error: Exception) -> str:
    """The text of an error, with what to do in terms of the callback."""
    text = str(error) or type(error).__name__
    for advice, own in ADVICE:
        text = re.sub(advice, own, text)
    return text


def in_short(error: Exception) -> str:
    """Its first sentence."""
    return re.split(r"(?<=[.!?])\s+(?=[A-Z`])", for_trainers(error), maxsplit=1)[0].rstrip(".")


def reason(quantity: Quantity, off: Mapping[str, Exception]) -> Exception | None:
    """Why a quantity is not to be had by its first path."""
    return next((off[name] for name in (quantity.name, *quantity.fields) if name in off), None)


def announcement(quantities: Sequence[Quantity], off: Mapping[str, Exception]) -> str:
    """One sentence: what is logged, how where not by the first path, and what is left out and why; empty: all is well.

    Args:
        quantities: what was chosen.
        off: savefields, or names of quantities, that cannot be computed, and why.
    """
    reasons: dict[str, list[str]] = {}
    logged: dict[str, list[str]] = {}
    for quantity in quantities:
        path, error = quantity.path(off), reason(quantity, off)
        if path is None:
            last = off.get(PARTS) if PARTS in quantity.instead else None
            text = "" if error is None else in_short(error)
            reasons.setdefault(text if last is None else f"{text}, and {in_short(last)}", []).append(quantity.name)
        else:
            logged.setdefault("" if error is None else _how(path), []).append(quantity.name)
            if error is not None:
                reasons.setdefault(in_short(error), [])
    if not reasons:
        return ""
    shown = [f"{', '.join(names)}{f' ({how})' if how else ''}" for how, names in logged.items()]
    left = [
        f"leaves out {', '.join(names)}: {text}" if names else f"because {text}" for text, names in _ordered(reasons)
    ]
    return f"CurvatureCallback logs {', '.join(shown) or 'nothing'}; {'; '.join(left)}."


def _ordered(reasons: Mapping[str, Collection[str]]) -> list[tuple[str, Collection[str]]]:
    """What is left out first; a reason that was given for it is not given again."""
    left = [(text, names) for text, names in reasons.items() if names]
    said = " ".join(text for text, _ in left)
    return left + [(text, names) for text, names in reasons.items() if not names and text not in said]


def _how(path: Collection[str]) -> str:
    return ", ".join(dict.fromkeys(PATHS.get(field, field) for field in path))
