"""What `last.ckpt` holds, and when it is written."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from callbacks.checkpoint import LastCheckpoint


class Module(LightningModule):
    """Whose validation gets worse from time to time."""

    def __init__(self, manual: bool):
        super().__init__()
        self.automatic_optimization = not manual
        self.layer = torch.nn.Linear(2, 1)
        self.score = 0.0

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).square().mean()
        if self.automatic_optimization:
            return loss
        self.manual_backward(loss / 2)
        if batch_idx % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()
        return None

    def validation_step(self, batch, batch_idx):
        self.score += 1
        self.log("val/worse", self.score)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Written(Callback):
    """Notes at which batch a checkpoint is written."""

    def __init__(self):
        self.batches = []

    def on_save_checkpoint(self, trainer, module, checkpoint):
        self.batches.append(trainer.fit_loop.epoch_loop.total_batch_idx + 1)


def fit(folder: Path, manual: bool, num_batches: int, ckpt_path: str | None = None) -> list[int]:
    written = Written()
    best = ModelCheckpoint(folder, monitor="val/worse", mode="min", filename="best", enable_version_counter=False)
    last = LastCheckpoint(every_n_steps=5)
    last.dirpath = str(folder)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=1,
        limit_train_batches=num_batches, val_check_interval=8, num_sanity_val_steps=0, limit_val_batches=1,
        accumulate_grad_batches=1 if manual else 2, callbacks=[written, best, last],
    )  # fmt: skip
    data = DataLoader(torch.ones(64, 2)), DataLoader(torch.ones(2, 2))
    trainer.fit(Module(manual), *data, ckpt_path=ckpt_path, weights_only=True)
    return written.batches


@pytest.mark.parametrize("manual", [False, True])
def test_the_end_is_kept_though_an_older_one_is_best(tmp_path: Path, manual: bool):
    assert fit(tmp_path, manual, 28) == [8, 10, 20, 28]  # best once, every five steps of two batches, and the end
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 14
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["global_step"] == 4


@pytest.mark.parametrize("manual", [False, True])
def test_going_on_writes_nothing_in_the_middle_of_a_step(tmp_path: Path, manual: bool):
    fit(tmp_path, manual, 20)
    assert [batch for batch in fit(tmp_path, manual, 34, "last") if batch % 2] == []


def test_a_number_that_is_not_possible():
    with pytest.raises(ValueError, match="every_n_steps: must be at least 1, given 0"):
        LastCheckpoint(0)
