"""Pages as a person sees them: in headless Chromium, without a network."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]
# On tests that open a page; `make test-all` runs them, where there is a Chromium.
needs_chromium = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
]


@dataclass
class Seen:
    """What a page did that it should not have.

    Attributes:
        errors: Lines of its console that are errors, exceptions, and answers of 400 and above.
        abroad: Addresses off this machine that it asked for; none of them was reached.
    """

    errors: list[str] = field(default_factory=list)
    abroad: list[str] = field(default_factory=list)


@contextlib.contextmanager
def chromium(width: int = 1280, height: int = 900) -> Iterator[tuple]:
    """A page of a new browser, and what it did that it should not have: `(playwright.sync_api.Page, Seen)`."""
    from playwright.sync_api import sync_playwright

    seen = Seen()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": width, "height": height})

        def answer(route) -> None:
            address = urlsplit(route.request.url)
            if address.scheme in ("http", "https", "ws", "wss") and address.hostname not in ("127.0.0.1", "localhost"):
                seen.abroad.append(route.request.url)
                route.abort()
            else:
                route.continue_()

        page.route("**/*", answer)
        page.on("console", lambda line: seen.errors.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: seen.errors.append(str(error)))
        page.on("response", lambda got: seen.errors.append(f"{got.status} {got.url}") if got.status >= 400 else None)
        try:
            yield page, seen
        finally:
            browser.close()
