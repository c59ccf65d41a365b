"""The README for package indexes, which know no relative links; everything else is in pyproject.toml.

With a line `Repository = "https://..."` in `[project.urls]` links and pictures lead there; without, they are left out.
"""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def long_description(readme: str, repository: str | None) -> str:
    """The README without relative links: to files in the repository, or just their text."""
    relative = r"\]\((?!https?://|#)([^)]+)\)"
    if repository is None:
        return re.sub(rf"\[([^\]]*){relative}", r"\1", re.sub(rf"!\[[^\]]*{relative}\n*", "", readme))
    readme = re.sub(rf"(!\[[^\]]*){relative}", rf"\1]({repository}/raw/main/\2)", readme)
    return re.sub(relative, rf"]({repository}/blob/main/\1)", readme)


if __name__ == "__main__":
    found = re.search(r'^Repository = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    setup(
        long_description=long_description((ROOT / "README.md").read_text(encoding="utf-8"), found and found[1]),
        long_description_content_type="text/markdown",
    )
