"""What of the chosen quantities a model has, by which path, and how that is said."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from lightning_curv.callbacks.monitoring.parts import PARTS
from lightning_curv.callbacks.monitoring.quantities import Quantity

# Paths other than the first one, in words.
PATHS = {PARTS: "from micro-batches", "ggn_trace_joint_mc": "of the whole batch"}
# What errors advise to those who call `curvature`, for those who have a Trainer.
INSIDE = "inside `training_step`"
ADVICE = {
    "inside `curvature(...)` or `record()`, or `extend` the model": INSIDE,
    "inside `curvature(..., output=module)` or `record(output=module)`, "
    "or `extend` the module": INSIDE,
    "outside of `curvature(...)`, "
    "run it inside or `extend` the model": "outside of `training_step`, run it inside",
    "`curvature(..., output=...)`": "`output=`",
}


def for_trainers(error: Exception) -> str:
    """The text of an error, with what to do in terms of the callback."""
    text = str(error) or type(error).__name__
    for advice, own in ADVICE.items():
        text = text.replace(advice, own)
    return re.sub(r"`(batch_size|output)=`", r"`CurvatureCallback(\1=)`", text)


def in_short(error: Exception) -> str:
    """What was expected and found: its first sentence, or two."""
    expected, *rest = re.split(r"(?<=[.!?])\s+(?=[A-Z`])", for_trainers(error))
    told = expected if "found" in expected or not rest else f"{expected} {rest[0]}"
    return told.rstrip(".")


def reason(quantity: Quantity, off: Mapping[str, Exception]) -> Exception | None:
    """Why a quantity is not to be had by its first path; `None`: it is."""
    return next((off[name] for name in (quantity.name, *quantity.fields) if name in off), None)


def announcement(quantities: Sequence[Quantity], off: Mapping[str, Exception]) -> str:
    """One sentence: what is logged, how where not by the first path, and what is left out and why.

    Args:
        quantities: what was chosen.
        off: savefields, or names of quantities, that cannot be computed, and why.
    """
    logged: dict[str, list[str]] = {}
    left: dict[str, list[str]] = {}
    hints: dict[str, None] = {}
    for quantity in quantities:
        path, error = quantity.path(off), reason(quantity, off)
        if path is not None:
            logged.setdefault("" if error is None else f" ({how(path)})", []).append(quantity.name)
        if error is not None:
            left.setdefault(in_short(error), []).extend([quantity.name] if path is None else [])
            hints |= {
                in_short(off[field]): None
                for field in quantity.instead
                if path is None and field == PARTS
            }
    shown = (
        ", ".join(f"{', '.join(names)}{suffix}" for suffix, names in logged.items()) or "nothing"
    )
    clauses = [
        f"leaves out {', '.join(names)}: {text}" if names else f"because {text}"
        for text, names in left.items()
    ]
    return f"CurvatureCallback logs {'; '.join([shown, *clauses, *hints])}."


def how(path: Collection[str]) -> str:
    """In words, for a path that is not the first one."""
    return ", ".join(dict.fromkeys(PATHS.get(field, field) for field in path))
