"""Trial runs, which write nothing.

A run that an option of the trainer cuts short, such as `fast_dev_run`, shows whether everything works. Its numbers,
checkpoints and files would pass for those of a whole run, so it leaves none, and goes on from none.
"""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelSummary, ProgressBar
from lightning.pytorch.loggers.logger import DummyLogger

# The limits of batches that each command heeds.
LIMITS = {
    "fit": ("limit_train_batches", "limit_val_batches"),
    "validate": ("limit_val_batches",),
    "test": ("limit_test_batches",),
    "predict": ("limit_predict_batches",),
    "sweep": ("limit_test_batches",),
}
# What barebones does not bear.
REFUSED_BY_BAREBONES = ("enable_progress_bar", "enable_model_summary", "log_every_n_steps", "num_sanity_val_steps")


class Output(Callback):
    """A callback that is there for the files that it leaves; a trial run goes without."""


def cut_short_by(options: Mapping[str, Any], command: str) -> str | None:
    """Which option makes a run a trial.

    Args:
        options: The trainer's options; `vars(trainer)` has them, too.
        command: `fit`, `validate`, `test`, `predict` or `sweep`.

    Returns:
        The option with its value, as the command line takes it; None for a whole run, which training without any
        validation (`limit_val_batches=0`) is as well.
    """
    for name in ("fast_dev_run", "overfit_batches", "barebones"):
        if options.get(name):
            return f"--trainer.{name}={options[name]}"
    for name in LIMITS[command]:
        limit = options.get(name)
        is_all = limit is None or (isinstance(limit, float) and limit == 1)
        is_off = command == "fit" and name == "limit_val_batches" and limit == 0
        if not is_all and not is_off:
            return f"--trainer.{name}={limit}"
    return None


def is_trial(trainer: Trainer) -> bool:
    """Whether what a trainer does at present is a trial."""
    return trainer.state.fn is not None and cut_short_by(vars(trainer), trainer.state.fn.value) is not None


def without_output(options: Mapping[str, Any]) -> dict[str, Any]:
    """A trainer's options without all that would write: checkpoints, logs, and the callbacks that are `Output`.

    Args:
        options: The trainer's options for a trial run, with its callbacks in a list.
    """
    dropped: tuple[type, ...] = (Output, Checkpoint)
    changed: dict[str, Any] = {"enable_checkpointing": False, "logger": DummyLogger()}
    if options.get("barebones"):
        dropped += (ProgressBar, ModelSummary)
        changed |= dict.fromkeys((*REFUSED_BY_BAREBONES, "logger"))
    kept = [callback for callback in options["callbacks"] if not isinstance(callback, dropped)]
    return {**options, **changed, "callbacks": kept}
