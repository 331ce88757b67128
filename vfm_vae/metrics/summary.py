"""Measured numbers as a file and as a table: several runs side by side, each with what its numbers depend on."""

import json
import math
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table

_PACKAGES = {"vfm_vae": "vfm-vae", "torch": "torch", "lightning": "lightning", "timm": "timm"}
_PACKAGES |= {name: name for name in ("torchmetrics", "torch-fidelity")}


def json_numbers(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """Metrics as JSON can hold them, which knows neither nan nor inf, sorted by name."""
    numbers = {name: float(value) for name, value in sorted(metrics.items())}
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def versions() -> dict[str, str]:
    """Versions of what the numbers were computed with."""
    return {name: version(package) for name, package in _PACKAGES.items()}


def read_entries(path: Path) -> dict[str, Any]:
    """The entries of a metrics file by name; none where there is no file."""
    return json.loads(path.read_text()) if path.is_file() else {}


def write_entry(path: Path, name: str, entry: Mapping[str, Any]) -> None:
    """Puts an entry into a metrics file, at once; the others stay."""
    entries = read_entries(path) | {name: entry}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(entries, indent=2) + "\n")
    partial.replace(path)


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
    for name, value in _flat(settings):
        text = str(value)
        is_hash = len(text) == 64 and all(letter in "0123456789abcdef" for letter in text)
        table.add_row(name, f"{text[:12]}…" if is_hash else text)
    return table


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows = []
    for name, value in settings.items():
        rows += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
    return rows


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
