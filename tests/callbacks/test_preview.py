"""What would be logged is known before a run."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from kinds import Contrastive, Kind, Masked, Normed, Quantiles
from monitoring import ManualNet
from torch import nn

from lightning_curv import CurvatureCallback
from lightning_curv.callbacks.import_names import MisconfigurationException

ROOT = Path(__file__).parents[2]


def preview(kind, **settings):
    module = kind().double()
    table = CurvatureCallback.preview(module, module.batch(0), **settings)
    return {row.quantity: row for row in table.rows}, table


def test_every_quantity_has_a_path_and_a_price():
    rows, table = preview(Masked, quantities="all")
    assert rows["grad_variance"].path == "exact"
    assert rows["ggn_trace"].path == "Monte-Carlo"
    assert rows["grad_norm"].price is None
    assert rows["ggn_trace_exact"].price > rows["ggn_trace"].price > 0
    assert table.samples == 6
    text = str(table)
    assert all(name in text for name in rows)
    assert "A step of 6 samples takes" in text


@pytest.mark.parametrize("kind", [Normed, Contrastive])
def test_other_paths_and_what_is_not_to_be_had_are_named(kind):
    rows, _ = preview(kind)
    assert rows["sample_norms"].path == "not"
    assert rows["noise_scale"].path == "from micro-batches, if there are several"
    assert rows["ggn_trace"].path == "of the whole batch"
    assert all(
        "influence each other" in rows[name].reason
        for name in ("sample_norms", "noise_scale", "ggn_trace")
    )
    assert rows["ggn_trace"].price > 0


def test_a_preview_leaves_nothing_behind():
    class Dropping(Quantiles):
        def build(self):
            super().build()
            self.net = nn.Sequential(self.net, nn.Dropout(0.5), nn.BatchNorm1d(3))

    module = Dropping().double()
    module.net[0][0].weight.grad = torch.ones(8, 4, dtype=torch.float64)
    state = {name: value.tolist() for name, value in module.state_dict().items()}
    before, mode = torch.get_rng_state(), [m.training for m in module.modules()]
    CurvatureCallback.preview(module, module.batch(0), quantities="all")
    assert torch.equal(before, torch.get_rng_state())
    assert mode == [m.training for m in module.modules()]
    assert {name: value.tolist() for name, value in module.state_dict().items()} == state
    assert module.net[0][0].weight.grad.eq(1).all()
    assert all(p.grad is None for p in module.net[2].parameters())
    assert all(set(vars(p)) <= {"grad"} for p in module.parameters())


def test_what_has_no_preview_says_so():
    class Lossless(Kind):
        def build(self):
            self.net = nn.Linear(1, 1)

        def training_step(self, batch, batch_idx):
            return None

    with pytest.raises(MisconfigurationException, match="found manual optimization"):
        CurvatureCallback.preview(ManualNet(), None)
    with pytest.raises(MisconfigurationException, match="returns a loss, found none"):
        CurvatureCallback.preview(Lossless(), None)


def doctor(*arguments):
    command = [sys.executable, "-m", "lightning_curv", "doctor", *arguments]
    return subprocess.run(
        command, cwd=ROOT / "tests" / "support", capture_output=True, text=True, check=False
    )


def test_the_doctor_prints_versions_and_the_table():
    result = doctor("kinds:Normed", "--batch", "kinds:normed_batch")
    assert not result.returncode, result.stderr
    assert f"torch {version('torch')}" in result.stdout
    assert "of the whole batch" in result.stdout


def test_the_doctor_says_what_is_missing():
    assert "torch " in doctor().stdout
    assert "Expected MODULE:NAME" in doctor("kinds").stderr
    assert "`train_dataloader`, or `--batch MODULE:NAME`" in doctor("kinds:Normed").stderr
