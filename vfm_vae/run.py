"""What a run is called, and where it puts things."""

from collections.abc import Mapping
from typing import Any, final

from lightning.pytorch.loggers import TensorBoardLogger

from vfm_vae.description import class_at
from vfm_vae.trial import Output


@final
class Run:
    """What a run is called, and where it puts things.

    Args:
        name: Name of the run. Its checkpoints, its config and what TensorBoard shows go to `<folder>/<name>`; without a
            name, or with a logger of your own in `trainer.logger`, that logger decides.
        folder: Folder of all runs.
        entry: Name under which its numbers stand in `metrics.json`; by default the run's.
        output: Folder that `predict` writes to.
    """

    def __init__(
        self, name: str | None = None, folder: str = "runs", entry: str | None = None, output: str | None = None
    ) -> None:
        self.name, self.folder = name, folder
        self.entry, self.output = entry or name, output

    def logger(self) -> TensorBoardLogger | None:
        """Where the run is logged; None where it has no name."""
        return None if self.name is None else TensorBoardLogger(self.folder, self.name, version="")

    def tell(self, callback: Mapping[str, Any]) -> None:
        """Fills in what a callback that leaves files was not told itself.

        Args:
            callback: Its `class_path` and `init_args`; changed in place.
        """
        options = callback.get("init_args") or {}
        for option, value in (("name", self.entry), ("directory", self.output)):
            if option in options and options[option] is None and issubclass(class_at(callback["class_path"]), Output):
                options[option] = value
