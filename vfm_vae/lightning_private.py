"""The one place that uses private parts of Lightning, and attributes that it sets without declaring them.

`setup.cfg` states the versions of Lightning that have these.
"""

from collections.abc import Callable, Mapping
from typing import Any

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loops.progress import _BatchProgress
from lightning.pytorch.trainer.states import TrainerFn
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary

BatchProgress = _BatchProgress  # how many batches a loop has begun and ended


class HookedCLI(LightningCLI):
    """LightningCLI with a hook for the options of one subcommand; what a checkpoint says stays out of the config."""

    def add_subcommand_arguments(self, parser: LightningArgumentParser, subcommand: str) -> None:
        """Adds options to a subcommand, or changes their defaults, when those of the trainer's method are there."""

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, passed_over: bool = False, **kwargs: Any
    ) -> LightningArgumentParser:
        """A subcommand's options; none for one that is not asked for, since to collect them takes long."""
        if passed_over:
            self._subcommand_method_arguments[subcommand] = []
            return self.init_parser(**kwargs)
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        self.add_subcommand_arguments(parser, subcommand)
        return parser

    def _parse_ckpt_path(self) -> None:
        """Leaves the config alone; Lightning would put a former checkpoint's hyper-parameters over it."""


def checkpoint_path(trainer: Trainer, subcommand: str, ckpt_path: str | None) -> str | None:
    """The file that Lightning takes for an option `ckpt_path`, which may be `last` or `best`; None where is none."""
    connector = trainer._checkpoint_connector
    path = connector._parse_ckpt_path(TrainerFn(subcommand), ckpt_path, model_provided=True, model_connected=False)
    return None if path is None else str(path)


def cluster_environment(trainer: Trainer) -> ClusterEnvironment | None:
    """What started the processes; also where one device needs no strategy that would know it."""
    return trainer._accelerator_connector.cluster_environment


def has_trainer(module: LightningModule) -> bool:
    """Whether a module belongs to a trainer; `module.trainer` would raise."""
    return module._trainer is not None


def logs_now(trainer: Trainer) -> bool:
    """Whether the trainer logs the numbers of the training batch at hand: the last of a step, where one is due."""
    loop = trainer.fit_loop
    return not loop._should_accumulate() and trainer._logger_connector.should_update_logs


def log_numbers(trainer: Trainer, numbers: Mapping[str, float]) -> None:
    """Logs numbers at the present step, as Lightning's monitors do; `log_dict` would copy them to the device."""
    connector: Any = trainer._logger_connector  # it takes numbers as well as the tensors that it declares
    connector.log_metrics(dict(numbers))


def log_at(trainer: Trainer, position: Callable[[], int]) -> None:
    """Makes all numbers be logged at a position, which is asked for each time, in place of Lightning's count of steps.

    Where Lightning logs at a position that it was given, it adds no `epoch`.
    """
    connector: Any = trainer._logger_connector
    log = type(connector).log_metrics

    def log_there(metrics: dict[str, Any], step: int | None = None) -> None:
        log(connector, metrics, position() if step is None else step)

    connector.log_metrics = log_there


def log_no_placeholder(logger: TensorBoardLogger) -> None:
    """Keeps a logger from logging `hp_metric`, which is -1, beside hyper-parameters."""
    logger._default_hp_metric = False


def forget_logged(trainer: Trainer) -> None:
    """Forgets the numbers of the last step, which would be logged with each batch of the next, too.

    Where a module steps by itself, Lightning logs with every batch of a step that is due.
    """
    if trainer.fit_loop._results is not None:
        trainer.fit_loop._results.clear()


def logged_steps(trainer: Trainer) -> int:
    """Steps of training before the batch at hand, as Lightning counts them for loggers."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def restore_logged_steps(trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Restores that count from a checkpoint, which Lightning does only for training."""
    loop = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.state_dict", {})
    trainer.fit_loop.epoch_loop._batches_that_stepped = loop.get("_batches_that_stepped", 0)


def validation_is_due(trainer: Trainer) -> bool:
    """Whether a validation follows the training batch that has just ended."""
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def keep_sigterm(trainer: Trainer) -> None:
    """Lets ranks ask each other for a SIGTERM once more, but not before each batch."""
    loop: Any = trainer.fit_loop.epoch_loop
    loop._broadcast_sigterm_tensor()
    loop._broadcast_sigterm_tensor = lambda: None


def give_sigterm_back(trainer: Trainer) -> None:
    """Lets ranks ask each other before each batch again."""
    trainer.fit_loop.epoch_loop.__dict__.pop("_broadcast_sigterm_tensor", None)


def save_last(checkpoint: ModelCheckpoint, trainer: Trainer) -> None:
    """Writes a callback's last checkpoint now."""
    checkpoint._save_last_checkpoint(trainer, checkpoint._monitor_candidates(trainer))


def note_saved(checkpoint: ModelCheckpoint, step: int) -> None:
    """Tells a callback that a step is already written."""
    checkpoint._last_global_step_saved = step


def describe_epochs(bar: Any, describe: Callable[[int], str]) -> None:
    """Sets how a `RichProgressBar` describes an epoch of training, by its number."""
    bar._get_train_description = describe


def undeclared(trainer: Trainer) -> Any:
    """The trainer, for those of its public attributes that Lightning sets without declaring them.

    They are, among others, `callbacks`, `datamodule`, `fast_dev_run` and `overfit_batches`.
    """
    return trainer


def add_summary(logger: TensorBoardLogger, summary: Summary) -> None:
    """Writes what torch has made of a run's options and final numbers."""
    logger.experiment._get_file_writer().add_summary(summary)


def add_event(logger: TensorBoardLogger, event: Event) -> None:
    """Writes an event; a logger that an earlier training has closed begins another file."""
    logger.experiment._get_file_writer().add_event(event)
