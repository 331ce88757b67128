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
EVENTS = "events.out.tfevents."  # what names of TensorBoard's files begin with
FILES = f"{EVENTS}*"
BY_STEPS = "by_steps"
EPOCH = "epoch"  # which former versions logged with all numbers
NUM_LOOKED_AT = 1000  # events of a file


class Timeline(Callback):
    """Makes a run's displays show the right positions and epochs. The command lines add it to every run.

    Numbers and pictures are shown at the images that a module has seen, over all ranks and stages, or at steps where
    it doesn't count images. Training that goes on from an older position, or begins again in the same folder, hides
    what TensorBoard shows from there on (the files keep it), so that each position is shown once. An evaluation's
    numbers are shown where its checkpoint is, not at 0. What a former version logged by steps moves to a folder of its
    own where training goes on. A progress bar counts epochs without a total where training has no last one.
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
            if counts_images(trainer):
                set_aside(Path(logger.log_dir))
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
    """Makes TensorBoard hide what was logged at a position and later ones."""
    if len(list(Path(logger.log_dir).glob(FILES))) > 1:  # earlier ones, beside the one that Lightning has begun by now
        add_event(logger, Event(step=position, session_log=SessionLog(status=SessionLog.START)))


def set_aside(folder: Path) -> None:
    """Moves files in which a former version logged by steps into `by_steps/`, a run of its own in TensorBoard."""
    former = [file for file in folder.glob(FILES) if is_by_steps(file)]
    if not former:
        return
    rank_zero_warn(
        f"{folder}: a former version logged here by steps, but from now on numbers are shown at the images seen; "
        f"{len(former)} files for TensorBoard move to {BY_STEPS}/, which it shows as a run of its own"
    )
    for file in former:
        (folder / BY_STEPS).mkdir(exist_ok=True)
        file.rename(folder / BY_STEPS / file.name)


def is_by_steps(file: Path) -> bool:
    """Whether a former version wrote a file of TensorBoard's, which logged by steps."""
    events = islice(EventFileLoader(str(file)).Load(), NUM_LOOKED_AT)
    return any(value.tag == EPOCH for event in events for value in event.summary.value)


def without_total(bar: RichProgressBar, epoch: int) -> str:
    """How a progress bar describes an epoch of training that has no last one."""
    return f"{f'Epoch {epoch}':{len(bar.validation_description)}}"
