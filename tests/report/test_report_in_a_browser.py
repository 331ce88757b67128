"""Reports as a person sees them, in headless Chromium."""

from pathlib import Path

import pytest
from browser import chromium, needs_chromium
from run_folders import KINDS, TOKENIZER

from vfm_vae.report import changes
from vfm_vae.report.__main__ import write_report

pytestmark = needs_chromium
BROKEN = "Array.from(document.images).filter(image => !image.complete || !image.naturalWidth).length"
HIDDEN = "Array.from(document.querySelectorAll('details:not([open]) table')).map(table => table.offsetHeight)"


def test_reports_open_without_an_error_and_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(changes, "parsed", lambda program, configs: TOKENIZER)
    folders = []
    for kind, write in KINDS.items():
        write(tmp_path / kind)
        folders.append(str(tmp_path / kind))
    pages = [write_report([folder]) for folder in folders] + [write_report(folders)]
    with chromium(width=1280) as (page, seen):
        for file in pages:
            page.goto(file.as_uri())
            assert page.locator("h1").inner_text()
            assert page.locator("svg").count() > 0 and page.locator("h2").count() >= 3
            assert page.evaluate(BROKEN) == 0
            for width in (1280, 390):
                page.set_viewport_size({"width": width, "height": 900})
                assert page.evaluate("document.documentElement.scrollWidth") <= width  # tables scroll by themselves
        page.emulate_media(color_scheme="dark")
        red, green, blue = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
        assert max(red, green, blue) < 60
        page.emulate_media(media="print")
        heights = page.evaluate(HIDDEN)
        assert heights and all(heights)
    assert not seen.errors and not seen.abroad
