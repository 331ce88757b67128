"""The page: all parts put together, within what a page may take."""

import re
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from vfm_vae.report.charts import axes_of, strengths_of
from vfm_vae.report.folders import Run, Subject
from vfm_vae.report.pictures import Picture, shown_within
from vfm_vae.report.problems import problems_of, unknown_of
from vfm_vae.report.story import between, made_by, sentences, stories_of
from vfm_vae.report.study import as_html, pictures_in
from vfm_vae.report.tables import key_cells, settings_of, tables_of, versions_of

LARGEST = 10_000_000  # bytes of a page
ROOM = 200_000  # of it that are left free
# How many values a line has at most, and whether whole configs are shown, until a page is small enough.
LEVELS = ((240, True), (120, True), (60, False), (20, False))
FOR_PICTURES = 2_000_000  # bytes that pictures have in any case


def page_of(subjects: Sequence[Subject]) -> str:
    """The page on some folders.

    Raises:
        ValueError: if even without pictures it would be too large to be mailed.
    """
    for points, with_configs in LEVELS:
        parts = _parts(subjects, points, with_configs)
        bare = len(_render(parts).encode())
        if bare <= LARGEST - ROOM - FOR_PICTURES:
            break
    if bare > LARGEST - ROOM:
        raise ValueError(
            f"folders: the page would have {bare / 1e6:.1f} MB, and {LARGEST / 1e6:g} are the most; give fewer folders"
        )
    pictures, problems = shown_within(_pictures(subjects), LARGEST - ROOM - bare)
    parts["pictures"] = pictures
    parts["problems"] = parts["problems"] + problems
    return _render(parts)


def _render(parts: dict[str, Any]) -> str:
    return _template().render(parts)


@cache
def _template() -> Template:
    loader = PackageLoader("vfm_vae.report", ".")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html")


def _parts(subjects: Sequence[Subject], points: int, with_configs: bool) -> dict[str, Any]:
    several = len(subjects) > 1
    problems = [f"{subject.name}: {line}" if several else line for subject in subjects for line in problems_of(subject)]
    return {
        "title": " and ".join(subject.name for subject in subjects) if several else subjects[0].name,
        "several": several,
        "sentences": sentences(subjects),
        "keys": [] if several else key_cells(subjects[0]),
        "studies": [(subject.name, _study(subject)) for subject in subjects if subject.study is not None],
        "stories": stories_of(subjects, with_configs),
        "differences": between(subjects) if several else [],
        "axes": axes_of(subjects, points),
        "strengths": strengths_of(subjects),
        "pictures": [],
        "tables": tables_of(subjects),
        "settings": settings_of(subjects),
        "versions": versions_of(subjects),
        "problems": problems,
        "unknown": [
            f"{subject.name}: {line}" if several else line for subject in subjects for line in unknown_of(subject)
        ],
        "made_by": made_by(),
        "made_at": f"{datetime.now().astimezone():%Y-%m-%d %H:%M %z}",
    }


def _study(subject: Subject) -> Markup:
    assert subject.study is not None  # the caller has seen to it
    return as_html(subject.study.read_text(errors="replace"))


def _pictures(subjects: Sequence[Subject]) -> list[Picture]:
    """All pictures, the most telling ones first."""
    found = []
    for subject in subjects:
        prefix = f"{subject.name}: " if len(subjects) > 1 else ""
        if subject.study is not None:
            for title, name in pictures_in(subject.study.read_text(errors="replace")):
                file = subject.folder / name
                if file.is_file() and file.resolve().is_relative_to(subject.folder.resolve()):
                    found.append(Picture(file, title, subject.name))
            continue  # which has the pictures of its runs
        for line in subject.lines:
            for run in line:
                found += [Picture(file, text, f"{prefix}{run.name}") for file, text in _of_run(run)]
        if (file := subject.folder / "text_samples.png").is_file():
            found.append(Picture(file, "Samples beside their prompts", subject.name))
    return found


def _of_run(run: Run) -> list[tuple[Path, str]]:
    folder = run.folder / "images"
    found = []
    columns = "input, reconstruction, then the decoder's smaller images"
    if (folder / "val.png").is_file():
        found.append((folder / "val.png", f"Reconstructions by the weights that were validated: {columns}"))
    elif (folder / "train.png").is_file():
        found.append((folder / "train.png", f"Reconstructions by the weights in training: {columns}"))
    for file in sorted(folder.glob("samples_guidance_*.png"), key=_scale):
        scale = _scale(file)
        guided = "without guidance" if scale == 1 else f"with guidance {scale:g}"
        found.append((file, f"Samples {guided}, from the same noise, a row for each class or prompt"))
    if not any("cknna/block" in tag for tag in run.curves.values):
        found += [(file, "CKNNA of blocks by images seen") for file in sorted(folder.glob("*_blocks*.png"))]
    if (run.folder / "sweep/sweep.png").is_file():
        found.append((run.folder / "sweep/sweep.png", "Sweep of guidance"))
    return found


def _scale(file: Path) -> float:
    match = re.search(r"_([\d.]+)\.png$", file.name)
    try:
        return float(match[1]) if match else 0.0
    except ValueError:
        return 0.0
