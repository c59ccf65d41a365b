"""Nothing assumes that there is one device: all of it on another one, and how often it would make a GPU wait."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packages import needs_compiler

SCRIPT = Path(__file__).parents[1] / "support" / "second_device_runs.py"
NETWORKS = ("mlp", "transformer")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the script found; it first compiles the device."""
    needs_compiler()
    folder = tmp_path_factory.mktemp("second_device")
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, SCRIPT, folder / "results.json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "results.json").read_text())


def test_results_are_those_of_the_processor(results):
    cells = results["cells"]
    assert len(cells) > 150
    assert {cell: found for cell, found in cells.items() if found != "right"} == {}


@pytest.mark.parametrize("network", NETWORKS)
def test_a_step_that_is_not_logged_does_what_it_does_without_the_callback(results, network):
    counts = results["counts"]
    assert counts[f"{network}: callback, step not logged"] == counts[f"{network}: Trainer, AdamW"]


@pytest.mark.parametrize("name", ["KFAC, fixed", "diagonal"])
@pytest.mark.parametrize("when", ["curvature in every step", "curvature in no step"])
def test_a_step_with_a_given_rate_makes_the_host_wait_never(results, name, when):
    counts = results["counts"][f"mlp: {name}, {when}"]
    assert (counts["reads"], counts["in_backward"], counts["uploads"]) == (0, 0, 0)
    assert counts["sent"] == 1


@pytest.mark.parametrize("name", ["KFAC, automatic", "diagonal, automatic"])
def test_a_step_that_finds_its_rate_makes_the_host_wait_once(results, name):
    counts = results["counts"][f"mlp: {name}"]
    assert (counts["reads"], counts["in_backward"]) == (1, 0)
    assert counts["float64"] <= 3


@pytest.mark.parametrize("network", NETWORKS)
def test_a_logged_step_makes_the_host_wait_once(results, network):
    plain = results["counts"][f"{network}: Trainer, AdamW"]
    logged = results["counts"][f"{network}: callback, logged step"]
    assert logged["reads"] == plain["reads"] + 1
    assert logged["in_backward"] == 0
    assert logged["launches"] <= 2.5 * plain["launches"]


@pytest.mark.parametrize("network", NETWORKS)
def test_a_private_step_makes_the_host_wait_no_more_often_for_more_layers(results, network):
    """Whether a target is ignored, whether norms are usual and cancel, which samples count."""
    private = results["counts"][f"{network}: private, SGD"]
    assert private["reads"] <= 3
    assert private["uploads"] == 1
