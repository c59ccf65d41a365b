"""Make the pictures of docs/examples.md: every example at full size, its picture with 128 colours.

python docs/make_gallery.py [NAME ...]
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Run the examples with these names, or all."""
    names = sys.argv[1:] or sorted(
        path.stem
        for path in (ROOT / "examples").glob("*.py")
        if path.stem not in ("shared", "report")  # a page: see make_report.py
    )
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            picture = Path(folder) / "out.png"
            script = ROOT / "examples" / f"{name}.py"
            subprocess.run(
                [sys.executable, str(script), "--out", str(picture)], check=True, cwd=folder
            )
            image = Image.open(picture).convert("RGB").quantize(128)
            image.save(ROOT / "docs" / "images" / "examples" / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
