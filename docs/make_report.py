"""Make docs/images/report.png: the page that examples/report.py writes, photographed by Chromium.

python docs/make_report.py [--chromium chromium]
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from chromium import FLAGS
from PIL import Image

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chromium", default="chromium")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        page, photo = Path(folder) / "report.html", Path(folder) / "report.png"
        example = [sys.executable, str(ROOT / "examples" / "report.py"), "--out", str(page)]
        subprocess.run(example, check=True, cwd=folder)
        browser = [options.chromium, *FLAGS, f"--user-data-dir={folder}/profile"]
        shown = [
            "--hide-scrollbars",
            "--window-size=1200,1240",
            f"--screenshot={photo}",
            page.as_uri(),
        ]
        subprocess.run([*browser, *shown], check=True, stderr=subprocess.DEVNULL)
        image = Image.open(photo).convert("RGB").quantize(128)
        image.save(Path(__file__).with_name("images") / "report.png", optimize=True)


if __name__ == "__main__":
    main()
