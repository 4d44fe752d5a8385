"""Makes docs/article.png of a page: ``python docs/article_screenshot.py article.html``. Needs Playwright and Chromium."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright


def main(article: Path, picture: Path = Path(__file__).parent / "article.png") -> None:
    """The first claim: what was said, what shows, and the pictures, light."""
    with sync_playwright() as playwright:
        switches = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync", "--no-first-run"]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=switches)
        page = browser.new_page(viewport={"width": 900, "height": 900}, color_scheme="light")
        page.goto(article.resolve().as_uri())
        top, bottom = page.locator("#rates h2").bounding_box(), page.locator("#rates .charts").bounding_box()
        assert top is not None, f"{article} has no claims. Make it: multibn article --out {article}"
        assert bottom is not None, f"{article} has no pictures. Make it: multibn article --out {article}"
        first, last = top["y"] - 16, bottom["y"] + bottom["height"] + 16
        page.screenshot(path=picture, full_page=True, clip={"x": 0, "y": first, "width": 900, "height": last - first})
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
