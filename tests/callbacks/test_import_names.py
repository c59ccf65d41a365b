"""Importing this package changes nothing for Lightning, whichever of its names is used, and in which order."""

import subprocess
import sys

import pytest
from packages import needs

NAMES = ("pytorch_lightning", "lightning.pytorch")
MODEL = """
import torch
class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(2, 1)
    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
trainer = L.Trainer(max_epochs=1, callbacks=[CurvatureCallback()], accelerator="cpu", logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1)
trainer.fit(Net(), torch.utils.data.DataLoader(torch.ones(4, 2), batch_size=2))
assert "curvature/grad_norm" in trainer.callback_metrics
"""
LOGGER = """
from lightning_utilities.core import rank_zero
print(rank_zero.log.name)
"""


def run_python(code):
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert not result.returncode, result.stderr
    return result.stdout.split()


def test_the_engine_and_the_optimizers_import_no_lightning():
    names = [*NAMES, "lightning", "lightning_fabric", "torchmetrics"]
    code = "import lightning_curv, sys; lightning_curv.curvature; lightning_curv.KFACOptimizer; "
    assert run_python(f"{code} print([name for name in {names} if name in sys.modules])") == ["[]"]


@pytest.mark.parametrize("ours_first", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_logger_of_the_users_lightning_stays(name, ours_first):
    needs(name)
    lines = [f"import {name} as L", "from lightning_curv import CurvatureCallback, PrivacyCallback"]
    code = "\n".join([*(reversed(lines) if ours_first else lines), MODEL, LOGGER])
    assert run_python(code)[-1] == f"{name}.utilities.rank_zero"


@pytest.mark.parametrize("name", NAMES)
def test_the_other_copy_of_lightning_is_not_imported(name):
    needs(name)
    (other,) = {*NAMES} - {name}
    code = f"import {name}, sys; before = {other!r} in sys.modules; import lightning_curv; "
    code += f"lightning_curv.CurvatureCallback; print(before, {other!r} in sys.modules)"
    before, after = run_python(code)
    assert before == after


@pytest.mark.parametrize("name", NAMES)
def test_classes_follow_a_copy_that_is_imported_later(name):
    needs(name)
    (other,) = {*NAMES} - {name}
    code = f"""
import {other}
from lightning_curv import CurvatureCallback
import {name} as L
assert isinstance(CurvatureCallback(), L.Callback) and isinstance(CurvatureCallback(), {other}.Callback)
import pickle
assert isinstance(pickle.loads(pickle.dumps(CurvatureCallback())), L.Callback)
{MODEL}
"""
    run_python(code)


def test_importing_loads_nothing_that_torch_has_not_loaded_but_the_standard_library():
    """What takes long to import is a library: sympy or Lightning take longer than all of ours."""
    code = """
import sys
import torch
before = set(sys.modules)
import lightning_curv
for name in ("curvature", "BatchGrad", "KFACOptimizer"):
    getattr(lightning_curv, name)
added = {name.split(".")[0] for name in set(sys.modules) - before}
print(*(added - set(sys.stdlib_module_names)))
"""
    assert {*run_python(code)} <= {"lightning_curv", "torch"}
