"""Numbers do not depend on the order that images lie in: folders and shards are sorted by class."""

import io
from functools import partial

import numpy as np
import pytest
import torch
import webdataset
from lightning.pytorch import LightningModule
from PIL import Image
from torch.utils.data import DataLoader
from torch_fidelity.metric_isc import isc_features_to_metric

from callbacks.distribution import DistributionCallback
from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.data.sampling import EvaluationSampler
from vfm_vae.images import from_uint8
from vfm_vae.metrics.distribution import InceptionScore
from vfm_vae.metrics.inception import Inception, InceptionFeatures, InceptionNetwork

CLASSES, EACH, SPLIT = 8, 10, 10
LABELS = torch.arange(CLASSES).repeat_interleave(EACH)


def picture(label, number):
    """Grey as bright as its class, and a little brighter with its number."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (20 * label + number,) * 3).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The same images as `folder` and as `shards`, sorted by class."""
    root = tmp_path_factory.mktemp("order")
    (root / "shards").mkdir()
    with webdataset.ShardWriter(str(root / "shards/val-%04d.tar"), maxcount=13, verbose=0) as shards:
        for label in range(CLASSES):
            (root / f"folder/val/{label}").mkdir(parents=True)
            for number in range(EACH):
                (root / f"folder/val/{label}/{number}.png").write_bytes(picture(label, number))
                shards.write({"__key__": f"{label}_{number}", "png": picture(label, number), "cls": label})
    return root


def logits_of(images):
    brightness = images[:, 0, 0, 0].float()  # [B]
    label, number = brightness // 20, brightness % 20
    return (6 + number[:, None] / 5) * (label[:, None] == torch.arange(CLASSES))


def features_of(images):
    logits = logits_of(images)
    return InceptionFeatures(logits[:, :4], logits[:, :4], logits)


@pytest.fixture
def inception(monkeypatch):
    """Without weights; it knows the class of an image by its brightness. Splits are small."""
    with torch.device("meta"):
        network = InceptionNetwork()
    monkeypatch.setattr("vfm_vae.metrics.inception._load", lambda weights: (network, "f" * 64))
    monkeypatch.setattr("vfm_vae.metrics.suite.extract", lambda network, images: features_of(images))
    for width in ("POOL_WIDTH", "SPATIAL_WIDTH"):
        monkeypatch.setattr(f"vfm_vae.metrics.suite.{width}", 4)
    small = partial(InceptionScore, split_size=SPLIT, num_classes=CLASSES)
    monkeypatch.setattr("vfm_vae.metrics.suite.InceptionScore", small)
    network = Inception()
    monkeypatch.setattr(network, "to", lambda device: network)
    return network


class Mirror(LightningModule):
    """Reconstructs without error."""

    def evaluation_images(self, batch):
        images = from_uint8(batch.images)
        return images, images

    def test_step(self, batch, batch_idx):
        pass


def data(root, source, batch_size):
    options = {"image_size": 8, "val_batch_size": batch_size, "num_workers": 0}
    return ImageNetDataModule(str(root / source), source=source, **options)


@pytest.fixture(scope="module")
def expected():
    images = [Image.open(io.BytesIO(picture(label, number))) for label in range(CLASSES) for number in range(EACH)]
    logits = logits_of(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
    assert isc_features_to_metric(logits, splits=CLASSES, shuffle=False)["inception_score_mean"] < 1.1
    return isc_features_to_metric(logits, splits=len(LABELS) // SPLIT)["inception_score_mean"]


@pytest.mark.parametrize("batch_size", [7, 32])
@pytest.mark.parametrize("source", ["folder", "shards"])
def test_inception_score_of_reconstructions(root, inception, trainer, expected, source, batch_size):
    run = trainer(DistributionCallback(inception))
    run.test(Mirror(), data(root, source, batch_size), verbose=False)
    assert run.callback_metrics["test/ris"].item() == pytest.approx(expected, rel=1e-6)
    assert expected > 3


@pytest.mark.parametrize("source", ["folder", "shards"])
def test_inception_score_over_ranks(root, expected, source):
    module = data(root, source, 8)
    module.setup("test")
    assert torch.equal(torch.from_numpy(module.val_set.labels), LABELS)
    ranks = []
    for rank in range(3):
        sampler = EvaluationSampler(module.val_set, 7, num_replicas=3, rank=rank)
        ranks.append(InceptionScore(len(LABELS), SPLIT, CLASSES))
        for batch in reversed(list(DataLoader(module.val_set, 7, sampler=sampler, collate_fn=module.val_set.collate))):
            ranks[-1].update(logits_of(batch.images), batch.index)
    for other in ranks[1:]:
        ranks[0].merge_state(other)
    assert ranks[0].compute().item() == pytest.approx(expected, rel=1e-6)
