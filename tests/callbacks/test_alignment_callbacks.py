"""What models keep of what VFMs know: CKNNA of blocks and of transformed images, robustness, linear probes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from torch import nn

from callbacks.cknna import CKNNACallback
from callbacks.evaluation import rows_of
from callbacks.heatmap import block_heat_map
from callbacks.probe import LinearProbeCallback
from callbacks.report import Report
from callbacks.robustness import RobustnessCallback
from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.data.folder import ImageFolderDataset
from vfm_vae.data.images import ImageDataset
from vfm_vae.data.transforms import CentreCrop
from vfm_vae.images import from_uint8
from vfm_vae.metrics.alignment import cknna, prepare_features
from vfm_vae.metrics.probe import LinearProbe
from vfm_vae.metrics.semantic import geometric, names_of, transformed
from vfm_vae.types import Batch, LatentBatch
from vfm_vae.vfm import FrozenVFM

VFM = "vit_photos_patch8_64"


class Encoder(LightningModule):
    """Latents are average colours; "blocks" are those at some noise."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Conv2d(3, 6, 8, stride=8)
        self.images_seen = 0

    def latents(self, batch):
        return self.project(from_uint8(batch.images))

    def alignment_features(self, batch, time=None):
        if isinstance(batch, LatentBatch):
            noisy = (
                batch.latents
                + (1 - (0.5 if time is None else time)) * torch.sin(batch.index * 9.0)[:, None, None, None]
            )
            return {"block_01": noisy.flatten(1), "block_02": noisy.mean((2, 3))}
        return {"latent": self.latents(batch).mean((2, 3))}

    def training_step(self, batch, batch_idx):
        self.images_seen += len(batch.labels)
        return self.project.weight.square().sum()

    def validation_step(self, batch, batch_idx):
        pass

    test_step = validation_step

    def evaluation_settings(self):
        return {"seed": 3}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


@pytest.fixture
def encoder():
    return Encoder()


@pytest.fixture
def vfm():
    return FrozenVFM(VFM)


@pytest.fixture
def images(photos):
    return ImageNetDataModule(photos, image_size=64, batch_size=16, val_batch_size=7, num_workers=0)


@pytest.fixture
def val_batch(photos):
    return whole(ImageFolderDataset(photos, "val", CentreCrop(64)))


def whole(dataset):
    pixels = torch.stack([dataset[i][0] for i in range(len(dataset))])
    return Batch(pixels, torch.from_numpy(dataset.labels), torch.arange(len(dataset)))


class Latents(ImageNetDataModule):
    """The photographs' latents: average colours of 8x8 pixels."""

    def val_dataloader(self):
        dataset = ImageFolderDataset(self.root, "val", CentreCrop(64))
        rows = [(F.avg_pool2d(from_uint8(image[None]), 16)[0], label, i) for image, label, i in dataset]
        return torch.utils.data.DataLoader(
            rows, 7, collate_fn=lambda s: LatentBatch(*torch.utils.data.default_collate(s))
        )

    test_dataloader = val_dataloader


def align(features, vfm, images, k=5):
    reference = prepare_features(vfm(from_uint8(images)).tokens.mean(1))
    return cknna(prepare_features(features), reference, k).item()


def test_se_cknna_compares_transformed_images_with_clean_references(encoder, images, trainer, vfm, val_batch):
    run = trainer(CKNNACallback([vfm], k=5, se_cknna="each"))
    run.test(encoder, images, verbose=False)
    logged = {name: value.item() for name, value in run.callback_metrics.items()}
    with torch.no_grad():
        for name, [(_, pixels)] in transformed("each", val_batch.images, val_batch.index).items():
            features = encoder.latents(val_batch._replace(images=pixels)).mean((2, 3))
            expected = align(features, vfm, val_batch.images)
            assert logged[f"test/se_cknna/latent/{name}"] == pytest.approx(expected, abs=1e-5), name
    single = [logged[f"test/se_cknna/latent/{name}"] for name in names_of("each")]
    assert logged["test/se_cknna/latent/mean"] == pytest.approx(np.mean(single), abs=1e-6)
    assert logged["test/se_cknna/latent/scale_1"] == pytest.approx(logged["test/cknna/latent"], abs=1e-6)
    assert logged["test/se_cknna/latent_transformed/rotation_90"] == pytest.approx(
        logged["test/cknna/latent"], abs=1e-4
    )


