"""The package is what pyproject, README and the design say it is."""

import ast
import doctest
import importlib
import re
import runpy
import subprocess
import sys
from importlib.util import resolve_name
from pathlib import Path

import pytest
import torch
from packages import needs, needs_browser
from torch.utils.data import DataLoader, TensorDataset

import lightning_curv
from lightning_curv import CurvatureCallback

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
# Which rooms each room may import from.
ARROWS = {
    "lightning_curv": {"lightning_curv"},
    "optimizers": {"lightning_curv", "optimizers"},
    "callbacks": {"lightning_curv", "optimizers", "callbacks"},
}
SOURCES = sorted(path for room in ARROWS for path in (ROOT / room).rglob("*.py"))


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(
        part
        for part in ("lightning_curv", *parts[parts[0] == "lightning_curv" :])
        if part != "__init__"
    )


def imported_modules(path):
    tree = ast.parse(path.read_text())
    if (
        path == ROOT / "lightning_curv" / "__init__.py"
    ):  # lazy: its imports are for type checkers only
        tree.body = [node for node in tree.body if not isinstance(node, ast.If)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module_name(path.with_name("__init__.py"))
            source = resolve_name("." * node.level + (node.module or ""), package)
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_packages_list_equals_the_tree():
    tree = {module_name(path) for path in SOURCES if path.name == "__init__.py"}
    assert set(SETUPTOOLS["packages"]) == tree
    assert SETUPTOOLS["package-dir"] == {
        f"lightning_curv.{room}": room for room in ("optimizers", "callbacks")
    }


def test_source_distribution_holds_what_the_tests_need():
    words = (ROOT / "MANIFEST.in").read_text().split()
    files = "mkdocs.yml Makefile CHANGELOG.md CITATION.cff CODE_OF_CONDUCT.md SECURITY.md .pre-commit-config.yaml"
    for name in (".ci", ".github", "benchmarks", "docs", "examples", "tests", *files.split()):
        assert (ROOT / name).exists()
        assert name in words


def test_version_is_stated_once():
    version = lightning_curv.__version__
    assert "version" in PYPROJECT["project"]["dynamic"]
    assert SETUPTOOLS["dynamic"]["version"] == {"attr": "lightning_curv.__version__"}
    assert re.search(
        rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$",
        (ROOT / "CHANGELOG.md").read_text(),
        re.M,
    )
    stated = [
        path.name
        for path in ROOT.iterdir()
        if path.is_file() and f'"{version}"' in path.read_text("utf-8")
    ]
    assert stated == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_point_one_way(path):
    room = path.relative_to(ROOT).parts[0]
    for module in imported_modules(path):
        top, *rest = module.split(".")
        if top == "lightning_curv":
            target = rest[0] if rest and rest[0] in ARROWS else "lightning_curv"
            lazy = lightning_curv._ROOM.get(rest[0]) if rest else None
            assert target in ARROWS[room], f"{path} imports {module}"
            assert lazy not in set(ARROWS) - ARROWS[room], f"{path} imports {module}"
        elif room != "callbacks":
            assert top not in {"pytorch_lightning", "lightning", "lightning_fabric"}, (
                f"{path} imports {module}"
            )


def package_of(module):
    """The package that a module belongs to, in `optimizers` and `callbacks` one below; loose modules stand alone."""
    parts = module.split(".")[1:]
    return ".".join(parts[: 1 + (parts[0] in ARROWS)])


def test_packages_depend_on_each_other_without_a_circle():
    modules = {module_name(path): path for path in SOURCES if path.parent != ROOT}
    arrows = {}
    for module, path in modules.items():
        if module == "lightning_curv" or module in {f"lightning_curv.{room}" for room in ARROWS}:
            continue  # doors
        targets = {
            package_of(target)
            for target in imported_modules(path)
            if target in modules and "." in target
        }
        arrows.setdefault(package_of(module), set()).update(targets - {package_of(module), *ARROWS})
    while free := {package for package, targets in arrows.items() if not targets & arrows.keys()}:
        arrows = {package: targets for package, targets in arrows.items() if package not in free}
    assert not arrows, f"these packages depend on each other: {arrows}"


def test_lazy_exports_resolve():
    for name in lightning_curv.__all__:
        assert getattr(lightning_curv, name).__name__ == name
        assert name in dir(lightning_curv)
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        lightning_curv.no_such_name


def test_type_checkers_see_every_export():
    tree = ast.parse((ROOT / "lightning_curv" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    lazy = {alias.name: node.module for node in block.body for alias in node.names}
    assert lazy == {name: f"lightning_curv.{room}" for name, room in lightning_curv._ROOM.items()}
    eager = set(lightning_curv.__all__) - set(lazy)
    assert eager <= vars(lightning_curv).keys()


def test_engine_and_optimizers_do_not_import_lightning():
    code = (
        "import sys, lightning_curv as c; c.curvature, c.extend, c.KFAC, c.KFACOptimizer;"
        "print([m for m in sys.modules if m.startswith(('pytorch_lightning', 'lightning.', 'lightning_fabric'))])"
    )
    assert run_python(code).strip() == "[]"


def test_readme_and_ci_run_the_same_test_command():
    readme = re.findall(r"```bash\n(.*)\n```", (ROOT / "README.md").read_text())
    [command] = [line for line in readme if "pytest" in line]
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()
    assert any("examples/mnist.py" in line for line in readme)


def test_missing_packages_fail_in_ci_and_skip_elsewhere(monkeypatch):
    monkeypatch.setenv("CI", "true")
    with pytest.raises(ModuleNotFoundError):
        needs("no_such_package")
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="could not import 'no_such_package'"):
        needs("no_such_package")
    assert needs("torch") is torch


def test_a_missing_browser_fails_in_ci_unless_it_says_so(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CI", "true")
    monkeypatch.delenv("WITHOUT_BROWSER", raising=False)
    with pytest.raises(pytest.fail.Exception, match="no browser: none of chromium"):
        needs_browser()
    monkeypatch.setenv("WITHOUT_BROWSER", "true")
    with pytest.raises(pytest.skip.Exception, match="no browser"):
        needs_browser()
    monkeypatch.delenv("CI")
    monkeypatch.delenv("WITHOUT_BROWSER")
    with pytest.raises(pytest.skip.Exception, match="no browser"):
        needs_browser()


def test_every_optional_package_is_needed_by_the_same_helper():
    for path in (ROOT / "tests").rglob("*.py"):
        direct = re.search(r"pytest\.importorskip", path.read_text())
        assert path.name == "packages.py" or not direct, (
            f"{path}: `from packages import needs` instead"
        )


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_workflows_test_every_python_and_the_lower_bounds_that_are_stated():
    text = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    prefix = "Programming Language :: Python :: 3."
    stated = {
        entry.removeprefix(prefix)
        for entry in PYPROJECT["project"]["classifiers"]
        if entry.startswith(prefix)
    }
    assert set(re.findall(r'name: "Python 3\.(\d+)"', text)) == stated
    assert PYPROJECT["project"]["requires-python"] == f">=3.{min(map(int, stated))}"
    bounds = dict(
        re.findall(
            r"^([\w-]+)>=([\d.]+)", "\n".join(PYPROJECT["project"]["dependencies"]), re.MULTILINE
        )
    )
    pins = set(re.findall(r"([\w-]+)==([\d.]+)\.\*", text))
    assert pins == {
        (name, bounds["pytorch-lightning" if name == "lightning" else name]) for name, _ in pins
    }
    assert {"torch", "pytorch-lightning", "lightning"} == {name for name, _ in pins}
    assert set(bounds) == {
        re.split(r"[^\w-]", entry)[0] for entry in PYPROJECT["project"]["dependencies"]
    }


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_have_no_more_rights_than_they_need(path):
    text = path.read_text()
    rights, run_once = (
        re.search(r"^permissions:(.*\n(?: .*\n)*)", text, re.M),
        re.search(r"^concurrency:\n", text, re.M),
    )
    assert rights[1].split() in (["{}"], ["contents:", "read"])
    assert run_once
    for action in re.findall(r"uses: (\S+)", text):
        assert re.fullmatch(r"[\w./-]+@(v\d+|release/v\d+)", action), (
            f"{action}: pin the major version"
        )
    assert text.count("actions/checkout@") == text.count("persist-credentials: false")
    assert ": write" not in text or path.stem == "release"


def test_peers_of_ci_are_those_of_the_benchmarks():
    peers = (ROOT / ".ci" / "peers.txt").read_text().splitlines()
    bench = PYPROJECT["project"]["optional-dependencies"]["bench"]
    assert {entry for entry in bench if "for-pytorch" in entry} <= set(peers)
    assert not [entry for entry in peers if entry.startswith(("torch", "nvidia"))]
    assert ".ci/peers.txt" in (ROOT / ".github" / "workflows" / "tests.yml").read_text()


def test_readme_for_package_indexes_has_no_relative_links():
    long_description = runpy.run_path(str(ROOT / "setup.py"))["long_description"]
    readme = (ROOT / "README.md").read_text()
    bare, linked = (
        long_description(readme, repository) for repository in (None, "https://example.org/x")
    )
    for text in (bare, linked):
        assert all(link.startswith("https://") for link in re.findall(r"\]\(([^)]*)\)", text))
    assert "![" not in bare
    assert "](https://example.org/x/raw/main/docs/images/dashboard.png)" in linked
    assert "](https://example.org/x/blob/main/docs/quickstart.md)" in linked


def test_package_links_to_the_repository_that_builds_it():
    project_urls = runpy.run_path(str(ROOT / "setup.py"))["project_urls"]
    assert "urls" in PYPROJECT["project"]["dynamic"]
    assert project_urls({}) == {}
    urls = project_urls(
        {"GITHUB_SERVER_URL": "https://example.org", "GITHUB_REPOSITORY": "me/fork"}
    )
    assert urls["Repository"] == "https://example.org/me/fork"
    for name, url in urls.items():
        assert url.startswith("https://example.org/me/fork"), name
        _, blob, path = url.partition("/blob/main/")
        assert not blob or (ROOT / path).exists(), name


def test_readme_names_every_export():
    text = (ROOT / "README.md").read_text()
    undocumented = {"Extension", "disable", "record", "rule"}
    assert {name for name in lightning_curv.__all__ if name not in text} <= undocumented


def test_readme_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    X, y = torch.rand(8, 1, 28, 28), torch.arange(8)
    model, lossfunc = (
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10)),
        torch.nn.CrossEntropyLoss(),
    )
    scope = {
        "loader": DataLoader(TensorDataset(X, y), 4),
        "model": model,
        "lossfunc": lossfunc,
        "X": X,
        "y": y,
    }
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, scope)
    assert all(p.variance.shape == p.shape for p in model.parameters())
    assert list(tmp_path.glob("lightning_logs/*/events*"))


