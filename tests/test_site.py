"""The site that `make docs` builds: without a warning, without a dead link, and as a person sees it."""

import functools
import http.server
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from browser import chromium, needs_chromium
from pages import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; what goes wrong in building ends here."""
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert not built.returncode and not re.search("WARNING|ERROR", built.stderr), built.stderr
    return folder


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Where the site is served."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


class Parts(HTMLParser):
    """Addresses that a page names, and names of its own places."""

    def __init__(self, text: str):
        super().__init__()
        self.loaded: set[str] = set()
        self.links: set[str] = set()
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.places |= {value for name in ("id", "name") if (value := given.get(name))}
        if tag == "a" and given.get("href"):
            self.links.add(str(given["href"]))
        elif tag in ("img", "script", "source", "iframe") and given.get("src"):
            self.loaded.add(str(given["src"]))
        elif tag == "link" and given.get("rel") in ("stylesheet", "preconnect", "preload", "icon"):
            self.loaded.add(str(given["href"]))


@pytest.fixture(scope="module")
def parts(site: Path) -> dict[str, Parts]:
    """All pages by their addresses within the site."""
    return {
        f"/{path.parent.relative_to(site)}/".replace("/./", "/"): Parts(path.read_text())
        for path in site.rglob("index.html")
    }


def test_every_link_within_the_site_leads_to_a_place(site: Path, parts: dict[str, Parts]):
    wrong = []
    for page, found in parts.items():
        for target in found.links | found.loaded:
            url = urlsplit(urljoin(f"http://here{page}", target))
            if url.netloc != "here" or url.scheme != "http":
                continue
            there = site / unquote(url.path).strip("/")
            file = there / "index.html" if url.path.endswith("/") else there
            places = parts[url.path].places if url.path in parts else ()
            if not file.is_file() or (url.fragment and places and unquote(url.fragment) not in places):
                wrong.append(f"{page}: {target}")
    assert len(parts) > 150 and not wrong, "\n".join(wrong)


def test_nothing_is_loaded_from_elsewhere(parts: dict[str, Parts]):
    assert not [f"{page}: {src}" for page, found in parts.items() for src in found.loaded if "//" in src]


def test_formulas_are_mathml(site: Path):
    text = (site / "formulas/index.html").read_text()
    shown = re.sub(r"<(script|style|annotation)\b.*?</\1>|<[^>]+>", "", text, flags=re.DOTALL)
    assert text.count("<math ") > 100
    assert not re.findall(r"\\[a-zA-Z]+|\$\$", shown)


def test_formulas_lead_to_the_api(parts: dict[str, Parts]):
    assert "../api/vfm_vae.losses.alignment/#vfm_vae.losses.alignment.vf_loss" in parts["/formulas/"].links


PAGES = ["", "start/", "recipe/", "formulas/", "study/", "evaluation/", "api/", "api/ldm.guidance/", "changelog/"]


class TestInABrowser:
    pytestmark = needs_chromium

    @pytest.mark.parametrize("width", [1280, 390])
    def test_pages_show_without_errors_and_scroll_only_downwards(self, address: str, width: int):
        with chromium(width) as (page, seen):
            for name in PAGES:
                page.goto(address + name)
                page.wait_for_load_state()
                assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, name
            assert not seen.errors and not seen.abroad

    def test_search_finds_a_function(self, address: str):
        with chromium() as (page, seen):
            page.goto(address)
            page.fill("input[name=query]", "adaptive_weight")
            page.wait_for_selector(".md-search-result__link", timeout=30_000)
            found = page.inner_text(".md-search-result__list")
            assert "vfm_vae.losses.alignment" in found and "torch.autograd" not in found  # no source code
            assert not seen.errors and not seen.abroad

    def test_dark_and_light(self, address: str):
        colours = []
        for scheme in ("light", "dark"):
            with chromium() as (page, seen):  # a new reader, whose choice no page has kept
                page.emulate_media(color_scheme=scheme)
                page.goto(address)
                page.wait_for_timeout(500)
                colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
                assert not seen.errors
        assert colours[0] != colours[1]
