"""The examples run, at reduced size, as a user starts them."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(script, *arguments):
    command = [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_mnist_learns_and_draws_its_curves(tmp_path):
    out = run("mnist.py", "--steps", 25, "--log-every", 2, "--log-dir", tmp_path)
    accuracy = float(re.search(r"held-out accuracy: ([\d.]+)%", out)[1])
    assert accuracy >= 85
    assert (tmp_path / "mnist" / "version_0" / "curves.png").stat().st_size > 10_000
    assert f"tensorboard --logdir {tmp_path}" in out


def test_all_extensions_prints_the_documented_shapes():
    out = run("all_extensions.py")
    N, C, M, p = 8, 10, 2, "4, 1, 5, 5"
    for field, shape in {
        "grad_batch": f"{N}, {p}",
        "batch_l2": f"{N}",
        "sum_grad_squared": p,
        "variance": p,
        "diag_ggn_exact": p,
        "diag_ggn_mc": p,
        "diag_ggn_exact_batch": f"{N}, {p}",
        "diag_ggn_mc_batch": f"{N}, {p}",
        "sqrt_ggn_exact": f"{C}, {N}, {p}",
        "sqrt_ggn_mc": f"{M}, {N}, {p}",
    }.items():
        assert re.search(rf"\.{field} +0\.weight \[{shape}\]", out), field
    for field in ("kfac", "kflr"):
        assert re.search(rf"\.{field} +0\.weight \[4, 4\] ⊗ \[25, 25\]  0\.bias \[4, 4\]", out), field
    differences = re.findall(r" (\d\.\de[-+]\d+)", out)
    assert len(differences) == 3
    assert all(float(difference) < 1e-5 for difference in differences)
