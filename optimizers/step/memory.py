"""What an optimizer knows before a step, to go back to: tensors are shared, containers copied."""

from __future__ import annotations

from typing import Any


def remembered(value: Any) -> Any:
    """A copy of nested dicts and lists whose leaves are the same objects.

    Args:
        value: In which tensors are replaced, not changed.

    >>> former = remembered({"weights": [0.0, 1.0]})
    >>> former
    {'weights': [0.0, 1.0]}
    """
    if isinstance(value, dict):
        return {key: remembered(item) for key, item in value.items()}
    if isinstance(value, list):
        return [remembered(item) for item in value]
    return value
