"""How Chromium is started, for pictures of pages and for their tests: it shows one page and asks nobody."""

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=20000",  # until the charts are drawn
)
