"""Lightning callbacks: the only room that imports Lightning.

>>> import pytorch_lightning as pl
>>> from lightning_curv.callbacks import CurvatureCallback
>>> callback = CurvatureCallback(every_n_steps=10)
>>> trainer = pl.Trainer(callbacks=[callback], logger=False, enable_checkpointing=False)
"""

from lightning_curv.callbacks.audit import privacy_audit
from lightning_curv.callbacks.curvature import CurvatureCallback
from lightning_curv.callbacks.import_names import follow as follow
from lightning_curv.callbacks.monitoring.alarm import Alarm
from lightning_curv.callbacks.pictures import plot_critical_batch_size
from lightning_curv.callbacks.privacy import PrivacyCallback

__all__ = [
    "Alarm",
    "CurvatureCallback",
    "PrivacyCallback",
    "plot_critical_batch_size",
    "privacy_audit",
]
