"""Every sentence of docs/guarantees.md names a test, and every test that it names exists."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROWS = [
    line
    for line in (TESTS.parent / "docs" / "guarantees.md").read_text().splitlines()
    if line.startswith("|") and not set(line) <= set("|-") and not re.match(r"\| (promised|refused) \|", line)
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[2:50])
def test_the_tests_of_a_guarantee_exist(row):
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row.split("|")[-2])
    assert named
    for file, name in named:
        tree = ast.parse((TESTS / file).read_text())
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
        assert len(functions) == 1, f"{file} has no test {name}"
        assert not any(
            "skip" in ast.unparse(mark) or "xfail" in ast.unparse(mark) for mark in functions[0].decorator_list
        )
