"""Reports as a person sees them, in headless Chromium."""

from pathlib import Path

import pytest
from browser import chromium, needs_chromium
from run_folders import KINDS, TOKENIZER

from vfm_vae.report import changes
from vfm_vae.report.__main__ import write_report

pytestmark = needs_chromium


@pytest.mark.parametrize("width", [1280, 390])
def test_reports_open_without_an_error_and_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
):
    monkeypatch.setattr(changes, "parsed", lambda program, configs: TOKENIZER)
    folders = []
    for kind, write in KINDS.items():
        write(tmp_path / kind)
        folders.append(str(tmp_path / kind))
    pages = [write_report([folder]) for folder in folders] + [write_report(folders)]
    with chromium(width) as (page, seen):
        for file in pages:
            page.goto(file.as_uri())
            assert page.locator("h1").inner_text()
            assert page.locator("svg").count() > 0 and page.locator("h2").count() >= 3
            broken = "Array.from(document.images).filter(image => !image.complete || !image.naturalWidth).length"
            assert page.evaluate(broken) == 0
            assert page.evaluate("document.documentElement.scrollWidth") <= width  # tables scroll by themselves
            assert page.evaluate("getComputedStyle(document.body).fontFamily").startswith("system-ui")
        page.emulate_media(color_scheme="dark")
        red, green, blue = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
        assert max(red, green, blue) < 60
        page.emulate_media(media="print")
        hidden = page.locator("details:not([open]) table")
        assert hidden.count() and all(table.bounding_box()["height"] > 0 for table in hidden.all())
    assert not seen.errors and not seen.abroad
