"""Resumes a run within an epoch, even with another batch size or number of ranks."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from vfm_vae.data.sampling import TrainingSampler

FORMER = -1  # an epoch before all that are to come


class ResumableLoader(DataLoader[Any]):
    """A `DataLoader` over a `TrainingSampler` whose place in the data goes into Lightning's checkpoint.

    The place is an epoch and how many images of its order were handed out, over all ranks. Loading it leaves those out,
    unread, whatever the batch size, the accumulation and the number of ranks are now, and makes Lightning, which counts
    batches, count those of now. The workers start with the first batch rather than with the iterator, because Lightning
    makes the iterator before it tells the sampler the epoch.

    Args:
        *args: As for `DataLoader`.
        trainer: The trainer whose counts follow the loader's, if there is one.
        **kwargs: As for `DataLoader`.
    """

    sampler: TrainingSampler
    batch_size: int

    def __init__(self, *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.trainer = trainer
        self._epoch, self._images = FORMER, 0
        self._resumed = False  # whether the place is a former run's

    def state_dict(self) -> dict[str, Any]:
        """The place in the data, the same on every rank; an epoch without a step left counts as seen whole."""
        sampler = self.sampler
        place = {"epoch": self._epoch, "images": self._images}
        return place | {"order": sampler.order, "batches_per_step": sampler.batches_per_step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Makes the next iteration begin where the state was taken, if it is of the same epoch.

        Raises:
            ValueError: a former version counted batches, and of another size.
        """
        self._resumed = True
        if "num_batches" in state:
            self._epoch, self._images = self._place_after(state["num_batches"])
            return
        size, order = len(self.sampler.dataset), self.sampler.order
        is_whole = state["images"] >= min(size, state["order"]["images"])
        self._epoch, self._images = state["epoch"], size if is_whole else state["images"]
        changed = [f"{name} {of}, now {order[name]}" for name, of in state["order"].items() if of != order[name]]
        if changed and not is_whole:
            rank_zero_warn(
                f"data: the resumed epoch was begun in another order ({'; '.join(changed)}): some of its images are "
                "seen twice or not at all"
            )
        if self.trainer is not None:
            self._recount(self.trainer, state["batches_per_step"])

    def __iter__(self) -> Any:
        """The batches of one epoch, or what is left of it."""
        sampler = self.sampler
        sampler.start = self._images if self._resumed and self._epoch == sampler.epoch else 0
        self._epoch, self._resumed = sampler.epoch, False
        count = sampler.batches_behind(sampler.start)
        for number, batch in enumerate(super().__iter__(), start=1):
            seen = sampler.start + number * self.batch_size * sampler.num_replicas
            self._images = seen if number < count else len(self.sampler.dataset)
            yield batch

    def _recount(self, trainer: Trainer, former_batches_per_step: int) -> None:
        """Puts batches of now in the place of those that Lightning has counted; what they were for stays as it is.

        In the epoch, the batches before the present place are those that are not left of a whole epoch, so that each
        epoch has equally many. Over all epochs, as many steps as before were made: by them validations are timed.
        """
        progress, batches_per_step = trainer.fit_loop.epoch_loop.batch_progress, self.sampler.batches_per_step
        seen = len(self) - self.sampler.batches_behind(self._images)
        made = -(-progress.total.ready // former_batches_per_step) * batches_per_step
        if (seen, made) == (progress.current.ready, progress.total.ready):
            return
        for tracker, number in ((progress.current, seen), (progress.total, made)):
            shift = number - tracker.ready
            for stage, count in tracker.state_dict().items():
                setattr(tracker, stage, count + shift)
        progress.is_last_batch = seen == len(self)

    def _place_after(self, num_batches: int) -> tuple[int, int]:
        """Epoch and images of a state of former versions, whose batches are taken for as large as now's."""
        size = self.batch_size * self.sampler.num_replicas
        epoch = 0
        if self.trainer is not None:
            progress: Any = self.trainer.fit_loop.epoch_progress  # declared without what it counts
            epoch = progress.current.processed
            self._check_size(self.trainer, epoch, num_batches, size)
        return (epoch, num_batches * size) if num_batches % len(self) else (FORMER, len(self.sampler.dataset))

    def _check_size(self, trainer: Trainer, epoch: int, num_batches: int, size: int) -> None:
        """Checks that a run's counts agree with batches of this size."""
        made = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        module = trainer.lightning_module
        before = getattr(module, "images_seen", made * size) - made * size  # of former stages
        as_many = made in (epoch * len(self), epoch * len(self) + num_batches)
        if not as_many or before < 0 or (before and getattr(module, "init_from", None) is None):
            raise ValueError(
                "batch_size: the checkpoint is from an earlier version, which counts batches within the epoch, but not "
                f"of {size} images; resume with batch size, accumulation and GPUs as they were, and change "
                "them after the next checkpoint"
            )
