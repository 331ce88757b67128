"""Where along training numbers and pictures are shown: at the images seen, each once, though a run was resumed."""

from collections.abc import Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from vfm_vae.lightning_private import (
    add_event,
    describe_epochs,
    log_at,
    log_no_placeholder,
    logged_steps,
    restore_logged_steps,
    undeclared,
)

IMAGES_SEEN = "images_seen"
EPOCH = "epoch"  # which former versions logged with all numbers
NUM_LOOKED_AT = 1000  # events of a file


class Timeline(Callback):
    """Makes a run's displays show the right positions and epochs. The command lines add it to every run.

    Numbers and pictures are shown at the images that a module has seen, over all ranks and stages, or at steps where
    it doesn't count images. Training that goes on from an older position, or begins again in the same folder, hides
    what TensorBoard shows from there on (the files keep it), so that each position is shown once. An evaluation's
    numbers are shown where its checkpoint is, not at 0. What a former version logged by steps is hidden where
    training goes on. A progress bar counts epochs without a total where training has no last one.
    """

    def __init__(self) -> None:
        self._hidden = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Sets up loggers and progress bars."""
        self._hidden = False
        log_by_images(trainer)
        for bar in undeclared(trainer).callbacks:
            if isinstance(bar, RichProgressBar) and trainer.max_epochs == -1:
                describe_epochs(bar, partial(without_total, bar))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
        """Restores the step of the checkpoint that is evaluated; training restores it by itself."""
        if trainer.state.fn != "fit":
            restore_logged_steps(trainer, checkpoint)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Before the first batch, hides what is to come: it is known by now where training goes on."""
        if self._hidden or not trainer.is_global_zero:
            return
        self._hidden = True
        # What has seen as many images as the checkpoint stays; a run that begins has left nothing there.
        goes_on = bool(trainer.ckpt_path or trainer.global_step) and counts_images(trainer)
        for logger in tensorboards(trainer):
            hide_from(logger, logged_position(trainer) + goes_on)


def log_by_images(trainer: Trainer) -> None:
    """Makes a trainer log at the images that its module has seen, if it counts them, and no placeholder of a metric.

    A module that counts images calls it in `setup`, so that it holds without the command line, too.
    """
    if counts_images(trainer):
        log_at(trainer, partial(logged_position, trainer))
    for logger in tensorboards(trainer):
        log_no_placeholder(logger)


def counts_images(trainer: Trainer) -> bool:
    """Whether a trainer's module counts the images that it was trained on."""
    return hasattr(trainer.lightning_module, IMAGES_SEEN)


def logged_position(trainer: Trainer, ended: bool = False) -> int:
    """Where the numbers of the batch at hand, and of its validation, are logged.

    Args:
        trainer: The trainer.
        ended: Whether training has, so that the counter of steps is one further.

    Returns:
        Images that the module has seen; steps, counted from 0, where it doesn't count images.
    """
    if counts_images(trainer):
        return int(getattr(trainer.lightning_module, IMAGES_SEEN))
    return max(0, logged_steps(trainer) - ended)


def tensorboards(trainer: Trainer) -> list[TensorBoardLogger]:
    """The loggers of a trainer that write for TensorBoard."""
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def hide_from(logger: TensorBoardLogger, position: int) -> None:
    """Makes TensorBoard hide what was logged at a position and later ones; all that a former version has logged."""
    former = sorted(Path(logger.log_dir).glob("events.out.tfevents.*"))[:-1]  # the last one has Lightning begun by now
    if not former:
        return
    if is_by_steps(former[-1]):
        rank_zero_warn(
            f"{logger.log_dir}: a former version logged here by steps; TensorBoard hides that, as from now on it shows "
            "images seen; the files keep it"
        )
        position = 0
    add_event(logger, Event(step=position, session_log=SessionLog(status=SessionLog.START)))


def is_by_steps(file: Path) -> bool:
    """Whether a former version wrote a file of TensorBoard's, which logged by steps."""
    events = islice(EventFileLoader(str(file)).Load(), NUM_LOOKED_AT)
    return any(value.tag == EPOCH for event in events for value in event.summary.value)


def without_total(bar: RichProgressBar, epoch: int) -> str:
    """How a progress bar describes an epoch of training that has no last one."""
    return f"{f'Epoch {epoch}':{len(bar.validation_description)}}"
