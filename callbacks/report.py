"""The numbers of a run, as a file and as a table."""

import json
import math
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table

_PACKAGES = {"vfm_vae": "vfm-vae", "torch": "torch", "lightning": "lightning"}


class Report(Callback):
    """Writes the logged metrics to a JSON file after every validation and test, and prints them as a table at the end.

    The file maps names to entries, `{"strong": {"epoch": …, "step": …, "images_seen": …, "metrics": {…}, "versions":
    {…}}, …}`: several runs may share it, each replaces its own entry only, and the table shows all of them side by
    side. Rank zero does it alone; the file is replaced at once.

    Args:
        path: the file; null for `<log_dir>/metrics.json`.
        name: this run's entry.
    """

    def __init__(self, path: str | None = None, name: str = "run") -> None:
        self.path = Path(path) if path else None
        self.name = name
        self._path = Path()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Learns where to write, on all ranks."""
        directory = Path(trainer.log_dir or trainer.default_root_dir)
        self._path = self.path or directory / "metrics.json"

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes; prints if this is all that was asked for."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        self._write(self._entry(trainer, pl_module))
        if trainer.state.fn != "fit":
            self._print()

    on_test_end = on_validation_end

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes what training logged last, and prints; a finished stage that was started again logged nothing."""
        if trainer.is_global_zero:
            if trainer.callback_metrics:
                self._write(self._entry(trainer, pl_module))
            self._print()

    def _entry(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
        return {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "images_seen": getattr(pl_module, "images_seen", None),
            # JSON knows neither nan nor inf.
            "metrics": {name: value if math.isfinite(value) else None for name, value in metrics.items()},
            "versions": {name: version(package) for name, package in _PACKAGES.items()},
        }

    def _read(self) -> dict[str, Any]:
        return json.loads(self._path.read_text()) if self._path.is_file() else {}

    def _write(self, entry: dict[str, Any]) -> None:
        entries = self._read() | {self.name: entry}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        partial.write_text(json.dumps(entries, indent=2) + "\n")
        partial.replace(self._path)

    def _print(self) -> None:
        Console().print(summary_table(self._read(), title=str(self._path)))


def summary_table(entries: dict[str, Any], title: str | None = None) -> Table:
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


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
