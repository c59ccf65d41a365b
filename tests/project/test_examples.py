"""The examples run at reduced size, print what they show and save a picture."""

import logging
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_curv

EXAMPLES = Path(__file__).parents[2] / "examples"
EXTENSIONS = set(lightning_curv.__all__) & set(lightning_curv.extensions.__all__) - {"Extension"}
NOT_SCRIPTS = {"shared"}
TESTED_ELSEWHERE = {"dp_mnist"}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a script as `python examples/<name>.py` does, but in this process: its imports take seconds."""

    def run(name, *arguments, out="out.png"):
        picture = tmp_path / out
        script = str(EXAMPLES / f"{name}.py")
        monkeypatch.setattr(
            sys, "argv", [script, "--quick", "--out", str(picture), *map(str, arguments)]
        )
        monkeypatch.syspath_prepend(EXAMPLES)
        monkeypatch.chdir(tmp_path)
        runpy.run_path(script, run_name="__main__")
        assert picture.stat().st_size > 10_000
        printed = capsys.readouterr().out
        assert f"{'picture' if out.endswith('png') else 'page'}: {picture}" in printed
        return printed

    yield run
    logging.disable(logging.NOTSET)


def number(pattern, text):
    return float(re.search(pattern, text)[1])


def test_every_example_is_tested_and_described():
    scripts = {path.stem for path in EXAMPLES.glob("*.py")} - NOT_SCRIPTS
    tested = set(re.findall(r'run\("(\w+)"', Path(__file__).read_text())) | TESTED_ELSEWHERE
    assert tested == scripts
    gallery = (EXAMPLES.parent / "docs" / "examples.md").read_text()
    assert set(re.findall(r"python examples/(\w+)\.py", gallery)) == scripts
    for script in scripts:
        assert f"python examples/{script}.py" in (EXAMPLES / f"{script}.py").read_text()


def test_a_script_runs_from_any_folder(tmp_path):
    command = [sys.executable, str(EXAMPLES / "plain_loop.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "plain_loop.png").exists()


def test_mnist_learns(run, tmp_path):
    out = run("mnist", "--log-every", 2, "--log-dir", tmp_path)
    assert number(r"held-out accuracy: ([\d.]+)%", out) >= 85
    assert f"tensorboard --logdir {tmp_path}" in out
    assert list(tmp_path.glob("mnist/version_0/events*"))


def test_noise_scale_prints_a_table(run):
    out = run("noise_scale")
    rows = re.findall(r"^ +(\d+) +(\d+) +(\d+)$", out, re.MULTILINE)
    assert len(rows) >= 5
    assert all(int(noise) > 0 and int(suggested).bit_count() == 1 for _, noise, suggested in rows)


def test_autoencoder_kfac_is_ahead_of_adam(run):
    out = run("autoencoder")
    kfac, adam = (
        number(rf"{name}: squared error per image ([\d.]+)", out) for name in ("KFAC", "Adam")
    )
    assert 0.3 < kfac < 0.7
    assert 1 < adam < 5


def test_rates_that_are_found_beat_those_of_the_documentation(run):
    rows = dict(
        re.findall(r"^(\w+, lr [\w.]+): training loss ([\d.]+)", run("no_learning_rate"), re.M)
    )
    assert len(rows) == 4
    for name in ("AdamW", "SGD"):
        assert float(rows[f"{name}, lr found"]) < 0.7 * float(rows[f"{name}, lr 0.001"])


def test_transformer_writes(run):
    out = run("transformer")
    assert 2 < number(r"cross-entropy: ([\d.]+) nats", out) < 4
    assert number(r"noise scale: (\d+) sequences", out) > 0
    assert "\nThe " in out


def test_resnet_says_what_is_exact(run):
    out = run("resnet")
    rows = {row[:30].strip(): row[30:].split() for row in out.splitlines()}
    assert rows["per-sample gradients"][0] == rows["GGN"][0] == "refused"
    exact = [*rows["per-sample gradients"][1:], *rows["product with the Hessian"], *rows["GGN"][1:]]
    assert len(exact) == 7
    assert all(float(error) < 1e-12 for error in exact)
    assert all(0.01 < float(error) < 1 for error in rows["Kronecker factors of the GGN"])


def test_custom_extension_is_an_agreement_that_falls(run):
    means = [
        float(mean) for mean in re.findall(r"mean agreement ([\d.]+)", run("custom_extension"))
    ]
    assert len(means) == 4
    assert 1 > means[0] > means[-1] > 1 / 500


def test_cli_takes_callback_and_optimizer_from_yaml(run):
    out = run("cli", "--optimizer.init_args.lr=0.05")
    assert number(r"KFACOptimizer: held-out accuracy ([\d.]+)%", out) > 80
    assert number(r"curvature/norm_test: ([\d.]+) at the start", out) > 0


def test_plain_loop_learns(run):
    out = run("plain_loop")
    assert number(r"held-out accuracy ([\d.]+)%", out) > 85
    assert number(r"noise scale (\d+)", out) > 10


def test_fabric_learns_in_bfloat16(run):
    out = run("fabric")
    assert number(r"held-out accuracy ([\d.]+)%", out) > 85
    assert number(r"noise scale (\d+)", out) > 10


def test_report_says_what_is_to_be_known(run):
    out = run("report", out="page.html")
    assert re.search(
        r"^finding: The batch of 64 is [\d.]+ × (below|above) the noise scale$", out, re.M
    )
    assert "vanish" not in out


def test_report_says_why_sigmoids_do_not_learn(run):
    out = run("report", "--sigmoid", out="page.html")
    assert re.search(r"^finding: Gradients of layers? net\.1, net\.3.* vanish$", out, re.M)


def test_privacy_audit_refutes_the_broken_runs_only(run):
    out = run("privacy_audit")
    pairs = re.findall(r"^ε_lower = ([\d.]+) .* ε = ([\d.]+) at", out, re.MULTILINE)
    assert [float(lower) > float(claimed) for lower, claimed in pairs] == [False, True, True, True]
    assert out.count("REFUTED") == 3


def test_all_extensions_prints_the_documented_shapes(run):
    out = run("all_extensions")
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
