"""Lightning under both of its import names, `lightning.pytorch` and `pytorch_lightning`.

These are separate copies. Only those that the user has imported are used; where there is none yet,
the first one that is installed. The other one would take its time, and whichever is imported last
gives the messages of both to its logger. Classes that Lightning has to know get the classes of all
copies as bases, also of those that are imported later: a Trainer or a LightningCLI accepts only
those of its own copy.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_fabric.utilities.exceptions import MisconfigurationException
    from pytorch_lightning import Callback

__all__ = ["Callback", "MisconfigurationException", "follow", "from_lightning"]
COPIES = ("pytorch_lightning", "lightning.pytorch")


def imported() -> list[ModuleType]:
    """The copies that are imported; one is imported if none is."""
    # A copy without `Callback` is still being imported.
    copies = [sys.modules[name] for name in COPIES if hasattr(sys.modules.get(name), "Callback")]
    return copies or [
        import_module(next(name for name in COPIES if find_spec(name.partition(".")[0])))
    ]


def from_lightning(module: str, name: str) -> Any:
    """What has a name in a module of Lightning.

    Args:
        module: its path in the package, as in `utilities.exceptions`.
        name: of a class or a function.
    """
    return getattr(import_module(f"{imported()[0].__name__}.{module}"), name)


def follow() -> None:
    """Make the classes here known to the copies of Lightning that were imported in the meantime."""
    for copy in imported():
        errors = import_module(f"{copy.__name__}.utilities.exceptions")
        for own, other in (
            (Callback, copy.Callback),
            (MisconfigurationException, errors.MisconfigurationException),
        ):
            if not issubclass(own, other):
                # Assigned, so that instances and subclasses that exist already have the new base as
                # well.
                own.__bases__ = (other, *own.__bases__)


# Bases that are found at run time tell type checkers nothing: for them Lightning's own stand here.
if not TYPE_CHECKING:

    class Callback(imported()[0].Callback):
        """A callback for every copy of Lightning."""

        def __new__(cls, *args: Any, **kwargs: Any) -> Callback:
            # The copy of the Trainer that will get this callback may be younger than this module.
            follow()
            return super().__new__(cls)

    class MisconfigurationException(
        from_lightning("utilities.exceptions", "MisconfigurationException")
    ):
        """A set-up that cannot work."""

    follow()
