"""The name of a run and the folders that it writes to."""

from collections.abc import Mapping
from typing import Any, final

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn

from vfm_vae.description import class_at
from vfm_vae.trial import Output


@final
class Run:
    """The name of a run and the folders that it writes to.

    Args:
        name: Name of the run. Checkpoints, config and TensorBoard logs go to `<folder>/<name>`. Without a name,
            `trainer.logger` decides.
        folder: Folder of all runs.
        entry: Name of the run's entry in `metrics.json`; the default is the run's name. Wins over `Report`'s own name.
        output: Folder that `predict` writes to. Wins over the writers' own `directory`.
    """

    def __init__(
        self, name: str | None = None, folder: str = "runs", entry: str | None = None, output: str | None = None
    ) -> None:
        self.name, self.folder = name, folder
        self.entry, self.output = entry, output

    def logger(self) -> TensorBoardLogger | None:
        """The run's logger; None if it has no name."""
        return None if self.name is None else TensorBoardLogger(self.folder, self.name, version="")

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
