"""A page in headless Chromium: what it has drawn, what it has loaded, what went wrong."""

import re
import subprocess
import tempfile
from dataclasses import dataclass

from chromium import FLAGS
from packages import needs_browser


@dataclass
class Shown:
    """The page once its scripts have run.

    Args:
        dom: as HTML, without the scripts.
        messages: of the console.
    """

    dom: str
    messages: list[str]


def open_page(path, *flags):
    """Open a file in a new profile. Whatever it asks of the network fails."""
    with tempfile.TemporaryDirectory() as profile:
        command = [
            needs_browser(),
            *FLAGS,
            "--enable-logging=stderr",
            f"--user-data-dir={profile}",
            *flags,
        ]
        command += ["--proxy-server=127.0.0.1:9", "--dump-dom", path.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    dom = re.sub(r"<script>.*?</script>", "", done.stdout, flags=re.DOTALL)
    return Shown(dom, re.findall(r"CONSOLE.*", done.stderr))
