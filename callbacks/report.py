"""The numbers of a run, as a file and as a table."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console

from callbacks.evaluation import EvaluationCallback
from vfm_vae.metrics.summary import json_numbers, read_entries, settings_table, summary_table, versions, write_entry
from vfm_vae.types import HasEvaluationSettings


class Report(Callback):
    """Writes the logged metrics to a JSON file after every validation and test, and prints them as a table at the end.

    The file maps names to entries, `{"strong": {"epoch": …, "step": …, "images_seen": …, "metrics": {…}, "versions":
    {…}}, …}`: several runs may share it, each replaces its own entry only, and the table shows all of them side by
    side. What `validate` and `test` measure also has `settings`, all that the numbers depend on: the module's, and
    those of each callback that measures, with its count of images. Rank zero does it alone; the file is replaced at
    once.

    Args:
        path: the file; null for `<log_dir>/metrics.json`.
        name: this run's entry.
    """

    def __init__(self, path: str | None = None, name: str = "run") -> None:
        self.path = Path(path) if path else None
        self.name = name
        self._path = Path()
        self._settings: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Learns where to write, on all ranks."""
        directory = Path(trainer.log_dir or trainer.default_root_dir)
        self._path = self.path or directory / "metrics.json"

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes what the numbers depend on, while averaged weights still stand in for the others."""
        if trainer.state.fn != "fit" and trainer.is_global_zero:
            self._settings = evaluation_settings(trainer, pl_module)

    on_test_epoch_end = on_validation_epoch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes; prints if this is all that was asked for."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        write_entry(self._path, self.name, self._entry(trainer, pl_module))
        if trainer.state.fn != "fit":
            self._print()

    on_test_end = on_validation_end

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes what training logged last, and prints; a finished stage that was started again logged nothing."""
        if trainer.is_global_zero:
            if trainer.callback_metrics:
                write_entry(self._path, self.name, self._entry(trainer, pl_module))
            self._print()

    def _entry(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        return {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "images_seen": getattr(pl_module, "images_seen", None),
            "metrics": json_numbers(trainer.callback_metrics),
            "versions": versions(),
        } | ({"settings": self._settings} if self._settings else {})

    def _print(self) -> None:
        console = Console()
        if self._settings:
            console.print(settings_table(self._settings))
        console.print(summary_table(read_entries(self._path), title=str(self._path)))


def evaluation_settings(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """All that measured numbers depend on: what the module says, and each callback that measures, by its name."""
    settings: dict[str, Any] = {"checkpoint": str(trainer.ckpt_path) if trainer.ckpt_path else None}
    if isinstance(pl_module, HasEvaluationSettings):
        settings["model"] = pl_module.evaluation_settings()
    for callback in trainer.callbacks:
        if isinstance(callback, EvaluationCallback):
            name = type(callback).__name__
            while name in settings:
                name += "'"
            settings[name] = callback.settings()
    return json.loads(json.dumps(settings))
