"""What watches a model that generates: distance to a folder, class accuracy, pictures, and what prediction writes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from safetensors.torch import load_file

from callbacks.distribution import DistributionCallback
from callbacks.images import SampleImages
from callbacks.probe import ClassAccuracyCallback
from callbacks.samples import SampleWriter
from callbacks.writers import LatentWriter, keep_settings
from ldm.condition import Labels
from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.data.latents import LatentDataset
from vfm_vae.data.sampling import IndexedNoise
from vfm_vae.images import from_uint8, quantised
from vfm_vae.metrics.distribution import frechet_distance
from vfm_vae.metrics.reference import folder_features
from vfm_vae.types import Encoded, LatentBatch, Samples
from vfm_vae.vfm import FrozenVFM

VFM = "vit_photos_patch8_64"
NUM_CLASSES = 13


class Painter(LightningModule):
    """Draws training photographs: sample i is an image of class i mod 13, or of a wrong class every fourth time."""

    def __init__(self, root: Path, predict: str = "images"):
        super().__init__()
        self.root, self.predict, self.guided, self.drawn = root, predict, [], 0
        self.bias = torch.nn.Parameter(torch.zeros(()))

    def sample_condition(self, index):
        return Labels(index % NUM_CLASSES, NUM_CLASSES)

    can_decode, num_classes = True, NUM_CLASSES

    def draw(self, index, condition=None, guidance_scale=None, decode=True):
        labels = self.sample_condition(index).labels if condition is None else torch.as_tensor(condition)
        self.guided.append(guidance_scale)
        self.drawn += len(index)
        shown = torch.where(index % 4 == 3, (labels + 5) % NUM_CLASSES, labels)
        names = sorted(path.name for path in (self.root / "train").iterdir())
        files = [sorted((self.root / "train" / names[label]).iterdir())[0] for label in shown.tolist()]
        images = torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files])
        latents = IndexedNoise("test", 0, index).normal(2, 3, 3)
        images = from_uint8(images) if self.predict == "images" else None
        return Samples(images, latents, Labels(labels, NUM_CLASSES), index)

    def evaluation_images(self, batch):
        return None, self.draw(batch.index).images

    def evaluation_settings(self):
        return {"seed": 0, "weights": self.bias.item()}

    def validation_step(self, batch, batch_idx):
        pass

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return self.draw(batch.index)


@pytest.fixture
def painter(photos):
    return Painter(photos)


def photos_data(photos, **kwargs):
    return ImageNetDataModule(photos, image_size=64, val_batch_size=5, num_workers=0, **kwargs)


def test_distance_to_a_folder(painter, photos, trainer):
    vfm = FrozenVFM(VFM)
    callback = DistributionCallback(vfm, num_images=20, reference=str(photos / "train"), image_size=64)
    run = trainer(callback)
    run.validate(painter, photos_data(photos), verbose=False)
    assert painter.drawn == 20
    fake = vfm(quantised(painter.draw(torch.arange(20)).images)).pooled.double()
    real = folder_features(vfm, photos / "train", 64).features.double()
    by_hand = frechet_distance(real.mean(0), real.T.cov(), fake.mean(0), fake.T.cov()).item()
    assert run.callback_metrics[f"val/fd_{VFM}/train"].item() == pytest.approx(by_hand, rel=1e-4)
    run.validate(painter, photos_data(photos), verbose=False)  # the reference is not added twice
    assert run.callback_metrics[f"val/fd_{VFM}/train"].item() == pytest.approx(by_hand, rel=1e-4)


class PainterWithVFM(Painter):
    """One that has a VFM of its own."""

    def __init__(self, photos):
        super().__init__(photos)
        self.own = FrozenVFM(VFM)

    @property
    def vfm(self):
        return self.own


def test_without_a_network_the_modules_own_vfm_is_taken(photos, trainer):
    painter = PainterWithVFM(photos)
    distance = DistributionCallback(num_images=20, reference=str(photos / "train"), image_size=64)
    accuracy = ClassAccuracyCallback(str(photos / "train"), image_size=64)
    run = trainer(distance, accuracy)
    run.validate(painter, photos_data(photos), verbose=False)
    assert distance.network is painter.vfm and accuracy.vfm is painter.vfm
    values = run.callback_metrics
    assert {f"val/fd_{VFM}/train", "val/class_accuracy"} <= values.keys()
    copy = DistributionCallback(FrozenVFM(VFM), num_images=20, reference=str(photos / "train"), image_size=64)
    run = trainer(copy)
    run.validate(painter, photos_data(photos), verbose=False)
    assert run.callback_metrics[f"val/fd_{VFM}/train"] == values[f"val/fd_{VFM}/train"]
    for callback, option in (DistributionCallback(), "network"), (ClassAccuracyCallback(str(photos / "train")), "vfm"):
        named = f"{type(callback).__name__}.{option}"
        with pytest.raises(ValueError, match=f"^{named}: Painter has no VFM of its own here; give one$"):
            trainer(callback).validate(Painter(photos), photos_data(photos), verbose=False)


def test_settings_name_the_reference_and_its_crops(painter, photos, trainer):
    vfm = FrozenVFM(VFM)
    distance = DistributionCallback(vfm, num_images=20, reference=str(photos / "train"), image_size=64)
    accuracy = ClassAccuracyCallback(str(photos / "train"), vfm, image_size=64)
    trainer(distance, accuracy).validate(painter, photos_data(photos), verbose=False)
    settings = distance.settings()
    assert settings["reference"] == str(photos / "train") and settings["reference_image_size"] == 64
    settings = accuracy.settings()
    assert settings["vfms"][VFM].items() >= {"weights": vfm.fingerprint(), "input_scale": 1.0}.items()
    assert (settings["images"], settings["image_size"]) == (str(photos / "train"), 64) and settings["num_images"] == 26


class Sampled(ImageNetDataModule):
    """Latents or the numbers of samples to draw: no images to compare with."""

    def val_dataloader(self):
        if self.num_samples is None:
            rows = [(torch.zeros(2, 3, 3), 0, i) for i in range(6)]
            return torch.utils.data.DataLoader(rows, 3, collate_fn=LatentDataset.collate)
        return self.test_dataloader()

    def train_dataloader(self):
        return torch.utils.data.DataLoader([0.0])


@pytest.mark.parametrize("num_samples", [None, 6])
@pytest.mark.parametrize("evaluation", ["validate", "test", "fit"])
def test_no_reference_is_refused_before_a_sample_is_drawn(painter, photos, trainer, evaluation, num_samples):
    data = Sampled(photos, image_size=64, val_batch_size=3, num_workers=0, num_samples=num_samples)
    painter.test_step = painter.validation_step
    painter.training_step = lambda *args: pytest.fail("trained for nothing")
    painter.configure_optimizers = lambda: None
    accuracy = ClassAccuracyCallback(str(photos / "train"), FrozenVFM(VFM), image_size=64)
    with pytest.raises(ValueError, match="reference: Painter on this data has no real images to compare with"):
        getattr(trainer(accuracy, DistributionCallback(FrozenVFM(VFM))), evaluation)(painter, data)
    assert painter.drawn == 0


@pytest.mark.parametrize(("num_images", "num_samples"), [(20, 26), (13, 26), (7, 10), (None, 26)])
def test_chosen_samples_are_numbered_without_gaps(num_images, num_samples):
    """Whatever is chosen, balanced labels stay balanced."""
    callback = DistributionCallback(FrozenVFM(VFM), num_images)
    callback.num_samples = num_samples
    index = torch.cat([torch.arange(num_samples), torch.tensor([-1])])
    parts = [callback.select(LatentBatch(part, part, part)) for part in index.split(4)]
    assert torch.cat([part.index for part in parts]).tolist() == list(range(num_images or num_samples))


def test_parts_of_a_folder_make_the_whole(photos):
    vfm = FrozenVFM(VFM)
    whole = folder_features(vfm, photos / "train", 64)
    parts = [folder_features(vfm, photos / "train", 64, (rank, 3)) for rank in range(3)]
    assert whole.features.shape == (52, 128) and whole.labels.tolist() == sorted(whole.labels.tolist())
    for rank, part in enumerate(parts):
        assert torch.equal(part.labels, whole.labels[rank::3])
        assert torch.allclose(part.features, whole.features[rank::3], atol=1e-5)


def test_class_accuracy_finds_wrong_classes(painter, photos, trainer):
    run = trainer(ClassAccuracyCallback(str(photos / "train"), FrozenVFM(VFM), image_size=64))
    run.validate(painter, photos_data(photos), verbose=False)
    expected = sum(i % 4 != 3 for i in range(26)) / 26
    assert run.callback_metrics["val/class_accuracy"].item() == pytest.approx(expected, abs=0.04)


def test_sample_grids(painter, photos, trainer, tmp_path):
    grids = SampleImages([2, 0, 7], num_images=4, guidance_scales=[1.0, 2.5], batch_size=5)
    run = trainer(grids, logger=TensorBoardLogger(tmp_path, name="run", version=""))
    run.validate(painter, photos_data(photos), verbose=False)
    for scale in ("1", "2.5"):
        picture = np.asarray(Image.open(tmp_path / f"run/images/samples_guidance_{scale}.png"))
        assert picture.shape == (3 * 66 + 2, 4 * 66 + 2, 3)
    expected = painter.draw(torch.tensor([0]), torch.tensor([2])).images[0]
    corner = from_uint8(torch.from_numpy(picture[2:66, 2:66].copy()).permute(2, 0, 1))
    assert (corner - expected).abs().max() < 0.01
    assert painter.guided[:-1] == [1.0] * 3 + [2.5] * 3
    painter.can_decode, painter.drawn = False, 0
    with pytest.warns(UserWarning, match="nothing to decode samples"):
        run.validate(painter, photos_data(photos), verbose=False)
    assert painter.drawn == 0
    with pytest.raises(ValueError, match="give at least one"):
        SampleImages([])


def predict(module, data, *callbacks, folder):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder}
    Trainer(accelerator="cpu", devices=1, callbacks=list(callbacks), **quiet).predict(module, datamodule=data)


def test_samples_as_png_and_npz(painter, photos, tmp_path):
    folder = tmp_path / "out" / "samples"
    predict(painter, photos_data(photos, num_samples=12), SampleWriter(str(folder), npz=True), folder=tmp_path)
    with pytest.raises(ValueError, match="npz: holds images"):
        latents = Painter(photos, predict="latents")
        predict(latents, photos_data(photos, num_samples=12), SampleWriter("z", npz=True), folder=tmp_path)
    assert sorted(path.name for path in folder.glob("*.png")) == [f"{i:08d}.png" for i in range(12)]
    with np.load(folder.with_suffix(".npz")) as arrays:
        images, labels = arrays["arr_0"], arrays["arr_1"]
    assert images.shape == (12, 64, 64, 3) and images.dtype == np.uint8
    assert labels.tolist() == list(range(12))
    assert all(np.array_equal(images[i], np.asarray(Image.open(folder / f"{i:08d}.png"))) for i in range(12))
    expected = painter.draw(torch.arange(12)).images
    difference = from_uint8(torch.from_numpy(images).permute(0, 3, 1, 2)) - expected
    assert difference.abs().max() < 0.01


def test_a_place_for_all_samples_is_seen_before_one_is_drawn(painter, photos, tmp_path):
    (tmp_path / "samples.npz").mkdir()
    with pytest.raises(ValueError, match=r"^directory: can't write '.*samples.npz' \(a folder lies there\)"):
        writer = SampleWriter(str(tmp_path / "samples"), npz=True)
        predict(painter, photos_data(photos, num_samples=12), writer, folder=tmp_path)
    assert painter.drawn == 0


def test_interrupted_sampling_goes_on(painter, photos, tmp_path):
    writer = SampleWriter(str(tmp_path / "samples"))
    data = {"num_samples": 12}
    predict(painter, photos_data(photos, **data), writer, folder=tmp_path)
    for number in (3, 7, 8):
        (tmp_path / f"samples/{number:08d}.png").unlink()
    painter.drawn = 0
    predict(painter, photos_data(photos, **data), writer, folder=tmp_path)
    assert painter.drawn == 3
    assert len(list((tmp_path / "samples").glob("*.png"))) == 12
    painter.bias.data += 1
    with pytest.raises(ValueError, match=r"holds what was made otherwise: weights was 0.0, now 1.0"):
        predict(painter, photos_data(photos, **data), writer, folder=tmp_path)


def test_samples_as_latents(photos, tmp_path):
    painter = Painter(photos, predict="latents")
    predict(painter, photos_data(photos, num_samples=12), SampleWriter(str(tmp_path / "z")), folder=tmp_path)
    predict(painter, photos_data(photos, num_samples=12), SampleWriter(str(tmp_path / "z")), folder=tmp_path)
    assert painter.drawn == 12 + 1  # the second time only padding
    files = sorted((tmp_path / "z").glob("*.safetensors"))
    stored = [load_file(file) for file in files]
    assert torch.cat([part["index"] for part in stored]).tolist() == list(range(12))
    expected = painter.draw(torch.arange(12))
    assert torch.equal(torch.cat([part["latents"] for part in stored]), expected.latents)
    assert torch.equal(torch.cat([part["labels"] for part in stored]), expected.condition.labels)


def test_sampling_needs_a_number(painter, photos, tmp_path):
    with pytest.raises(ValueError, match=r"data\.num_samples: says how many"):
        predict(painter, photos_data(photos), SampleWriter(str(tmp_path / "s")), folder=tmp_path)


class Encoder(LightningModule):
    """Encodes an image to its mean colour."""

    predict, fingerprint, seed = "latents", "f" * 64, 0

    def latent_identity(self):
        return {"vfm": "none", "fingerprint": self.fingerprint}

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        latents = from_uint8(batch.images).mean((2, 3), keepdim=True)
        return Encoded({"latents": latents, "latents_flip": -latents}, batch.labels, batch.index)


def cache(photos, folder, module=None, **kwargs):
    data = photos_data(photos, predict=["train", "val"])
    predict(module or Encoder(), data, LatentWriter(str(folder), shard_size=12, **kwargs), folder=folder.parent)


def test_a_cache_holds_every_image_of_every_split(photos, tmp_path):
    cache(photos, tmp_path / "z")
    for split, size in (("train", 52), ("val", 26)):
        dataset = LatentDataset(tmp_path / "z" / split, train=False)
        assert len(dataset) == size and dataset.tokenizer == {"vfm": "none", "fingerprint": "f" * 64}
        assert len(dataset._paths) == -(-size // 12)
        files = sorted((photos / split).glob("*/*"))
        for index in (0, 13, size - 1):
            mean = torch.from_numpy(np.array(Image.open(files[index]))).float().mean((0, 1)) / 127.5 - 1
            assert torch.allclose(dataset[index][0].flatten(), mean, atol=1e-4)
            assert dataset.labels[index] == index // (size // 13)
    assert json.loads((tmp_path / "z/val/latents.json").read_text())["num_images"] == 26


def test_an_interrupted_cache_goes_on(photos, tmp_path):
    cache(photos, tmp_path / "z")
    before = {path: path.read_bytes() for path in (tmp_path / "z").glob("*/*")}
    for name in (
        "train/latents_shard00002.safetensors",
        "train/latents_stats.pt",
        "val/latents_shard00000.safetensors",
    ):
        (tmp_path / "z" / name).unlink()
    kept = tmp_path / "z/train/latents_shard00001.safetensors"
    time = kept.stat().st_mtime_ns
    cache(photos, tmp_path / "z")
    assert kept.stat().st_mtime_ns == time
    assert {path: path.read_bytes() for path in (tmp_path / "z").glob("*/*")} == before


@pytest.mark.parametrize("name", ["latents_shard00001.safetensors", "latents.json"])
def test_damage_within_a_cache_is_named_before_anything_is_encoded(photos, tmp_path, name, monkeypatch):
    cache(photos, tmp_path / "z")
    file = tmp_path / "z/val" / name
    file.write_bytes(file.read_bytes()[:100])
    (tmp_path / "z/train/latents_shard00000.safetensors").unlink()
    monkeypatch.setattr(Encoder, "predict_step", lambda *_: pytest.fail("encoded"))
    with pytest.raises(ValueError, match=rf"^directory: '.*z/val/{name}' can't be read as .*: it is ") as error:
        cache(photos, tmp_path / "z")
    assert "\n" not in str(error.value)


def test_samples_that_were_cut_are_named(photos, tmp_path):
    data = photos_data(photos, num_samples=12)
    predict(Painter(photos, predict="latents"), data, SampleWriter(str(tmp_path / "z")), folder=tmp_path)
    file = next((tmp_path / "z").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(
        ValueError, match=r"^directory: '.*' can't be read as weights: it is a safetensors file cut short"
    ):
        predict(Painter(photos, predict="latents"), data, SampleWriter(str(tmp_path / "z")), folder=tmp_path)


def test_another_tokenizer_may_not_add_to_a_cache(photos, tmp_path):
    cache(photos, tmp_path / "z")
    module = Encoder()
    module.fingerprint = "e" * 64
    with pytest.raises(ValueError, match=r"holds what was made otherwise: tokenizer was"):
        cache(photos, tmp_path / "z", module)
    module.predict = "reconstructions"
    with pytest.raises(ValueError, match=r"model\.predict: a cache takes 'latents' or 'moments'"):
        cache(photos, tmp_path / "y", module)


def test_a_damaged_image_is_left_out_of_a_cache(photos, tmp_path):
    import shutil

    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    damaged = sorted((root / "train").glob("*/*"))[17]
    damaged.write_bytes(b"nothing")
    data = ImageNetDataModule(
        root, image_size=64, val_batch_size=5, num_workers=0, predict=["train"], max_bad_fraction=0.1
    )
    predict(Encoder(), data, LatentWriter(str(tmp_path / "z"), shard_size=12), folder=tmp_path)
    shards = [load_file(path) for path in sorted((tmp_path / "z/train").glob("*.safetensors"))]
    assert [len(shard["index"]) for shard in shards] == [12, 11, 12, 12, 4]
    assert torch.cat([shard["index"] for shard in shards]).tolist() == [i for i in range(52) if i != 17]


def test_settings_are_kept_and_compared(tmp_path, trainer):
    keep_settings(trainer(), tmp_path / "a/settings.json", {"seed": 1, "size": (2, 3)})
    keep_settings(trainer(), tmp_path / "a/settings.json", {"seed": 1, "size": (2, 3)})
    with pytest.raises(ValueError, match="seed was 1, now 2"):
        keep_settings(trainer(), tmp_path / "a/settings.json", {"seed": 2, "size": (2, 3)})
    with pytest.raises(ValueError, match=r"holds what was made otherwise: precision was None, now 'high'\. Choose an"):
        keep_settings(trainer(), tmp_path / "a/settings.json", {"seed": 1, "size": (2, 3), "precision": "high"})
