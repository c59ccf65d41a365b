"""What MkDocs does beyond its configuration: pages from files outside of docs/, mathematics without scripts.

MkDocs calls the functions by their names.
"""

import atexit
import re
import shutil
import tempfile
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CODE_OF_CONDUCT.md": "code_of_conduct.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}


@event_priority(100)  # before mkdocstrings reads its configuration
def on_config(config: Any) -> None:
    """Let mkdocstrings read a copy of the package: its three folders in one, as installed, examples as code."""
    copy = Path(tempfile.mkdtemp(prefix="lightning_curv_docs_"))
    atexit.register(shutil.rmtree, copy)
    for folder in ("lightning_curv", "optimizers", "callbacks"):
        inside = copy / "lightning_curv" / (folder if folder != "lightning_curv" else "")
        shutil.copytree(
            ROOT / folder, inside, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True
        )
    for path in copy.rglob("*.py"):
        path.write_text(_with_examples(path.read_text()))
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(copy)]


def _with_examples(source: str) -> str:
    """Examples under the title that mkdocstrings knows."""
    return re.sub(r"^( +)Example:$", r"\1Examples:", source, flags=re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """README, CONTRIBUTING, CHANGELOG and what else `PAGES` names are pages too."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=_moved((ROOT / source).read_text())))
    return files


def _moved(text: str) -> str:
    """Links of a page in the root, as seen from docs/."""
    text = text.replace("](docs/", "](").replace('src="docs/', 'src="')
    text = re.sub(
        r"\]\((?!https?:|#)(examples/|benchmarks/|LICENSE|CITATION|[A-Z_]+\.md)", r"](../\1", text
    )
    return re.sub(r"\]\(\.\./([A-Z_]+\.md)", lambda m: f"]({PAGES[m[1]]}", text)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Sources of the examples appear on their page; other files outside of docs/ are named, not linked."""
    if page.file.src_uri == "examples.md":
        markdown = re.sub(r"^\[examples/.*\)$", _sources, markdown, flags=re.MULTILINE)
    markdown = re.sub(r"\]\(\.\./examples/(\w+)\.py\)", r"](examples.md#\1)", markdown)
    return re.sub(r"\[([^\]]*)\]\((?:\.\./)+(?!api/|\w+\.md)[^)]*\)", r"\1", markdown)


def _sources(line: re.Match[str]) -> str:
    return "\n".join(_source(name) for name in re.findall(r"\[(examples/[^\]]*)\]", line[0]))


def _source(name: str) -> str:
    language = {".py": "python", ".yaml": "yaml"}[Path(name).suffix]
    code = "".join(f"    {line}\n" for line in (ROOT / name).read_text().splitlines())
    return f'??? example "{name}"\n\n    ```{language}\n{code}    ```\n'


def on_page_content(html: str, **_: Any) -> str:
    """LaTeX to MathML, which browsers draw by themselves."""
    inline, block = (
        r'<span class="arithmatex">\\\((.*?)\\\)</span>',
        r'<div class="arithmatex">\\\[(.*?)\\\]</div>',
    )
    html = re.sub(inline, lambda m: convert(unescape(m[1])), html, flags=re.DOTALL)
    return re.sub(block, lambda m: convert(unescape(m[1]), display="block"), html, flags=re.DOTALL)
