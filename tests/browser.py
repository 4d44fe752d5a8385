"""A page in a real browser: Chromium, without a network."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SWITCHES = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync --no-first-run"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Start Chromium; without it these tests are skipped, unless MULTIBN_BROWSER is set, which requires it."""
    chromium = shutil.which("chromium")
    if not os.environ.get("MULTIBN_BROWSER"):
        pytest.importorskip("playwright", reason="the page's tests need Playwright: pip install playwright")
        if chromium is None:
            pytest.skip("the page's tests need Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    assert chromium is not None, "MULTIBN_BROWSER is set, and there is no chromium. Install it: apt-get install chromium"
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=SWITCHES.split())
        yield running
        running.close()


class Opened:
    """A page in a browser, with its errors and its network requests."""

    def __init__(self, browser: Any, path: Path, width: int = 1280, scheme: str = "light") -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())

    def __enter__(self) -> Any:
        return self.page

    def __exit__(self, *_: object) -> None:
        self.page.close()

    @property
    def elsewhere(self) -> list[str]:
        """Requests for anything outside the file itself."""
        return [url for url in self.asked if not url.startswith(("file:", "data:"))]

    def visible(self, selector: str) -> list[str]:
        """Return the texts of the visible elements."""
        found = self.page.locator(selector)
        return [found.nth(i).inner_text() for i in range(found.count()) if found.nth(i).is_visible()]


CONTRASTS = """() => {
    const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
    const light = (rgb) => rgb.slice(0, 3).map((each) => each / 255)
        .map((each) => each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4)
        .reduce((sum, each, i) => sum + each * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = (element) => {
        for (let each = element; each; each = each.parentElement) {
            const color = parse(getComputedStyle(each).backgroundColor);
            if (color.length === 3 || color[3] === 1) return color;
        }
        throw new Error("nothing opaque is behind " + element.outerHTML);
    };
    const found = {};
    for (const element of document.querySelectorAll("body *")) {
        const own = [...element.childNodes].some((each) => each.nodeType === 3 && each.data.trim());
        const never = "script, style, noscript, desc, title, option, defs *";
        if (!own || element.matches(never) || !element.checkVisibility()) continue;
        const style = getComputedStyle(element);
        const [a, b] = [light(parse(element.matches("svg *") ? style.fill : style.color)), light(behind(element))];
        const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        const name = element.tagName + "." + (element.className.baseVal ?? element.className);
        found[name] = Math.min(found[name] ?? 99, contrast);
    }
    return found;
}"""


def outside(page: Any, inside: str) -> list[str]:
    """Return elements that extend beyond the window on the right, except those inside the given ones."""
    found: list[str] = page.evaluate(
        """(inside) => [...document.querySelectorAll("body *")].filter((each) => {
            const box = each.getBoundingClientRect();
            return box.right > innerWidth + 1 && box.width > 1 && !each.closest(inside);
        }).map((each) => each.outerHTML.slice(0, 120))""",
        inside,
    )
    return found


def is_dark(page: Any) -> bool:
    """Return whether the page has a dark background."""
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(int, re.findall(r"\d+", back))) < 3 * 128
