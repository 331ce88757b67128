"""Statistics of latents that are computed on the fly are those of the whole data set, however it is sorted."""

import io
from functools import partial

import pytest
import torch
import webdataset
from PIL import Image
from torch import nn

from ldm.models.lightningdit import LightningDiT
from ldm.module import DiffusionModule
from ldm.normalization import LatentNormalization
from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.data.latents import LatentStatistics
from vfm_vae.frozen import Frozen
from vfm_vae.images import from_uint8

CLASSES, EACH = 6, 10


class AnySize(nn.Identity):
    def check_image_size(self, image_size):
        pass


class Thumbnails(Frozen):
    """Encodes images to their colours and the sum of these."""

    def __init__(self):
        super().__init__(AnySize())
        self.identity = {"channels": 4, "compression": 4, "vfm": "none", "fingerprint": "none"}

    def encode(self, images):
        self.colours = nn.functional.avg_pool2d(images, 4)
        return self

    def sample(self, noise):
        return torch.cat([self.colours, self.colours.sum(1, keepdim=True)], 1)


@pytest.fixture
def shards(tmp_path):
    """A shard for each class, whose images have one colour."""
    with webdataset.ShardWriter(str(tmp_path / "train-%04d.tar"), maxcount=EACH, verbose=0) as writer:
        for number in range(CLASSES * EACH):
            file = io.BytesIO()
            label = number // EACH
            Image.new("RGB", (16, 16), (40 * label, 255 - 40 * label, 10 + number % EACH)).save(file, "PNG")
            writer.write({"__key__": f"{number:04d}", "png": file.getvalue(), "cls": label})
    (tmp_path / "val-0000.tar").write_bytes((tmp_path / "train-0000.tar").read_bytes())
    return tmp_path


def test_statistics_are_of_all_classes_though_shards_are_sorted(shards, trainer):
    network = LightningDiT(in_channels=4, input_size=4, depth=1, width=32, num_heads=2, num_classes=CLASSES)
    optimizer = partial(torch.optim.AdamW, lr=1e-3)
    module = DiffusionModule(network, optimizer, tokenizer=Thumbnails(), statistics_images=2 * CLASSES)
    options = {"image_size": 16, "batch_size": 4, "num_workers": 0, "crop": "centre", "mixed_shards": 1}
    data = ImageNetDataModule(str(shards), source="shards", **options)
    trainer(max_steps=1, limit_val_batches=0).fit(module, data)
    images = torch.stack([data.train_set[i][0] for i in range(CLASSES * EACH)])
    latents = from_uint8(images).mean((2, 3))
    assert torch.allclose(module.normalization.mean[0, :2, 0, 0], latents.mean(0)[:2], atol=1e-5)
    assert torch.allclose(module.normalization.std[0, :2, 0, 0], latents.std(0)[:2], rtol=0.05)


class Rank:
    def __init__(self, rank, world_size):
        self.global_rank, self.world_size = rank, world_size


@pytest.mark.parametrize(("num_images", "world_size"), [(12, 2), (7, 3), (2, 4), (1000, 2)])
def test_ranks_share_images_that_are_spread_over_the_data_set(shards, num_images, world_size):
    numbers = []
    for rank in range(world_size):
        options = {"image_size": 16, "batch_size": 12, "num_workers": 0}
        data = ImageNetDataModule(str(shards), source="shards", **options)
        data.setup("fit")
        data.trainer = Rank(rank, world_size)
        numbers += [i for batch in data.spread_dataloader(num_images) for i in batch.index[batch.real].tolist()]
    count = min(num_images, CLASSES * EACH)
    assert sorted(numbers) == [i * CLASSES * EACH // count for i in range(count)]


@pytest.mark.parametrize(
    ("mean", "std", "differs"), [(0.09, 1.09, False), (0.11, 1.0, True), (0.0, 1.12, True), (0.0, 0.89, True)]
)
def test_statistics_are_others_from_a_tenth_of_the_deviation_on(mean: float, std: float, differs: bool):
    normalization = LatentNormalization(1)
    normalization.take(LatentStatistics(torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 2.0)))
    others = LatentStatistics(torch.full((1, 1, 1, 1), 2 * mean), torch.full((1, 1, 1, 1), 2 * std))
    assert normalization.differs_from(others) == differs