def test_readme_names_every_logged_series():
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"``curvature/([a-z_]+)", CurvatureCallback.__doc__):
        assert f"curvature/{name}" in text


def test_map_names_every_file():
    text = (ROOT / "docs" / "architecture.md").read_text()
    tables = "".join(line for line in text.splitlines() if line.startswith("|"))
    for path in SOURCES:
        assert (
            path.stem == "__init__" or f"`{path.stem}`" in tables or f"`{path.stem}/`" in tables
        ), path
    rooms = re.findall(r"^\| (?:`([a-z_]+)/` )?\| (`[a-z_`, ]+) \|", text, re.MULTILINE)
    assert len(rooms) > 30
    for name in re.findall(r"`([a-z_]+)`", " ".join(names for _, names in rooms)):
        assert any(name == path.stem for path in SOURCES), name
    packages = {path.parent.name for path in SOURCES} - set(ARROWS)
    assert {package for package, _ in rooms if package} == packages


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_doctests(path):
    """By explicit file list: pytest's --doctest-modules trips over the mapping of folders."""
    module = importlib.import_module(module_name(path))
    assert (
        doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).failed
        == 0
    )


def test_every_file_of_tests_runs_alone():
    """What several of them need is in `support/`, which is on the path of all."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    assert len({path.name for path in files}) == len(files)
    for path in files:
        assert not re.search(r"^\s*(?:from|import) test_", path.read_text(), re.MULTILINE), path
