"""What Lightning offers no public way to: one function for each of its private parts that is used."""

from lightning.pytorch import Trainer


def logs_now(trainer: Trainer) -> bool:
    """Whether the trainer logs the numbers of the training batch at hand: the last of a step, where one is due."""
    loop = trainer.fit_loop
    return not loop._should_accumulate() and trainer._logger_connector.should_update_logs


def forget_logged(trainer: Trainer) -> None:
    """Forgets the numbers of the last step, which would be logged with each batch of the next, too.

    Where a module steps by itself, Lightning logs with every batch of a step that is due.
    """
    if trainer.fit_loop._results is not None:
        trainer.fit_loop._results.clear()
