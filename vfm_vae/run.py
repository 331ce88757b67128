"""The name of a run and the folders that it writes to."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn

from vfm_vae.description import class_at
from vfm_vae.trial import Output

FOLDER = "runs"


@final
class Run:
    """The name of a run and the folders that it writes to.

    Args:
        name: Name of the run. Checkpoints, config and TensorBoard logs go to `<folder>/<name>`. Without a name,
            or where a config has a logger of its own, `trainer.logger` decides.
        folder: Folder of all runs.
        entry: Name of the run's entry in `metrics.json`; the default is the run's name. Wins over `Report`'s own name.
        output: Folder that `predict` writes to. Wins over the writers' own `directory`.
    """

    def __init__(
        self, name: str | None = None, folder: str = FOLDER, entry: str | None = None, output: str | None = None
    ) -> None:
        self.name, self.folder = name, folder
        self.entry, self.output = entry, output

    def logger(self) -> TensorBoardLogger | None:
        """The run's logger; None if it has no name."""
        if self.name is None:
            return None
        return TensorBoardLogger(self.folder, self.name, version="", default_hp_metric=False)

    def check_folder(self, log_dir: Path) -> None:
        """Checks that a logger of the config's own does not lead into another run, which this one would overwrite.

        Args:
            log_dir: Folder of a logger that writes its own.

        Raises:
            ValueError: if this run's name or folder says otherwise, and the config there is not this run's.
        """
        asked = Path(self.folder, self.name or log_dir.name)
        if (self.name is None and self.folder == FOLDER) or asked.absolute() == log_dir.absolute():
            return
        saved = log_dir / "config.yaml"
        if not saved.is_file():
            rank_zero_warn(f"run.name, run.folder: not {asked}; trainer.logger decides where this run goes, {log_dir}")
            return
        there = (yaml.safe_load(saved.read_text()) or {}).get("run") or {}
        if (there.get("name"), there.get("folder", FOLDER)) != (self.name, self.folder):
            raise ValueError(
                f"run.name, run.folder: {asked} was asked for, but trainer.logger decides where this run goes, and in "
                f"{str(log_dir)!r} is another one, which would be overwritten; give --trainer.logger=null, or options "
                "of that logger"
            )

    def tell(self, callback: Mapping[str, Any]) -> None:
        """Gives a callback that writes files the run's entry and folder.

        They also win over the names that the callback has itself, such as those of a saved config, so that no other
        entry is overwritten. The run's own name only stands in where neither says anything.

        Args:
            callback: Its `class_path` and `init_args`; changed in place.
        """
        options = callback.get("init_args") or {}
        for option, source, given in (("name", "entry", self.entry), ("directory", "output", self.output)):
            if option not in options or not issubclass(class_at(callback["class_path"]), Output):
                continue
            own = options[option]
            if None not in (given, own) and given != own:
                writer = callback["class_path"].rpartition(".")[2]
                rank_zero_warn(f"run.{source}: {given} takes the place of {writer}'s {option}, {own}")
            options[option] = given or own or (self.name if option == "name" else None)
