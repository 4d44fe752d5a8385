"""Makes docs/report.png of a report: ``python docs/screenshot.py report.html``. Needs Playwright and Chromium."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright


def main(report: Path, picture: Path = Path(__file__).parent / "report.png") -> None:
    """The top of the page and the first charts, light."""
    with sync_playwright() as playwright:
        switches = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync", "--no-first-run"]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=switches)
        page = browser.new_page(viewport={"width": 1120, "height": 900}, color_scheme="light")
        page.goto(report.resolve().as_uri())
        bottom = page.locator("#accuracy .chart").nth(1).bounding_box()
        assert bottom is not None, f"{report} has no charts. Make it: multibn conform --html {report}"
        page.screenshot(
            path=picture, full_page=True, clip={"x": 0, "y": 0, "width": 1120, "height": bottom["y"] + bottom["height"] + 10}
        )
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
