"""How dense the source is, by room: a line that says much takes long to read.

    python benchmarks/density.py [folder ...]

Without folders: those of the package. Code lines hold a token that is neither comment nor
docstring; `tokens` are those per code line, a string being one; `names` is the mean length of the
names that functions bind, arguments aside; `comments` are the lines with a comment relative to code
lines; `long` those with more than 100 characters. No number must be reached: compare those before a
change with those after it.
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("lightning_curv", "optimizers", "callbacks")
LONG = 100  # characters
LAYOUT = {
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
    tokenize.ENCODING,
}
# From Python 3.12 on, an f-string comes in parts.
FSTRING_START, FSTRING_END = (getattr(tokenize, f"FSTRING_{end}", None) for end in ("START", "END"))
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass
class Density:
    """Counts of one file, or sums of them."""

    files: int = 0
    packages: int = 0
    code_lines: int = 0
    tokens: int = 0
    comment_lines: int = 0
    long_lines: int = 0
    names: list[str] = field(default_factory=list)

    def __add__(self, other: Density) -> Density:
        return Density(
            *(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__)
        )

    def row(self, title: str) -> str:
        """One line of the table."""
        lines = max(self.code_lines, 1)
        mean_name = sum(map(len, self.names)) / max(len(self.names), 1)
        counts = f"{title:24}{self.files:7}{self.packages:10}{self.code_lines:12}{self.tokens / lines:8.1f}"
        return f"{counts}{mean_name:7.1f}{self.comment_lines / lines:10.1%}{self.long_lines:6}"


def density(source: str, package: bool = False) -> Density:
    """The counts of one file; `package`: it is an ``__init__.py``."""
    tree = ast.parse(source)
    docstrings = set(_docstring_lines(tree))
    code_lines: set[int] = set()
    comment_lines: set[int] = set()
    tokens = 0
    open_strings = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        line = token.start[0]
        open_strings -= token.type == FSTRING_END
        inside_string = open_strings > 0
        open_strings += token.type == FSTRING_START
        if inside_string or token.type == FSTRING_END:
            code_lines.update(range(line, token.end[0] + 1))
        elif token.type == tokenize.COMMENT:
            comment_lines.add(line)
        elif token.type not in LAYOUT and line not in docstrings:
            tokens += 1
            code_lines.update(range(line, token.end[0] + 1))
    long_lines = sum(len(line) > LONG for line in source.splitlines())
    return Density(
        1,
        int(package),
        len(code_lines),
        tokens,
        len(comment_lines),
        long_lines,
        list(_local_names(tree)),
    )


def _docstring_lines(tree: ast.Module) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            docstring = node.body[0]
            yield from range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1)


def _local_names(tree: ast.Module) -> Iterator[str]:
    """The names that each outermost function binds, once per function."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            bound = {
                n.id
                for n in ast.walk(node)
                if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
            }
            yield from bound - {"_"}
        else:
            pending.extend(ast.iter_child_nodes(node))


def room(folder: Path) -> Density:
    """The counts of all files below a folder."""
    total = Density()
    for path in sorted(folder.rglob("*.py")):
        total += density(path.read_text(encoding="utf-8"), path.name == "__init__.py")
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path, default=[ROOT / name for name in ROOMS])
    print(
        f"{'':24}{'files':>7}{'packages':>10}{'code lines':>12}{'tokens':>8}{'names':>7}{'comments':>10}{'long':>6}"
    )
    total = Density()
    for folder in parser.parse_args().folders:
        counts = room(folder)
        print(counts.row(folder.name))
        total += counts
    print(total.row("total"))


if __name__ == "__main__":
    main()
