"""What callbacks share that measure a module during validation and test."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from vfm_vae.types import Batch


class EvaluationCallback(Callback, ABC):
    """Measures over every validation and test batch of the first data loader, and logs at the end.

    Subclasses say how to start, what to do with a batch, and what came out. The check before training runs none of it.
    """

    @abstractmethod
    def start(self, trainer: Trainer, pl_module: LightningModule, num_samples: int) -> None:
        """Prepares for `num_samples` samples, over all ranks."""

    @abstractmethod
    def update(self, pl_module: LightningModule, batch: Batch) -> None:
        """Takes in a batch, in evaluation mode and without gradients."""

    @abstractmethod
    def results(self) -> dict[str, Tensor]:
        """What to log, by name without the prefix `val/` or `test/`; the same on every rank."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts anew."""
        if not trainer.sanity_checking:
            self.start(trainer, pl_module, _num_samples(trainer.val_dataloaders))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts anew."""
        self.start(trainer, pl_module, _num_samples(trainer.test_dataloaders))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
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
            prefix = "test" if trainer.testing else "val"
            values = {f"{prefix}/{name}": value for name, value in self.results().items()}
            self.log_dict(values, sync_dist=True)  # equal on every rank already; this only says so

    on_test_epoch_end = on_validation_epoch_end


def _num_samples(loaders: Any) -> int:
    """Size of the (first) data loader's data set."""
    loader = loaders[0] if isinstance(loaders, list | tuple) else loaders
    return len(loader.dataset)
