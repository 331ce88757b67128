"""The checkpoint that a run goes on from."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from vfm_vae.lightning_private import note_saved, save_last, undeclared
from vfm_vae.options import at_least
from vfm_vae.saving import check_places, write_whole


class LastCheckpoint(ModelCheckpoint):
    """Keeps `last.ckpt`: written every so many steps of the optimiser, and when training ends.

    Lightning's own writes at a training's end only what it has never written before, and once more in the middle of an
    accumulated step when a run goes on from a checkpoint. A file takes its place only when it is whole, on the disk and
    read back, see `vfm_vae.saving`; so do the checkpoints of other callbacks in the same run.

    Args:
        every_n_steps: Number of steps between checkpoints.

    Raises:
        ValueError: if the number is below 1.
        NotWritten: before the first step, if no checkpoint can be written; later, if one could not.
    """

    def __init__(self, every_n_steps: int = 1000) -> None:
        at_least(1, every_n_steps=every_n_steps)
        super().__init__(save_last=True, save_top_k=0, every_n_train_steps=every_n_steps, enable_version_counter=False)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes the trainer write whole files."""
        super().setup(trainer, pl_module, stage)
        write_whole(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that checkpoints can be written."""
        check_places(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A step that a run begins or goes on after is in no need of being written."""
        super().on_train_start(trainer, pl_module)
        note_saved(self, trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes what training ends with."""
        if undeclared(trainer).fast_dev_run:
            return
        save_last(self, trainer)
