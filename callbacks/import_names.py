"""One `Callback` class for both import names of Lightning.

``lightning.pytorch.Callback`` and ``pytorch_lightning.Callback`` are separate copies, and each
LightningCLI accepts only its own; a class derived from both is accepted by both Trainers and both
CLIs.
"""

from typing import TYPE_CHECKING

import pytorch_lightning

if TYPE_CHECKING:
    from pytorch_lightning import Callback
else:
    try:
        import lightning.pytorch

        class Callback(lightning.pytorch.Callback, pytorch_lightning.Callback):
            """A callback for `lightning.pytorch` and for `pytorch_lightning`."""

    except ImportError:
        from pytorch_lightning import Callback

__all__ = ["Callback"]
