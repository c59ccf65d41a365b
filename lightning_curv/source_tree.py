"""Import `lightning_curv.optimizers` and `.callbacks` from a clone that is not installed.

In the source tree the two packages lie beside this one, at the root of the repository; in an
installed copy they lie inside it, and nothing here is used. The root itself must not be on the
package's search path: then everything that lies there (`setup.py`, `tests/`, `benchmarks/`)
could be imported under the package's name.
"""

from __future__ import annotations

import sys
from collections.abc import MutableSequence
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path

ROOMS = ("optimizers", "callbacks")
ROOT = Path(__file__).parents[1]
ENTRY = f"{ROOT}/<{' and '.join(ROOMS)}>"  # on the package's search path; no folder has this name


class RoomFinder:
    """Finds the two packages, and nothing else, for the entry of a search path that is theirs."""

    def __init__(self, entry: str) -> None:
        if entry != ENTRY:
            raise ImportError(
                f"{entry!r} is not {ENTRY!r}"
            )  # the protocol of `sys.path_hooks`: not for this finder

    def find_spec(self, fullname: str, target: object = None) -> ModuleSpec | None:
        room = fullname.rpartition(".")[2]
        if room not in ROOMS:
            return None
        return spec_from_file_location(fullname, ROOT / room / "__init__.py")


def add_rooms(search_path: MutableSequence[str]) -> None:
    """Add the two packages to the search path of this one, unless they lie inside it."""
    if not Path(__file__).with_name(ROOMS[0]).is_dir():
        sys.path_hooks.append(RoomFinder)
        search_path.append(ENTRY)
