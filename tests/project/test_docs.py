"""The pages of docs/ say what the code does: their examples run, their links lead somewhere, they name everything."""

import doctest
import importlib
import pydoc
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import lightning_curv
from lightning_curv.callbacks.monitoring.quantities import QUANTITIES
from lightning_curv.losses import LOSSES
from lightning_curv.rules import RULES

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
ROOT_PAGES = sorted(ROOT.glob("*.md"))


def page_id(path):
    return str(path.relative_to(ROOT))


def examples(path):
    """The doctests of a page, without the fences around them."""
    text = re.sub(r"^ *```.*$", "", path.read_text(), flags=re.MULTILINE)
    return doctest.DocTestParser().get_doctest(
        text, {"__name__": "__main__"}, path.name, str(path), 0
    )


def run(test):
    failures = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert runner.run(test, clear_globs=False, out=failures.append).failed == 0, "".join(failures)
    return test.globs


@pytest.fixture
def registries():
    """Rules and losses that a page adds are removed again."""
    before = [(table, dict(table)) for table in (RULES, LOSSES)]
    yield
    for table, saved in before:
        table.clear()
        table.update(saved)


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize("path", [page for page in PAGES if ">>>" in page.read_text()], ids=page_id)
def test_code_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(examples(path))


def test_diffs_are_of_the_files_that_they_name():
    diffs = re.findall(r"```diff\n(.*?)```", (DOCS / "architecture.md").read_text(), re.DOTALL)
    assert len(diffs) == 6
    for path, lines in re.findall(r"\+\+\+ b/(\S+)\n((?:\+(?!\+).*\n)+)", "".join(diffs)):
        source = iter((ROOT / path).read_text().splitlines())
        for line in lines.splitlines():
            assert line[1:] in source, f"{path} has no line {line[1:]!r} after the ones before"


def test_concepts_have_code():
    assert len(examples(DOCS / "concepts.md").examples) > 25


def test_quickstart_runs_block_after_block(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "quickstart.md").read_text(), re.DOTALL)
    assert len(blocks[1].strip().replace("\n\n", "\n").splitlines()) == 5
    scope = {}
    for block in blocks:
        exec(block, scope)
    assert scope["trainer"].callback_metrics["curvature/noise_scale"] > 0
    assert scope["privacy"].accountant.epsilon(1e-4) <= 3
    assert (
        "0.weight torch.Size([64, 20]) torch.Size([64, 20]) torch.Size([50])"
        in capsys.readouterr().out
    )
    assert list(tmp_path.glob("lightning_logs/version_0/events*"))


def test_code_beside_the_rest_of_lightning_runs():
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "lightning.md").read_text(), re.DOTALL)
    scope = {name: getattr(lightning_curv, name) for name in lightning_curv.__all__}
    x, y = torch.randn(8, 20), torch.randint(3, (8,))
    for block in blocks:
        exec(block, scope | {"torch": torch, "F": torch.nn.functional, "x": x, "y": y})


@pytest.mark.parametrize("path", PAGES + ROOT_PAGES, ids=page_id)
def test_links_lead_to_files(path):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) + re.findall(r'src="([^"]+)"', text):
        assert link.startswith("https://") or (path.parent / link).exists(), link


def tables(path):
    """The tables of a page, each a list of rows of cells."""
    for table in re.findall(r"(?:^\|.*\|\n)+", path.read_text(), flags=re.MULTILINE):
        yield [
            [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
            for row in table.splitlines()
        ]


def test_our_lines_of_the_migration_tables_run():
    path = DOCS / "migration.md"
    scope, ran = run(examples(path)), 0
    for header, _, *rows in tables(path):
        if header[1] != "lightning_curv":
            continue
        for _, ours in rows:
            for line in re.findall(r"`([^`]*)`", ours):
                if line.startswith("tensorboard "):
                    continue
                if "loss.backward()" in line:
                    scope["model"], scope["lossfunc"] = map(
                        lightning_curv.extend, (scope["model"], scope["lossfunc"])
                    )
                    scope["loss"] = scope["lossfunc"](scope["model"](scope["X"]), scope["y"])
                exec(line, scope)
                ran += 1
    assert ran > 25
    assert scope["monitor"].quantities == ["norm_test", "hessian_trace"]


def test_migration_names_what_cockpit_has():
    [rows] = [
        rows
        for header, _, *rows in tables(DOCS / "migration.md")
        if header[0] == "Cockpit's quantity"
    ]
    ours = {cell: name for row in rows for cell, name in pairwise(row)}
    cockpit = "GradNorm NormTest InnerTest OrthoTest MeanGSNR CABS EarlyStopping HessTrace HessMaxEV TICTrace TICDiag"
    for name in [*cockpit.split(), "Alpha", "UpdateSize", "Distance"]:
        assert ours[name].strip("`") in QUANTITIES


def test_reference_names_everything_public():
    directives = re.findall(
        r"^::: ([\w.]+)", "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md")), re.M
    )
    assert len(directives) == len(set(directives))
    documented = {name.rpartition(".")[2] for name in directives}
    for name in directives:
        assert pydoc.locate(name) is not None, name
    rooms = ("", ".optimizers", ".callbacks")
    public = {
        name for room in rooms for name in importlib.import_module(f"lightning_curv{room}").__all__
    }
    constants = {"RULES", "LOSSES", "PARTS"}
    assert public - documented <= constants


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2].partition("\n\n")[0]
    pages = {page_id(path).removeprefix("docs/") for path in PAGES}
    listed = set(re.findall(r"[\w/]+\.md", navigation))
    of_the_root = {path.name.lower() for path in ROOT_PAGES} - {"readme.md"} | {"index.md"}
    assert listed == pages | of_the_root, "nav: of mkdocs.yml"


def test_pictures_are_shown_and_small():
    shown = "\n".join(page.read_text() for page in PAGES + ROOT_PAGES)
    for picture in (DOCS / "images").rglob("*.png"):
        assert picture.name in shown, f"no page shows {picture.relative_to(ROOT)}"
        assert picture.stat().st_size < 300_000 or picture.name == "optimizers.png"