@pytest.fixture
def numbered(photos, tmp_path):
    """The photographs, whose file names say that those of later classes come first."""
    for split in ("train", "val"):
        for number, file in enumerate(sorted((photos / split).glob("*/*"))):
            folder = tmp_path / "numbered" / split / file.parent.name
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, folder / f"ILSVRC2012_val_{99 - number:08d}{file.suffix}")
    return tmp_path / "numbered"


def test_se_cknna_by_the_published_protocol(encoder, numbered, trainer, vfm):
    run = trainer(CKNNACallback([vfm], k=5, se_cknna="published", num_images=13))
    data = ImageNetDataModule(numbered, image_size=64, batch_size=16, val_batch_size=7, num_workers=0)
    run.validate(encoder, data, verbose=False)
    val_batch = whole(data.val_set)
    chosen = val_batch.index * 13 % 26 < 13
    part = rows_of(val_batch, chosen)
    stems = [Path(data.val_set.name(i)).stem for i in part.index.tolist()]
    number = torch.tensor([sorted(stems).index(stem) for stem in stems])
    assert stems != sorted(stems) and sorted(number.tolist()) == list(range(13))
    features = torch.zeros(13, 6)
    with torch.no_grad():
        for rows, pixels in transformed("published", part.images, number)["equivariance"]:
            features[rows] = encoder.latents(part._replace(images=pixels)).mean((2, 3))
    expected = align(features, vfm, part.images)
    assert run.callback_metrics["val/se_cknna/latent/equivariance"].item() == pytest.approx(expected, abs=1e-5)
    with torch.no_grad():  # of the latents in the same way
        latents = encoder.latents(part)
        for rows, maps in geometric("published", latents, number)["equivariance"]:
            features[rows] = maps.mean((2, 3))
    expected = align(features, vfm, part.images)
    logged = run.callback_metrics["val/se_cknna/latent_transformed/equivariance"].item()
    assert logged == pytest.approx(expected, abs=1e-5)
    assert "val/se_cknna/latent/noise_0.20" in run.callback_metrics
    assert "val/se_cknna/latent_transformed/noise_0.20" not in run.callback_metrics
    assert "val/se_cknna/latent/mean" not in run.callback_metrics


def test_images_without_names_are_numbered_in_their_order(encoder, val_batch, trainer, vfm):
    rows = list(zip(val_batch.images, val_batch.labels.tolist(), range(26), strict=True))
    loader = torch.utils.data.DataLoader(rows, 7, collate_fn=ImageDataset.collate)
    run = trainer(CKNNACallback([vfm], k=5, se_cknna="published", num_images=13))
    run.validate(encoder, loader, verbose=False)
    part = rows_of(val_batch, slice(None, None, 2))
    with torch.no_grad():
        features = torch.zeros(13, 6)
        for rows, pixels in transformed("published", part.images, torch.arange(13))["equivariance"]:
            features[rows] = encoder.latents(part._replace(images=pixels)).mean((2, 3))
    expected = align(features, vfm, part.images)
    assert run.callback_metrics["val/se_cknna/latent/equivariance"].item() == pytest.approx(expected, abs=1e-5)


def test_blocks_are_compared_with_the_images_of_latents(encoder, photos, trainer, vfm, val_batch):
    callback = CKNNACallback([vfm], k=5, times=[0.25, 1.0], images=str(photos / "val"), image_size=64)
    run = trainer(callback)
    data = Latents(photos)
    run.validate(encoder, data, verbose=False)
    pooled = F.avg_pool2d(from_uint8(val_batch.images), 16)
    logged = run.callback_metrics
    expected = align(pooled.flatten(1), vfm, val_batch.images)
    assert logged["val/cknna/block_01/t1"].item() == pytest.approx(expected, abs=1e-5)
    assert logged["val/cknna/block_01/t0.25"] < logged["val/cknna/block_01/t1"]
    assert callback.settings()["times"] == [0.25, 1.0]
    with pytest.raises(ValueError, match="images: the data holds latents"):
        trainer(CKNNACallback([vfm], k=5)).validate(encoder, data, verbose=False)
    with pytest.raises(ValueError, match="holds 52 images, but the data 26"):
        trainer(CKNNACallback([vfm], k=5, images=str(photos / "train"))).validate(encoder, data, verbose=False)
    with pytest.raises(ValueError, match=r"times: must be in \[0, 1\]"):
        CKNNACallback([vfm], times=[250])


