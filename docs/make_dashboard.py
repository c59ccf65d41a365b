"""Make docs/images/dashboard.png: TensorBoard on the run of examples/noise_scale.py, photographed by Chromium.

    python docs/make_dashboard.py [--chromium chromium]

Chromium is controlled by its DevTools protocol, so that nothing but the browser is needed beyond
the package's own dependencies.
"""

import argparse
import asyncio
import base64
import io
import json
import socket
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
from PIL import Image

ROOT = Path(__file__).parents[1]
SCALARS = (
    "train/loss",
    "curvature/noise_scale",
    "curvature/suggested_batch_size",
    "curvature/ggn_trace",
)
SCALARS += ("curvature/sample_norm_median",)
CARDS = [{"plugin": "scalars", "tag": tag} for tag in SCALARS]
CARDS += [
    {
        "plugin": "histograms",
        "tag": "curvature/sample_norms",
        "runId": "defaultExperimentId/noise_scale/version_0",
    }
]
SETTINGS = {
    "timeSeriesSettingsPaneOpened": False,
    "stepSelectorEnabled": False,
    "sideBarWidthInPercent": 0,
    "scalarSmoothing": 0.6,
    "timeSeriesCardMinWidth": 420,
    "ignoreOutliers": False,
    "theme": "light",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(command: list[str], url: str) -> Any:
    """Run a server until the block ends, which starts once the server answers."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(url, timeout=5)
                break
            except OSError:
                asyncio.run(asyncio.sleep(0.5))
        else:
            raise TimeoutError(f"{command[0]} does not answer at {url}")
        yield
    finally:
        process.terminate()
        process.wait()


async def photograph(port: int, address: str) -> bytes:
    """The page with our settings, once it has drawn its curves."""
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://localhost:{port}/json") as pages:
            page = next(page for page in await pages.json() if page["type"] == "page")
        async with session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as socket:

            async def call(method: str, **params: Any) -> dict:
                await socket.send_json({"id": 1, "method": method, "params": params})
                while (answer := await socket.receive_json()).get("id") != 1:
                    pass
                return answer["result"]

            await call("Page.navigate", url=address)
            await asyncio.sleep(5)
            for key in ("_tb_global_settings", "_tb_global_settings.timeseries"):
                script = f"localStorage.setItem({key!r}, {json.dumps(json.dumps(SETTINGS))})"
                await call("Runtime.evaluate", expression=script)
            await call("Page.navigate", url="about:blank")
            size = {"width": 1440, "height": 830, "deviceScaleFactor": 1, "mobile": False}
            await call("Emulation.setDeviceMetricsOverride", **size)
            pinned = urllib.parse.quote(json.dumps(CARDS))
            await call("Page.navigate", url=f"{address}/?pinnedCards={pinned}#timeseries")
            await asyncio.sleep(15)
            return base64.b64decode((await call("Page.captureScreenshot", format="png"))["data"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chromium", default="chromium")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        example = [sys.executable, str(ROOT / "examples" / "noise_scale.py"), "--log-dir", folder]
        subprocess.run([*example, "--out", f"{folder}/noise_scale.png"], check=True)
        port, debugging = free_port(), free_port()
        board = [sys.executable, "-m", "tensorboard.main", "--logdir", folder, "--port", str(port)]
        browser = [
            *(
                options.chromium,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
            ),
            *("--enable-unsafe-swiftshader", f"--user-data-dir={folder}/profile"),
            *(f"--remote-debugging-port={debugging}", "--remote-allow-origins=*", "about:blank"),
        ]
        address = f"http://localhost:{port}"
        with (
            serving(board, f"{address}/data/runs"),
            serving(browser, f"http://localhost:{debugging}/json/version"),
        ):
            picture = asyncio.run(photograph(debugging, address))
    image = Image.open(io.BytesIO(picture)).convert("RGB").quantize(128)
    image.save(Path(__file__).with_name("images") / "dashboard.png", optimize=True)


if __name__ == "__main__":
    main()
