"""One rule per op: its output's cotangent and its recorded inputs give its parameters' `Term`s."""

from __future__ import annotations

from lightning_curv.rules.registry import RULES, Call, Rule, bind, rule

__all__ = ["RULES", "Call", "Rule", "bind", "rule"]

from lightning_curv.rules import (  # noqa: F401
    contraction,
    convolution,
    elementwise,
    embedding,
    experts,
    fallback,
    linear,
    normalization,
    recurrent,
)
