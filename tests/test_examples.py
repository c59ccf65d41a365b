"""The examples run, at reduced size, as a user starts them."""

import re
import subprocess
import sys
from pathlib import Path

import lightning_curv

ROOT = Path(__file__).parents[1]
EXTENSIONS = set(lightning_curv.__all__) - set(lightning_curv._ROOM) - {"Extension"}


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
    N, C, M, V, p = 8, 10, 2, 3, "4, 1, 5, 5"
    for field, documented, shape in (
        ("grad_batch", "[N, *p]", f"[{N}, {p}]"),
        ("batch_l2", "[N]", f"[{N}]"),
        ("sum_grad_squared", "[*p]", f"[{p}]"),
        ("variance", "[*p]", f"[{p}]"),
        ("diag_ggn_exact", "[*p]", f"[{p}]"),
        ("diag_ggn_mc", "[*p]", f"[{p}]"),
        ("diag_ggn_exact_batch", "[N, *p]", f"[{N}, {p}]"),
        ("diag_ggn_mc_batch", "[N, *p]", f"[{N}, {p}]"),
        ("sqrt_ggn_exact", "[C, N, *p]", f"[{C}, {N}, {p}]"),
        ("sqrt_ggn_mc", "[M, N, *p]", f"[{M}, {N}, {p}]"),
        ("kfac", "B ⊗ A", "[4, 4] ⊗ [25, 25]"),
        ("kflr", "B ⊗ A", "[4, 4] ⊗ [25, 25]"),
        ("kfra", "B ⊗ A", "[4, 4] ⊗ [25, 25]"),
        ("diag_h", "[*p]", f"[{p}]"),
        ("diag_h_batch", "[N, *p]", f"[{N}, {p}]"),
        ("hmp", "[V, *p]", f"[{V}, {p}]"),
        ("ggnmp", "[V, *p]", f"[{V}, {p}]"),
        ("pchmp", "[V, *p]", f"[{V}, {p}]"),
    ):
        assert re.search(rf"\.{field} +{re.escape(documented)} +{re.escape(shape)} ", out), field
    assert {name for name in EXTENSIONS if f"{name}(" not in out} == set()
    differences = re.findall(r" (\d\.\de[-+]\d+)", out)
    assert len(differences) == 3
    assert all(float(difference) < 1e-5 for difference in differences)
