"""Which of the tricks for speed are on: all, unless the environment says otherwise.

`LIGHTNING_CURV_KERNELS=plain` switches all of them off, `LIGHTNING_CURV_KERNELS=onednn` or
`=huge_pages` leaves one on. Results differ in rounding at most; use it to compare timings, or
where a library misbehaves on some processor. It is read once, at the first use.
"""

from __future__ import annotations

import os
from functools import cache

VARIABLE = "LIGHTNING_CURV_KERNELS"
KERNELS = ("huge_pages", "onednn")


@cache
def enabled(kernel: str) -> bool:
    """Whether one of `KERNELS` may be used.

    Raises:
        ValueError: The environment names a kernel that does not exist.
    """
    names = _names()
    if unknown := names - {*KERNELS, "plain"}:
        raise ValueError(
            f"Expected {VARIABLE} to be 'plain' or a list of {', '.join(KERNELS)}, found "
            f"{', '.join(sorted(unknown))!r}. Unset it to use all."
        )
    return not names or kernel in names


def named(kernel: str) -> bool:
    """Whether the environment names one of `KERNELS`: it is then on wherever it is there at all."""
    return kernel in _names()


def _names() -> set[str]:
    wanted = os.environ.get(VARIABLE, "")
    return {name.strip() for name in wanted.split(",") if name.strip()}
