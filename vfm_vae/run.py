"""The name of a run and the folders that it writes to."""

from collections.abc import Mapping
from typing import Any, final

from lightning.pytorch.loggers import TensorBoardLogger

from vfm_vae.description import class_at
from vfm_vae.trial import Output


@final
class Run:
    """The name of a run and the folders that it writes to.

    Args:
        name: Name of the run. Checkpoints, config and TensorBoard logs go to `<folder>/<name>`. Without a name,
            `trainer.logger` decides.
        folder: Folder of all runs.
        entry: Name of the run's entry in `metrics.json`; the default is the run's name.
        output: Folder that `predict` writes to.
    """

    def __init__(
        self, name: str | None = None, folder: str = "runs", entry: str | None = None, output: str | None = None
    ) -> None:
        self.name, self.folder = name, folder
        self.entry, self.output = entry or name, output

    def logger(self) -> TensorBoardLogger | None:
        """The run's logger; None if it has no name."""
        return None if self.name is None else TensorBoardLogger(self.folder, self.name, version="")

    def tell(self, callback: Mapping[str, Any]) -> None:
        """Gives a callback that writes files the run's name and folder, unless it has its own.

        Args:
            callback: Its `class_path` and `init_args`; changed in place.
        """
        options = callback.get("init_args") or {}
        for option, value in (("name", self.entry), ("directory", self.output)):
            if option in options and options[option] is None and issubclass(class_at(callback["class_path"]), Output):
                options[option] = value
