"""Shows each step and epoch once, even if a run was stopped and resumed."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from vfm_vae.lightning_private import (
    add_event,
    describe_epochs,
    logged_steps,
    restore_logged_steps,
    undeclared,
)


class Timeline(Callback):
    """Makes a run's displays show the right steps and epochs. The command lines add it to every run.

    Training that goes on from an older step, or begins again in the same folder, hides what TensorBoard shows of the
    steps from there on (the files keep it), so that each is shown once. An evaluation's numbers are shown at the step
    of its checkpoint, not at 0. A progress bar counts epochs without a total where training has no last one.
    """

    def __init__(self) -> None:
        self._hidden = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Sets up progress bars."""
        self._hidden = False
        for bar in undeclared(trainer).callbacks:
            if isinstance(bar, RichProgressBar) and trainer.max_epochs == -1:
                describe_epochs(bar, partial(without_total, bar))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
        """Restores the step of the checkpoint that is evaluated; training restores it by itself."""
        if trainer.state.fn != "fit":
            restore_logged_steps(trainer, checkpoint)

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Before the first batch, hides what is to come: here Lightning knows the step that it will log next."""
        if self._hidden or not trainer.is_global_zero:
            return
        self._hidden = True
        for logger in tensorboards(trainer):
            hide_from(logger, logged_step(trainer))


def tensorboards(trainer: Trainer) -> list[TensorBoardLogger]:
    """The loggers of a trainer that write for TensorBoard."""
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def hide_from(logger: TensorBoardLogger, step: int) -> None:
    """Makes TensorBoard hide what was logged for a step and later ones."""
    files = list(Path(logger.log_dir).glob("events.out.tfevents.*"))
    if len(files) > 1:  # earlier ones, beside the one that Lightning has begun by now
        add_event(logger, Event(step=step, session_log=SessionLog(status=SessionLog.START)))


def logged_step(trainer: Trainer, ended: bool = False) -> int:
    """The step, counted from 0, at which Lightning logs the numbers of the batch at hand, and of its validation.

    Args:
        trainer: The trainer.
        ended: Whether training has, so that the counter is one further.
    """
    return max(0, logged_steps(trainer) - ended)


def without_total(bar: RichProgressBar, epoch: int) -> str:
    """How a progress bar describes an epoch of training that has no last one."""
    return f"{f'Epoch {epoch}':{len(bar.validation_description)}}"