class Watched(Latents):
    def train_dataloader(self):
        return torch.utils.data.DataLoader(list(self.val_dataloader()), batch_size=None)


def test_blocks_along_training_become_a_heat_map(encoder, photos, trainer, vfm, tmp_path):
    options = {"k": 5, "images": str(photos / "val"), "image_size": 64}
    logger = TensorBoardLogger(tmp_path, name="run", version="")
    watch = {"val_check_interval": 2, "max_steps": 8, "logger": logger, "enable_checkpointing": False}
    callback = CKNNACallback([vfm], every_n_images=20, **options)
    run = trainer(callback, **watch)
    seen = []
    hook = vfm.register_forward_hook(lambda module, args, features: seen.append(len(args[0])))
    run.fit(encoder, Watched(photos))
    hook.remove()
    assert sum(seen) == 26  # in two validations: the reference's features stay the same
    first, second = (entry["values"] for entry in callback._history)
    assert second == pytest.approx(first, abs=1e-6)  # and so do these latents
    assert [entry["images_seen"] for entry in callback._history] == [14, 40]  # not at 26, which came too soon
    picture = Image.open(tmp_path / "run/images/cknna_blocks.png")
    assert picture.width > 200 and np.asarray(picture).std() > 20
    run.save_checkpoint(tmp_path / "last.ckpt")
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    again = CKNNACallback([vfm], every_n_images=20, **options)
    again.load_state_dict(stored["callbacks"][again.state_key])
    assert again._history == callback._history
    assert again.state_key != CKNNACallback([vfm], times=[0.3], **options).state_key


def test_a_heat_map_shows_what_it_is_given():
    dark = block_heat_map(torch.tensor([[0.0, 0.1], [0.1, 0.0]]), [0, 9], "t").float()
    other = block_heat_map(torch.tensor([[0.1, 0.0], [0.0, 0.1]]), [0, 9], "t").float()
    assert (other - dark).abs().mean() > 1
    assert block_heat_map(torch.full((28, 40), torch.nan), range(40), "t").dtype == torch.uint8


def test_robustness_is_the_cosine_to_the_clean_features(encoder, images, trainer, vfm, val_batch):
    run = trainer(RobustnessCallback([vfm]))
    run.validate(encoder, images, verbose=False)
    logged = {name.removeprefix("val/robustness/"): value.item() for name, value in run.callback_metrics.items()}
    noisy = transformed("each", val_batch.images, val_batch.index)["noise_0.20"][0].maps
    tokens = [vfm(from_uint8(pixels)).tokens.mean(1) for pixels in (val_batch.images, noisy)]
    expected = F.cosine_similarity(*tokens).mean().item()
    assert logged[f"{VFM}/noise_0.20"] == pytest.approx(expected, abs=1e-5)
    parts = [value for name, value in logged.items() if name.startswith("latent/") and not name.endswith("mean")]
    assert len(parts) == 10 and logged["latent/mean"] == pytest.approx(np.mean(parts), abs=1e-6)
    assert logged["latent/noise_0.05"] > logged["latent/noise_0.20"]


def test_probe_is_fitted_to_training_images(encoder, images, trainer, vfm, photos, val_batch):
    run = trainer(LinearProbeCallback([vfm], num_train_images=39))
    run.validate(encoder, images, verbose=False)
    train = ImageFolderDataset(photos, "train", CentreCrop(64))
    chosen = [i for i in range(52) if i * 39 % 52 < 39]
    pixels, labels = torch.stack([train[i][0] for i in chosen]), torch.from_numpy(train.labels[chosen])
    probe = LinearProbe(vfm(from_uint8(pixels)).tokens.mean(1), labels)
    expected = (probe.predict(vfm(from_uint8(val_batch.images)).tokens.mean(1)) == val_batch.labels).float().mean()
    assert run.callback_metrics[f"val/probe/{VFM}"].item() == pytest.approx(expected.item(), abs=0.04)
    assert 0 <= run.callback_metrics["val/probe/latent"] <= 1
    with pytest.raises(ValueError, match="num_train_images: must be at least 2"):
        LinearProbeCallback(num_train_images=1)


