"""What pyproject.toml cannot say: the repository's address, and the README without relative links.

The address is that of the repository whose release workflow builds the package, so that a fork's
package leads to the fork. A build elsewhere has none: then links to files of the repository, and
pictures, are left out of the README.
"""

import os
import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def project_urls(environment: dict[str, str]) -> dict[str, str]:
    """The links beside the README, from what the release workflow says of its repository.

    There are none elsewhere.
    """
    if "GITHUB_REPOSITORY" not in environment:
        return {}
    repository = (
        f"{environment.get('GITHUB_SERVER_URL', 'https://github.com')}/"
        f"{environment['GITHUB_REPOSITORY']}"
    )
    return {
        "Repository": repository,
        "Documentation": f"{repository}/blob/main/docs/quickstart.md",
        "Changelog": f"{repository}/blob/main/CHANGELOG.md",
        "Issues": f"{repository}/issues",
        "Security": f"{repository}/security/policy",
    }


def long_description(readme: str, repository: str | None) -> str:
    """The README without relative links: to files in the repository, or just their text."""
    relative = r"\]\((?!https?://|#)([^)]+)\)"
    if repository is None:
        return re.sub(
            rf"\[([^\]]*){relative}", r"\1", re.sub(rf"!\[[^\]]*{relative}\n*", "", readme)
        )
    readme = re.sub(rf"(!\[[^\]]*){relative}", rf"\1]({repository}/raw/main/\2)", readme)
    return re.sub(relative, rf"]({repository}/blob/main/\1)", readme)


if __name__ == "__main__":
    urls = project_urls(dict(os.environ))
    setup(
        long_description=long_description(
            (ROOT / "README.md").read_text(encoding="utf-8"), urls.get("Repository")
        ),
        long_description_content_type="text/markdown",
        project_urls=urls,
    )
