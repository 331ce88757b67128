"""The trainer of `python -m ldm`: Lightning's, with `sweep` beside `fit`, `validate`, `test` and `predict`."""

from lightning.pytorch import Trainer

from ldm.module import DiffusionModule
from ldm.sweep.grid import Sweep
from vfm_vae.data.datamodule import ImageNetDataModule

KEYWORDS = ("last", "best", "hpc", "registry")  # Lightning's, in the place of a file


class SweepingTrainer(Trainer):
    """Lightning's trainer, which can sweep as well."""

    def measure_grid(
        self,
        model: DiffusionModule,
        datamodule: ImageNetDataModule,
        sweep: Sweep,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Finds the best guidance scale, interval and average of a checkpoint.

        Each setting is measured by a test with the callbacks at hand. Started again, it goes on where it was stopped.

        Args:
            model: The model.
            datamodule: The data, which numbers the samples.
            sweep: The grid of settings.
            ckpt_path: Checkpoint of the model.
            weights_only: Whether checkpoints are read without unpickling objects.

        Raises:
            ValueError: if there is no checkpoint.
        """
        from ldm.sweep.sweeper import Sweeper  # with what draws, which takes a second to import

        if ckpt_path in (None, *KEYWORDS):
            raise ValueError("ckpt_path: a sweep looks at one checkpoint; give --ckpt_path FILE")
        Sweeper(self, model, datamodule, sweep, str(ckpt_path), weights_only).run()

    sweep = measure_grid  # the parser calls a group of options by a function's name, and `sweep` are the grid's