def test_report_says_what_numbers_depend_on(encoder, images, trainer, vfm, tmp_path, capsys):
    path = tmp_path / "metrics.json"
    run = trainer(CKNNACallback([vfm], num_images=13, k=5), RobustnessCallback(), Report(str(path), "test"))
    run.test(encoder, images, verbose=False)
    entry = json.loads(path.read_text())["test"]
    assert entry["settings"]["model"] == {"seed": 3}
    assert entry["settings"]["CKNNACallback"]["num_images"] == 13
    seen = {"input_scale": 1.0, "antialias": False, "antialias_positions": False, "precision": "bfloat16"}
    assert entry["settings"]["CKNNACallback"]["vfms"] == {VFM: {"weights": vfm.fingerprint(), **seen}}
    assert entry["settings"]["data"] == {"image_size": 64, "evaluation_crop": "adm"}
    assert entry["settings"]["RobustnessCallback"]["num_images"] == 26
    shown = capsys.readouterr().out
    assert "CKNNACallback.num_images" in shown and "test/cknna/latent" in shown


def test_report_says_so_during_training_too(encoder, photos, trainer, vfm, tmp_path):
    path = tmp_path / "metrics.json"
    data = ImageNetDataModule(
        photos, image_size=64, batch_size=13, val_batch_size=7, num_workers=0, evaluation_crop="resize"
    )
    report, callback = Report(str(path)), CKNNACallback([vfm], k=5)
    run = trainer(report, callback, val_check_interval=2, max_steps=3, limit_val_batches=3, num_sanity_val_steps=1)
    run.fit(encoder, data)
    settings = json.loads(path.read_text())["run"]["settings"]
    assert settings["model"] == {"seed": 3} and "checkpoint" not in settings
    assert settings["CKNNACallback"]["num_images"] == 21  # though the report comes before it
    assert settings["data"] == {"image_size": 64, "evaluation_crop": "resize"}


class EncoderWithVFM(Encoder):
    """One that has a VFM of its own."""

    def __init__(self):
        super().__init__()
        self.own = FrozenVFM(VFM, layers=(2, -1))

    @property
    def vfm(self):
        return self.own


def test_without_vfms_callbacks_take_the_modules_own(images, trainer, vfm):
    """Nothing is loaded anew, and the numbers are those of a second copy."""

    def logged(*callbacks):
        run, module = trainer(*callbacks), EncoderWithVFM()
        run.test(module, images, verbose=False)
        return module, {name: value.item() for name, value in run.callback_metrics.items()}

    callbacks = CKNNACallback(k=5), RobustnessCallback(num_images=5), LinearProbeCallback(num_train_images=26)
    module, numbers = logged(*callbacks)
    assert all(callback.vfms == {VFM: module.vfm} for callback in callbacks)
    copies = CKNNACallback([vfm], k=5), RobustnessCallback([vfm], 5), LinearProbeCallback([vfm], 26)
    assert numbers == logged(*copies)[1] and f"test/probe/{VFM}" in numbers
    assert callbacks[0].state_key == copies[0].state_key
    module, _ = logged(*callbacks)  # another module's is taken for it
    assert all(callback.vfms == {VFM: module.vfm} for callback in callbacks)


def test_a_module_without_a_vfm_has_none_to_give(encoder, images, trainer):
    with pytest.raises(ValueError, match=r"^CKNNACallback\.vfms: Encoder has no VFM of its own here"):
        trainer(CKNNACallback()).test(encoder, images, verbose=False)
    probe = LinearProbeCallback(num_train_images=26)
    trainer(RobustnessCallback(num_images=5), probe).test(encoder, images, verbose=False)
    assert probe.vfms == {}


def test_a_probe_takes_no_vfm_where_there_are_latents_alone(photos, trainer):
    data = Latents(photos, image_size=64, num_workers=0)
    data.evaluation_dataloader = lambda split: data.val_dataloader()
    probe = LinearProbeCallback()
    run = trainer(probe)
    run.test(EncoderWithVFM(), data, verbose=False)
    assert probe.vfms == {} and "test/probe/block_01" in run.callback_metrics
    with pytest.raises(ValueError, match="so VFMs have no images to see; leave them out"):
        trainer(LinearProbeCallback([FrozenVFM(VFM)])).test(EncoderWithVFM(), data, verbose=False)
