"""A small autoencoder and its data, to watch callbacks at work."""

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset, default_collate

from vfm_vae.types import Batch, Decoded


class Noise(Dataset):
    def __init__(self, num_images):
        self.images = torch.randint(0, 256, (num_images, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], 0, index


def collate(samples):
    return Batch(*default_collate(samples))


class NoiseData(LightningDataModule):
    def __init__(self, num_val=13, padding=0):
        super().__init__()
        self.train_set, self.val_set, self.padding = Noise(64), Noise(num_val), padding

    def train_dataloader(self):
        return DataLoader(self.train_set, batch_size=4, collate_fn=collate)

    def val_dataloader(self):
        return DataLoader(self.val_set, batch_size=5, collate_fn=self.collate_padded)

    def collate_padded(self, samples):
        """Adds images that no metric may look at."""
        batch = collate(samples)
        white = torch.full((self.padding, 3, 8, 8), 255, dtype=torch.uint8)
        padding = Batch(white, torch.zeros(self.padding).long(), -torch.ones(self.padding).long())
        return Batch(*(torch.cat(pair) for pair in zip(batch[:3], padding[:3], strict=True)))

    test_dataloader = predict_dataloader = val_dataloader


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode = nn.Conv2d(3, 4, 3, padding=1)
        self.decode = nn.Conv2d(4, 3, 3, padding=1)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.register_buffer("num_forwards", torch.zeros(()))

    def forward(self, images):
        if self.training:
            self.num_forwards += 1
        return self.decode(self.encode(images))


class Module(LightningModule):
    """Two manual optimisers, as the tokenizer's module: steps of the first count."""

    def __init__(self, accumulate=1, lr=0.1):
        super().__init__()
        torch.manual_seed(0)
        self.model = Autoencoder()
        self.discriminator = nn.Conv2d(3, 1, 1)
        self.images_seen = 0
        self.accumulate, self.lr = accumulate, lr
        self.automatic_optimization = False
        self.validated = []

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), self.lr) for part in (self.model, self.discriminator)]

    def training_step(self, batch, batch_idx):
        images = batch.images / 127.5 - 1
        generator, discriminator = self.optimizers()
        reconstruction = self.model(images)
        loss = (reconstruction - images).square().mean()
        self.manual_backward(loss / self.accumulate)
        self.manual_backward(self.discriminator(reconstruction.detach()).square().mean())
        self.images_seen += len(images)
        if (batch_idx + 1) % self.accumulate == 0:
            generator.step()
            generator.zero_grad()
            discriminator.optimizer.step()
            discriminator.zero_grad()
        self.log("train/loss", loss)

    def validation_step(self, batch, batch_idx):
        self.validated.append(self.model.encode.weight.detach().clone())
        real = batch.real
        images = batch.images[real] / 127.5 - 1
        self.log("val/loss", (self.model(images) - images).square().mean(), batch_size=int(real.sum()))

    def test_step(self, batch, batch_idx):
        self.validated.append(self.model.encode.weight.detach().clone())
        self.log("test/loss", self.model(batch.images / 127.5 - 1).square().mean())

    def predict_step(self, batch, batch_idx):
        self.validated.append(self.model.encode.weight.detach().clone())
        return self.reconstruct(batch).image, batch.index

    def reconstruct(self, batch):
        images = batch.images / 127.5 - 1
        return Decoded(self.model(images), (images[..., ::4, ::4], images[..., ::2, ::2]))

    def evaluation_images(self, batch):
        images = batch.images / 127.5 - 1
        return images, self.model(images)

    def alignment_features(self, batch, time=None):
        images = batch.images / 127.5 - 1
        return {"latent": self.model.encode(images).flatten(1), "pixels": images.flatten(1)}

    def on_save_checkpoint(self, checkpoint):
        checkpoint["images_seen"] = self.images_seen

    def on_load_checkpoint(self, checkpoint):
        self.images_seen = checkpoint["images_seen"]


@pytest.fixture
def module():
    return Module()


@pytest.fixture
def new_module():
    return Module


@pytest.fixture
def data():
    return NoiseData()


@pytest.fixture
def padded_data():
    return NoiseData(padding=2)


@pytest.fixture
def trainer(tmp_path):
    """Makes a quiet trainer on the CPU."""

    def make(*callbacks, **kwargs):
        defaults = {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 6,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "logger": False,
            "default_root_dir": tmp_path,
        }
        return Trainer(callbacks=list(callbacks), **{**defaults, **kwargs})

    return make
