"""Every promise and refusal in the pages of docs/ names a test, and every such test exists."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def rows_of(page):
    """The rows of the tables that promise or refuse something, or say what goes together."""
    lines, rows, inside = (TESTS.parent / "docs" / page).read_text().splitlines(), [], False
    for line in lines:
        if re.match(r"\| (promised|refused|integration) \|", line):
            inside = True
        elif not line.startswith("|"):
            inside = False
        elif inside and not set(line) <= set("|-"):
            rows.append(line)
    return rows


ROWS = {page: rows_of(page) for page in ("guarantees.md", "privacy.md", "lightning.md")}


def test_all_pages_have_tables():
    assert all(len(rows) > 10 for rows in ROWS.values())


@pytest.mark.parametrize(
    "row", [row for rows in ROWS.values() for row in rows], ids=lambda row: row[2:50]
)
def test_the_tests_of_a_guarantee_exist(row):
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row.split("|")[-2])
    assert named
    for file, name in named:
        [path] = TESTS.rglob(file)
        tree = ast.parse(path.read_text())
        functions = [
            node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name
        ]
        assert len(functions) == 1, f"{file} has no test {name}"
        assert not any(
            re.search(r"mark\.(skip|xfail)", ast.unparse(mark))
            for mark in functions[0].decorator_list
        )
