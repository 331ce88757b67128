"""Tables of all numbers in files of metrics, with what they mean, side by side."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vfm_vae.metrics.summary import flattened
from vfm_vae.report.folders import Entry, Subject
from vfm_vae.report.known import GROUPS, Known, group, known

COUNTS = ("epoch", "step", "images_seen")
UNKNOWN = Known("", "")


class Cell(NamedTuple):
    """A number of an entry.

    Attributes:
        text: The number, rounded.
        value: The number as JSON has it; empty where the entry has none of that name.
        subject: Name of the folder that the entry is from.
        file: The entry's file.
        entry: The entry's name.
        metric: The number's name.
        is_best: Whether it is the best of its row.
    """

    text: str
    value: str
    subject: str
    file: str
    entry: str
    metric: str
    is_best: bool = False


class Row(NamedTuple):
    """A number by name, over all entries."""

    name: str
    known: Known
    cells: list[Cell]


class Table(NamedTuple):
    """Numbers of one kind; `heads` are the columns."""

    title: str
    heads: list[str]
    rows: list[Row]


class Setting(NamedTuple):
    """What numbers of entries depend on: exact values, as JSON."""

    name: str
    values: list[str]


def rounded(value: float | None) -> str:
    """A number to read, with four digits at least."""
    if value is None:
        return "not finite"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def columns(subjects: Sequence[Subject]) -> list[tuple[Subject, Entry, str]]:
    """All entries, each with the head of its column."""
    found = []
    for subject in subjects:
        names = [entry.name for entry in subject.entries]
        for entry in subject.entries:
            place = entry.file.rpartition("/")[0]
            name = f"{place}/{entry.name}" if names.count(entry.name) > 1 and place else entry.name
            found.append((subject, entry, f"{subject.name} · {name}" if len(subjects) > 1 else name))
    return found


def tables_of(subjects: Sequence[Subject]) -> list[Table]:
    """All numbers, by kind, the most telling ones first."""
    entries = columns(subjects)
    names = dict.fromkeys(name for _, entry, _ in entries for name in entry.metrics)
    tables = []
    for title in ("How far", *GROUPS, "Others"):
        if title == "How far":
            wanted = [name for name in COUNTS if any(entry.content.get(name) is not None for _, entry, _ in entries)]
        else:
            wanted = sorted(name for name in names if group(name) == title)
        of_kind = [each for each in entries if any(_value(each[1], name, title) is not _NONE for name in wanted)]
        if of_kind:
            rows = [_row(of_kind, name, title, len(subjects) > 1) for name in wanted]
            tables.append(Table(title, [head for _, _, head in of_kind], rows))
    return tables


class _Missing:
    pass


_NONE = _Missing()


def _value(entry: Entry, name: str, title: str) -> Any:
    """An entry's number; the counts lie beside the metrics, one of which may have the same name."""
    source: Mapping[str, Any] = entry.content if title == "How far" else entry.metrics
    value = source.get(name, _NONE)
    return _NONE if title == "How far" and not isinstance(value, int | float) else value


def _row(entries: Sequence[tuple[Subject, Entry, str]], name: str, title: str, compares: bool) -> Row:
    about = known(name) or UNKNOWN
    values = [_value(entry, name, title) for _, entry, _ in entries]
    numbers = [value for value in values if isinstance(value, int | float)]
    best = None
    if compares and about.better is not None and len(set(numbers)) > 1:
        best = max(numbers) if about.better == "up" else min(numbers)
    cells = []
    for (subject, entry, _), value in zip(entries, values, strict=True):
        text, exact = ("", "") if value is _NONE else (rounded(value), json.dumps(value))
        cells.append(Cell(text, exact, subject.name, entry.file, entry.name, name, best is not None and value == best))
    return Row(name, about, cells)


def settings_of(subjects: Sequence[Subject]) -> tuple[list[str], list[Setting]]:
    """What the numbers depend on: the heads of the entries that say so, and each setting's value in each of them."""
    entries = [each for each in columns(subjects) if isinstance(each[1].content.get("settings"), dict)]
    flat = [flattened(entry.content["settings"]) for _, entry, _ in entries]
    names = dict.fromkeys(name for each in flat for name in each)
    rows = [Setting(name, [json.dumps(each[name]) if name in each else "" for each in flat]) for name in names]
    return [head for _, _, head in entries], rows


def versions_of(subjects: Sequence[Subject]) -> tuple[list[str], list[Setting]]:
    """What computed the numbers, likewise."""
    entries = [each for each in columns(subjects) if isinstance(each[1].content.get("versions"), dict)]
    flat = [each[1].content["versions"] for each in entries]
    names = dict.fromkeys(name for each in flat for name in each)
    rows = [Setting(str(name), [str(each.get(name, "")) for each in flat]) for name in names]
    return [head for _, _, head in entries], rows


# What stands at the top of a page, the first ones first.
KEYS: tuple[str, ...] = (
    "gfid",
    "fd_",
    "inception_score",
    "class_accuracy",
    "clip_score",
    "rfid",
    "psnr",
    "ssim",
    "lpips",
)
KEYS += ("cknna/latent", "probe/latent", "se_cknna/latent/mean")
MOST_KEYS = 8


def key_cells(subject: Subject) -> list[tuple[Known, Cell]]:
    """The most telling numbers of a folder, each from the last entry that has it."""
    last: dict[str, Entry] = {}
    for entry in subject.entries:
        for name in entry.metrics:
            short = name.partition("/")[2]
            if name.startswith(("val/", "test/")) and short.startswith(KEYS):
                last.pop(short, None)
                last[short] = entry
    order = sorted(last, key=lambda short: next(place for place, key in enumerate(KEYS) if short.startswith(key)))
    found = []
    for short in order:
        entry = last[short]
        name = next(f"{part}/{short}" for part in ("test", "val") if f"{part}/{short}" in entry.metrics)
        if (about := known(name)) is not None and not short.startswith("psnr_"):
            value = entry.metrics[name]
            cell = Cell(rounded(value), json.dumps(value), subject.name, entry.file, entry.name, name)
            found.append((about, cell))
    return found[:MOST_KEYS]
