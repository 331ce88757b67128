"""What callbacks share that measure a module during validation and test."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from vfm_vae.types import Batch, LatentBatch
from vfm_vae.vfm import FrozenVFM


class EvaluationCallback(Callback, ABC):
    """Measures over every validation and test batch of the first data loader, and logs at the end.

    Subclasses say how to start, what to do with a batch, and what came out. The check before training runs none of it.

    Args:
        num_images: measure on so many images, spread evenly over the data set; null for all.

    Attributes:
        num_samples: images of the data set, over all ranks.
    """

    def __init__(self, num_images: int | None = None) -> None:
        if num_images is not None and num_images < 1:
            raise ValueError(f"num_images: at least 1, or null for all; got {num_images}.")
        self.num_images = num_images
        self.num_samples = 0

    @property
    def num_measured(self) -> int:
        """Images that take part, over all ranks."""
        return min(self.num_images or self.num_samples, self.num_samples)

    def settings(self) -> dict[str, Any]:
        """What the numbers depend on, as JSON has it."""
        return {"num_images": self.num_measured}

    def chosen(self, index: Tensor) -> Tensor:
        """Which samples of a batch take part, bool `[B]`: `num_images` of all, evenly spread, whoever has them."""
        if self.num_images is None or self.num_images >= self.num_samples:
            return index >= 0
        return (index >= 0) & (index * self.num_images % self.num_samples < self.num_images)

    def select(self, batch: Batch | LatentBatch) -> Batch | LatentBatch:
        """The samples of a batch that take part, numbered anew, without gaps over the whole; the batch if all do."""
        chosen = self.chosen(batch.index)
        if chosen.all() and self.num_images is None:
            return batch
        part = rows_of(batch, chosen)
        return part._replace(index=part.index * self.num_measured // self.num_samples)

    @abstractmethod
    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepares for a pass over the data set."""

    @abstractmethod
    def update(self, pl_module: LightningModule, batch: Batch | LatentBatch) -> None:
        """Takes in a batch, in evaluation mode and without gradients."""

    @abstractmethod
    def results(self) -> dict[str, Tensor]:
        """What to log, by name without the prefix `val/` or `test/`; the same on every rank."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts anew."""
        if not trainer.sanity_checking:
            self.num_samples = _num_samples(trainer.val_dataloaders)
            self.start(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts anew."""
        self.num_samples = _num_samples(trainer.test_dataloaders)
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
        # Equal on every rank already; sync_dist only says so.
        self.log_dict({f"{prefix}/{name}": value for name, value in values.items()}, sync_dist=True)
        return values


def rows_of(batch: Batch | LatentBatch, chosen: Tensor) -> Batch | LatentBatch:
    """The chosen samples of a batch, by a mask `[B]` or by positions."""
    return type(batch)(*(tensor[chosen] for tensor in batch))


def weights_of(vfms: Iterable[FrozenVFM]) -> dict[str, Any]:
    """Among settings: which VFMs, by name and hash of their weights."""
    return {"vfms": {vfm.name: vfm.fingerprint() for vfm in vfms}}


def _num_samples(loaders: Any) -> int:
    """Size of the (first) data loader's data set."""
    loader = loaders[0] if isinstance(loaders, list | tuple) else loaders
    return len(loader.dataset)
