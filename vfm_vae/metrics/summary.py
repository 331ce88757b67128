"""Metrics as a file and as a table, with several runs side by side."""

import json
import math
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.table import Table

from vfm_vae.writing import write_json

_PACKAGES = {"vfm_vae": "vfm-vae", "torch": "torch", "lightning": "lightning", "timm": "timm"}
_PACKAGES |= {name: name for name in ("torchmetrics", "torch-fidelity", "diffusers", "transformers")}


def json_numbers(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """Metrics as JSON can hold them, which knows neither nan nor inf, sorted by name."""
    numbers = {name: float(value) for name, value in sorted(metrics.items())}
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def json_content(text: str) -> Any:
    """What a JSON file of another program's holds, with None for numbers that are not finite, or that no float holds.

    Raises:
        ValueError: if it is no JSON.
    """
    return json.loads(text, parse_constant=lambda name: None, parse_float=_number, parse_int=_number)


def _number(text: str) -> float | None:
    if not math.isfinite(float(text)):
        return None
    return float(text) if set(text) & set(".eE") else int(text)


def versions() -> dict[str, str]:
    """Versions of what the numbers were computed with; `unknown` of a package that is imported without its metadata."""
    return {name: _version(package) for name, package in _PACKAGES.items()}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a copy on PYTHONPATH that was not installed
        return "unknown"


def read_entries(path: Path) -> dict[str, Any]:
    """The entries of a metrics file by name; none where there is nothing. Numbers that are not finite are None.

    Raises:
        ValueError: something else is there.
    """
    if not path.exists():
        return {}
    try:
        entries = json_content(path.read_text())
    except (OSError, ValueError) as error:  # a folder; no JSON, or no text
        raise ValueError(f"{str(path)!r} is no file of metrics ({error}); give another path") from error
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ValueError(f"{str(path)!r} is no file of metrics, which maps names to entries; give another path")
    return entries


def check_entries(path: Path, option: str) -> None:
    """Checks whether `write_entry` will find a place, before anything is measured.

    Args:
        path: The metrics file.
        option: The option that sets it.

    Raises:
        ValueError: something else is there, or nothing can be written.
    """
    try:
        read_entries(path)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"{option}: no file can be made in {str(folder)!r}; give another path")


def write_entry(path: Path, name: str, entry: Mapping[str, Any]) -> None:
    """Puts an entry into a metrics file, at once; the others stay. Raises as `read_entries`."""
    entries = read_entries(path) | {name: entry}
    write_json(path, entries)


def summary_table(entries: Mapping[str, Any], title: str | None = None) -> Table:
    """Entries of a metrics file side by side: a row for each metric of validation or test, a column for each entry."""
    table = Table(title=title)
    table.add_column("metric")
    for name in entries:
        table.add_column(name, justify="right")
    for setting in ("epoch", "step", "images_seen"):
        table.add_row(setting, *(_cell(entry.get(setting)) for entry in entries.values()))
    table.add_section()
    names = dict.fromkeys(name for entry in entries.values() for name in entry["metrics"])
    for name in sorted(name for name in names if name.startswith(("val/", "test/"))):
        table.add_row(name, *(_cell(entry["metrics"].get(name)) for entry in entries.values()))
    return table


def settings_table(settings: Mapping[str, Any]) -> Table:
    """What the numbers depend on, one setting a row; hashes are cut short."""
    table = Table("setting", "value", title="measured with")
    for name, value in flattened(settings).items():
        text = str(value)
        is_hash = len(text) == 64 and all(letter in "0123456789abcdef" for letter in text)
        table.add_row(name, f"{text[:12]}…" if is_hash else text)
    return table


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their paths, such as `CKNNACallback.k`."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        path = f"{prefix}{name}"
        flat |= flattened(value, f"{path}.") if isinstance(value, Mapping) and value else {path: value}
    return flat


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
