"""The numbers of a run, as a file and as a table."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from rich.console import Console

from callbacks.evaluation import EvaluationCallback
from vfm_vae.contracts import HasEvaluationSettings
from vfm_vae.data.prompts import SamplePrompts
from vfm_vae.data.transforms import CentreCrop, ResizeAndCrop
from vfm_vae.lightning_private import undeclared
from vfm_vae.metrics.summary import (
    check_entries,
    json_numbers,
    read_entries,
    settings_table,
    summary_table,
    versions,
    write_entry,
)
from vfm_vae.trial import Output


class Report(Output):
    """Writes the logged metrics to a JSON file after every validation and test, and prints them as a table at the end.

    The file maps names to entries, `{"strong": {"epoch": …, "step": …, "images_seen": …, "metrics": {…}, "versions":
    {…}, "settings": {…}}, …}`: several runs may share it, each replaces its own entry only, and the table shows all of
    them side by side. The settings are all that the last validation's or test's numbers depend on: the module's, how
    images were cropped, and those of each callback that measures, with the count of images that it measured. Rank zero
    writes; the file is replaced at once.

    Args:
        path: The metrics file; null for `<log_dir>/metrics.json`.
        name: Name of this run's entry, unless `--run.entry` gives it; the default is the run's name, or `run`.

    Raises:
        ValueError: when a run starts, if something else lies at `path`, or nothing can be written there.
    """

    def __init__(self, path: str | None = None, name: str | None = None) -> None:
        self.path = Path(path) if path else None
        self.name = name or "run"
        self._path = Path()
        self._model: dict[str, Any] = {}
        self._settings: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Asks for the file to write to, on all ranks."""
        directory = Path(trainer.log_dir or trainer.default_root_dir)
        self._path = self.path or directory / "metrics.json"
        check_entries(self._path, "path")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the module's settings while it has its averaged weights; on all ranks, as weights may be sharded."""
        if isinstance(pl_module, HasEvaluationSettings) and not trainer.sanity_checking:
            self._model = {"model": dict(pl_module.evaluation_settings())}

    on_test_epoch_end = on_validation_epoch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes; prints if this is all that was asked for."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        self._settings = self._model | evaluation_settings(trainer)
        write_entry(self._path, self.name, self._entry(trainer, pl_module))
        if trainer.state.fn != "fit":
            Console().print(settings_table(self._settings))
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
        Console().print(summary_table(read_entries(self._path), title=str(self._path)))


def evaluation_settings(trainer: Trainer) -> dict[str, Any]:
    """What numbers depend on besides the module: the checkpoint, the data, and each callback that measures."""
    settings: dict[str, Any] = {}
    if trainer.state.fn != "fit":  # there it is what training went on from
        settings["checkpoint"] = str(trainer.ckpt_path) if trainer.ckpt_path else None
    data = undeclared(trainer).datamodule
    crop = getattr(data, "evaluation_transform", None)
    if isinstance(crop, CentreCrop | ResizeAndCrop) and data.source != "latents":
        name = "adm" if isinstance(crop, CentreCrop) else "resize"
        settings["data"] = {"image_size": crop.image_size, "evaluation_crop": name}
    if trainer.testing and isinstance(samples := getattr(data, "samples", None), SamplePrompts):
        settings["data"] = settings.get("data", {}) | samples.settings()
    for callback in undeclared(trainer).callbacks:
        if isinstance(callback, EvaluationCallback):
            name = type(callback).__name__
            while name in settings:
                name += "'"
            settings[name] = callback.settings()
    return json.loads(json.dumps(settings))
