"""Base class of callbacks that measure a module during validation and test."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from vfm_vae.contracts import VFM, HasVFM
from vfm_vae.lightning_private import undeclared
from vfm_vae.metrics.reference import short_name
from vfm_vae.options import at_least
from vfm_vae.types import Batch, LatentBatch

AnyBatch = TypeVar("AnyBatch", bound=Batch | LatentBatch)


class EvaluationCallback(Callback, ABC):
    """Measures over all validation and test batches of the first data loader, and logs at the end.

    Subclasses define how to start, what to do with a batch, and what the results are. Lightning's sanity check measures
    nothing. Two callbacks that would log the same names are refused when a run starts.

    Args:
        num_images: Number of images to measure on, spread evenly over the data set; null for all.

    Attributes:
        num_samples: Images of the data set, over all ranks.
        num_measured: How many images the last results are of, over all ranks. Damaged images and those beyond a limit
            of batches are not counted.
    """

    def __init__(self, num_images: int | None = None) -> None:
        at_least(1, num_images=num_images)
        self.num_images = num_images
        self.num_samples = 0
        self.num_measured = 0
        self._count = torch.zeros((), dtype=torch.int64)  # of this rank

    @property
    def num_chosen(self) -> int:
        """Images that are to take part, over all ranks."""
        return min(self.num_images or self.num_samples, self.num_samples)

    def settings(self) -> dict[str, Any]:
        """What the numbers depend on, as plain data."""
        return {"num_images": self.num_measured}

    def chosen(self, index: Tensor) -> Tensor:
        """Which samples of a batch take part, bool `[B]`: `num_images` of all, evenly spread over ranks and batches."""
        if self.num_images is None or self.num_images >= self.num_samples:
            return index >= 0
        return (index >= 0) & (index * self.num_images % self.num_samples < self.num_images)

    def select(self, batch: AnyBatch) -> AnyBatch:
        """The samples of a batch that take part, numbered without gaps over all batches; the batch itself if all do."""
        chosen = self.chosen(batch.index)
        if chosen.all() and self.num_images is None:
            return batch
        part: Any = rows_of(batch, chosen)
        return part._replace(index=part.index * self.num_chosen // self.num_samples)

    @abstractmethod
    def names(self) -> set[str]:
        """The names of `results`, which no other callback may use; `<feature>` stands for a module's features."""

    @abstractmethod
    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepares for a pass over the data set."""

    @abstractmethod
    def update(self, pl_module: Any, batch: Any) -> None:
        """Takes in a batch, in evaluation mode and without gradients; `start` has checked the module."""

    @abstractmethod
    def results(self) -> dict[str, Tensor]:
        """What to log, by name without the prefix `val/` or `test/`; the same on every rank."""

    def adopt(self, pl_module: LightningModule) -> None:
        """Uses the module's own VFM if it was given none; called before names are compared, perhaps repeatedly.

        Raises:
            ValueError: if the module has none, and one is needed.
        """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks that no other callback logs the same names: Lightning would log the average of both."""
        self.adopt(pl_module)
        for other in undeclared(trainer).callbacks:
            if other is self or not isinstance(other, EvaluationCallback):
                continue
            other.adopt(pl_module)
            if shared := sorted(self.names() & other.names()):
                raise ValueError(
                    f"trainer.callbacks: {type(self).__name__} and another {type(other).__name__} would both log "
                    f"{shared[0]!r}; give all `vfms` to one of them, or measure the other in a run of its own"
                )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts anew."""
        if not trainer.sanity_checking:
            self._start(trainer, pl_module, trainer.val_dataloaders)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts anew."""
        self._start(trainer, pl_module, trainer.test_dataloaders)

    def _start(self, trainer: Trainer, pl_module: LightningModule, loaders: Any) -> None:
        dataset: Any = first_loader(loaders).dataset
        self.num_samples = len(dataset)
        self._count = torch.zeros((), dtype=torch.int64, device=pl_module.device)
        self.start(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch | LatentBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Takes in the batch."""
        if dataloader_idx or trainer.sanity_checking:
            return
        self._count += self.chosen(batch.index).sum()
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            self.update(pl_module, batch)

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs."""
        if not trainer.sanity_checking:
            self.log_results(trainer)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs."""
        self.log_results(trainer)

    def log_results(self, trainer: Trainer) -> dict[str, Tensor]:
        """Logs the results, and returns them."""
        prefix, values = "test" if trainer.testing else "val", self.results()
        count = int(trainer.strategy.reduce(self._count, reduce_op="sum"))
        self.num_measured = count if values else 0
        # Equal on every rank already; sync_dist only says so.
        logger: Any = self  # Lightning gives callbacks `log_dict` without declaring it
        logger.log_dict({f"{prefix}/{name}": value for name, value in values.items()}, sync_dist=True)
        return values


def rows_of(batch: AnyBatch, chosen: Tensor | slice) -> AnyBatch:
    """The chosen samples of a batch, by a mask `[B]`, by positions, or by a slice."""
    kind: Any = type(batch)
    return kind(*(None if tensor is None else tensor[chosen] for tensor in batch))


def own_vfm(pl_module: LightningModule) -> VFM | None:
    """The VFM that the module has itself, which needs no second copy; None where it has none."""
    return pl_module.vfm if isinstance(pl_module, HasVFM) else None


def needed_vfm(pl_module: LightningModule, callback: Callback, option: str) -> VFM:
    """The same, for a callback that can't do without.

    Args:
        pl_module: The module.
        callback: The callback.
        option: The callback's option that would set a VFM.

    Raises:
        ValueError: if the module has none.
    """
    vfm = own_vfm(pl_module)
    if vfm is None:
        raise ValueError(
            f"{type(callback).__name__}.{option}: {type(pl_module).__name__} has no VFM of its own here; give one"
        )
    return vfm


def by_name(vfms: Sequence[VFM]) -> dict[str, VFM]:
    """VFMs by their names.

    Raises:
        ValueError: two have the same.
    """
    names = [vfm.name for vfm in vfms]
    if len(set(names)) < len(names):
        raise ValueError(f"vfms: each may be given once; got {names}.")
    return dict(zip(names, vfms, strict=True))


def by_short_name(vfms: Sequence[VFM]) -> dict[str, VFM]:
    """VFMs by their short names, but where the rest tells two apart; raises as `by_name`."""
    short = [short_name(vfm.name) for vfm in vfms]
    named = zip(by_name(vfms).items(), short, strict=True)
    return {name if short.count(start) > 1 else start: vfm for (name, vfm), start in named}


def settings_of(vfms: Iterable[VFM]) -> dict[str, Any]:
    """Among settings: which VFMs, by name, hash of their weights, and how they see images and compute."""
    return {"vfms": {vfm.name: {"weights": vfm.fingerprint(), **vfm.view()} for vfm in vfms}}


def first_loader(loaders: Any) -> DataLoader[Any]:
    """The first of the trainer's data loaders, which is the one measured."""
    return loaders[0] if isinstance(loaders, list | tuple) else loaders
