"""How the images of a step are divided: over GPUs, and on each of them into batches, one after the other."""

from typing import TypeGuard

from lightning.pytorch import Trainer


class Steps:
    """Divides the images of a step over GPUs and over batches whose gradients are accumulated.

    From `begin` to `end`, the trainer accumulates as many batches as make a step, and the steps between two
    validations, its `val_check_interval`, become batches. Without `micro_batch_size` it is left as it is: a batch is
    then what `batch_size` says, and options named `accumulate_grad_batches` say how many of them make a step.

    Args:
        batch_size: Images of a step, over all GPUs.
        micro_batch_size: Images that a GPU takes at a time, at most; None leaves steps to the trainer.
    """

    def __init__(self, batch_size: int, micro_batch_size: int | None) -> None:
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self._given: tuple[Trainer, int, int | float | None] | None = None  # a trainer, and what it had before

    def of_rank(self, num_ranks: int) -> int:
        """Images that one of so many GPUs takes at a time.

        Raises:
            ValueError: if a step does not divide like that.
        """
        share = divided("batch_size", self.batch_size, num_ranks)
        size = min(self.micro_batch_size or share, share)
        if share % size:
            fitting = next(smaller for smaller in range(size, 0, -1) if share % smaller == 0)
            raise ValueError(
                f"micro_batch_size: the {share} images that each GPU takes of a step (batch_size {self.batch_size}, "
                f"{num_ranks} in all) don't divide into batches of {size}; give {fitting}, or another batch_size"
            )
        return size

    def begin(self, trainer: Trainer) -> None:
        """Makes a trainer accumulate, before it trains.

        Raises:
            ValueError: if a step does not divide, another option also says how many batches make one, or validations
                could fall into the middle of a step.
        """
        if self.micro_batch_size is None or self._given is not None:
            return
        if (number := batches_per_step(trainer)) > 1:
            option = f"{'trainer' if trainer.accumulate_grad_batches > 1 else 'model'}.accumulate_grad_batches"
            raise ValueError(
                f"micro_batch_size: how many batches make a step follows from it, but {option} says {number}, too; "
                "leave that out, and give the batch_size of a whole step"
            )
        number = self.batch_size // (self.of_rank(trainer.world_size) * trainer.world_size)
        interval = getattr(trainer, "val_check_interval", None)  # none where validations go by the clock
        if number > 1 and isinstance(interval, float) and interval < 1:
            raise ValueError(
                f"trainer.val_check_interval: {interval} of an epoch may end in the middle of a step, which takes "
                f"{number} batches (micro_batch_size); give it as a number of steps, or 1.0 for whole epochs"
            )
        self._given = trainer, trainer.accumulate_grad_batches, interval
        trainer.accumulate_grad_batches = number
        if counts_batches(interval):
            trainer.val_check_interval = interval * number

    def end(self) -> None:
        """Restores the trainer's options."""
        if self._given is not None:
            trainer, number, interval = self._given
            trainer.accumulate_grad_batches = number
            if interval is not None:
                trainer.val_check_interval = interval
            self._given = None


def batches_per_step(trainer: Trainer) -> int:
    """Batches whose gradients make one step: by the trainer, or by an option of a module that steps by itself."""
    return max(trainer.accumulate_grad_batches, getattr(trainer.lightning_module, "accumulate_grad_batches", 1))


def whole_steps(trainer: Trainer) -> int:
    """The same, for training that validates between steps.

    Raises:
        ValueError: if a validation would fall between the batches of a step, where gradients would be lost.
    """
    number, interval = batches_per_step(trainer), getattr(trainer, "val_check_interval", None)
    if counts_batches(interval) and interval % number:
        raise ValueError(
            f"trainer.val_check_interval: {interval} batches end in the middle of a step, which takes {number} "
            f"(accumulate_grad_batches); give a multiple of {number}"
        )
    return number


def divided(option: str, batch_size: int, num_ranks: int) -> int:
    """One rank's part of a batch.

    Raises:
        ValueError: if the option's images don't divide over the ranks.
    """
    if batch_size < 1 or batch_size % num_ranks:
        raise ValueError(
            f"{option}: {batch_size} images in total don't divide over {num_ranks} ranks; give a multiple of "
            f"{num_ranks}"
        )
    return batch_size // num_ranks


def counts_batches(interval: int | float | None) -> TypeGuard[int]:
    """Whether an interval between validations is a number of batches, not a share of an epoch."""
    return isinstance(interval, int) and not isinstance(interval, bool)
