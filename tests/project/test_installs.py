"""An installed copy, both kinds of editable install and a clone on the search path are the same package."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = "lightning_curv optimizers callbacks benchmarks examples pyproject.toml setup.py README.md LICENSE".split()  # noqa: SIM905
BUILDS = {
    "clone": None,
    "wheel": "build_wheel(folder)",
    "editable": "build_editable(folder)",
    "strict": "build_editable(folder, {'editable_mode': 'strict'})",
}
CHECK = """
import importlib, multiprocessing, pickle, sys
import lightning_curv
from lightning_curv.optimizers.linear_algebra.running_mean import next_weight

def found(name):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        return error.name != name
    return True

if __name__ == "__main__":
    from lightning_curv import CurvatureCallback, KFACOptimizer
    assert KFACOptimizer.__module__ == "lightning_curv.optimizers.kfac"
    assert CurvatureCallback.__module__ == "lightning_curv.callbacks.curvature"
    assert pickle.loads(pickle.dumps(KFACOptimizer)) is KFACOptimizer
    beside = sys.argv[1:]
    assert len(beside) > 5, beside
    assert [name for name in beside if found(f"lightning_curv.{name}")] == ["callbacks", "optimizers"]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(next_weight, [1.0, 0.5]) == 1.5
    print(lightning_curv.__path__[0])
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what a build reads, since builds write into the tree that they are made from."""
    copy = tmp_path_factory.mktemp("source")
    for name in SOURCE:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(
                path, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.png", "results")
            )
        else:
            shutil.copy(path, copy)
    return copy


@pytest.mark.parametrize("build", BUILDS)
def test_only_the_two_rooms_are_added(build, source, tmp_path):
    environment = tmp_path / "venv"
    venv.create(environment, symlinks=os.name != "nt")
    variables = {
        key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "PYTHONHOME"}
    }
    packages = next(environment.rglob("site-packages"))
    # A folder that a .pth file names is searched, but its own .pth files, of editable installs, are
    # not read.
    (packages / "outer.pth").write_text(
        "\n".join({sysconfig.get_path(key) for key in ("purelib", "platlib")})
    )
    if BUILDS[build] is None:
        variables["PYTHONPATH"] = str(source)
    else:
        command = (
            f"from setuptools.build_meta import *; folder = {str(tmp_path)!r}; {BUILDS[build]}"
        )
        subprocess.run(
            [sys.executable, "-c", command],
            cwd=source,
            env=variables,
            check=True,
            capture_output=True,
        )
        [wheel] = tmp_path.glob("*.whl")
        zipfile.ZipFile(wheel).extractall(packages)
    (tmp_path / "check.py").write_text(CHECK)
    beside = sorted({path.stem for path in source.iterdir()} - {"lightning_curv"})
    python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    command = [python, tmp_path / "check.py", *beside]
    run = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    parent = Path(run.stdout.strip()).parent
    if build == "strict":  # a folder of links
        assert parent.parent == source / "build"
    else:
        assert parent == (packages if build == "wheel" else source)
