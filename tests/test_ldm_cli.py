"""The chain of commands from images to samples, at toy size: tokenizer, latents, diffusion model, samples."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import Ended
from command_line import run as run_here
from safetensors import safe_open
from test_cli import DEMO, ROOT, SMALL, run

from vfm_vae.data.folder import ImageFolderDataset
from vfm_vae.data.latents import LatentStatistics
from vfm_vae.data.sampling import IndexedNoise
from vfm_vae.data.transforms import CentreCrop
from vfm_vae.images import from_uint8
from vfm_vae.tokenizer import FrozenTokenizer

LDM_DEMO = ["-c", str(ROOT / "configs/demo/ldm.yaml")]
SMALL_LDM = """
model:
  model: {init_args: {in_channels: 4, depth: 2, width: 32, num_heads: 2}}
  sampler: {init_args: {steps: 4}}
  tokenizer: {init_args: {checkpoint: runs/small/checkpoints/last.ckpt}}
data: {root: latents, batch_size: 8, val_batch_size: 10}
trainer:
  max_steps: 9
  val_check_interval: 5
  logger:
    class_path: lightning.pytorch.loggers.TensorBoardLogger
    init_args: {save_dir: runs, name: ldm, version: ""}
  callbacks:
  - class_path: callbacks.ema.EMA
    init_args: {decay: 0.9}
  - class_path: callbacks.distribution.DistributionCallback
    init_args:
      network: {class_path: vfm_vae.vfm.FrozenVFM, init_args: {name: vit_photos_patch8_64}}
      num_images: 10
      reference: photos/train
      image_size: 64
  - class_path: callbacks.images.SampleImages
    init_args: {classes: [0, 1], num_images: 2, guidance_scales: [1.0, 2.0]}
  - class_path: callbacks.report.Report
  - class_path: lightning.pytorch.callbacks.ModelCheckpoint
    init_args: {save_last: true, every_n_train_steps: 1, enable_version_counter: false}
"""
LATENTS = """
model: {predict: latents}
data: {predict: [train, val]}
trainer:
  callbacks+:
  - class_path: callbacks.writers.LatentWriter
    init_args: {directory: latents, shard_size: 20}
"""


def ldm(folder: Path, *arguments: str) -> Ended:
    return run_here(folder, "ldm", *arguments)


def small_ldm(command: str, *options: str) -> list[str]:
    return [command, *LDM_DEMO, "-c", "ldm.yaml", *options]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    """A folder with a trained tokenizer and its latents, by the command line."""
    folder = tmp_path_factory.mktemp("chain")
    (folder / "photos").symlink_to(photos)
    for name, text in (("small", SMALL), ("ldm", SMALL_LDM), ("latents", LATENTS)):
        (folder / f"{name}.yaml").write_text(text)
    code, _, err = run(folder, "fit", *DEMO, "-c", "small.yaml", "--model.max_images=8")
    assert code == 0, err
    last = "runs/small/checkpoints/last.ckpt"
    code, _, err = run(folder, "predict", "-c", "runs/small/config.yaml", "-c", "latents.yaml", "--ckpt_path", last)
    assert code == 0, err
    return folder


def test_fit_validate_predict(chain: Path):
    code, _, err = ldm(chain, *small_ldm("fit"))
    assert code == 0, err
    stored = torch.load(chain / "runs/ldm/checkpoints/last.ckpt", weights_only=True)
    assert stored["images_seen"] == 72
    assert stored["tokenizer"] == json.loads((chain / "latents/train/latents.json").read_text())["tokenizer"]
    assert (chain / "runs/ldm/images/samples_guidance_2.png").is_file()

    trained = ["-c", "runs/ldm/config.yaml", "--ckpt_path", "runs/ldm/checkpoints/last.ckpt"]
    code, out, err = ldm(chain, "validate", *trained)
    assert code == 0, err
    metrics = json.loads((chain / "runs/ldm/metrics.json").read_text())["run"]["metrics"]
    assert metrics["val/loss"] > 0 and metrics["val/fd_vit_photos_patch8_64/train"] > 0
    assert "val/loss" in out

    writer = "--trainer.callbacks+=callbacks.samples.SampleWriter"
    options = ["--trainer.callbacks.npz=true", "--data.num_samples=13"]
    for name, batch, precision in (("a", 13, "high"), ("b", 4, "highest")):
        where = [f"--trainer.callbacks.directory={name}", f"--data.val_batch_size={batch}"]
        where += [] if precision == "high" else [f"--matmul_precision={precision}"]
        code, _, err = ldm(chain, "predict", *trained, writer, *where, *options)
        assert code == 0, err
        assert json.loads((chain / name / "samples.json").read_text())["matmul_precision"] == precision
    with np.load(chain / "a.npz") as a, np.load(chain / "b.npz") as b:
        assert a["arr_0"].shape == (13, 64, 64, 3)
        assert np.abs(a["arr_0"].astype(int) - b["arr_0"]).max() <= 1
        assert a["arr_1"].tolist() == b["arr_1"].tolist() == list(range(13))


INCEPTION = '{"class_path": "vfm_vae.metrics.inception.Inception", "init_args": {"weights": "nowhere.pth"}}'
EMBEDDED = '{"class_path": "vfm_vae.vfm.FrozenVFM", "init_args": {"name": "vit_photos_patch8_64"}}'
MISTAKES = {
    "no such latents": (["--data.root=nowhere"], "root: no latents (*.safetensors) in 'nowhere/train'; make one with"),
    "wrong channels": (
        ["--model.tokenizer=null", "--model.model.init_args.in_channels=8"],
        "are (4, 8, 8) (channels, rows, columns), but model.in_channels and input_size say (8, 8, 8)",
    ),
    "another tokenizer": (["--data.root=foreign"], "the latents in 'foreign/train' are of another tokenizer"),
    "no such tokenizer": (
        ["--model.tokenizer.init_args.checkpoint=nowhere.ckpt"],
        "checkpoint: there is no tokenizer at 'nowhere.ckpt'",
    ),
    "no tokenizer's checkpoint": (
        ["--model.tokenizer.init_args.checkpoint=foreign/other.ckpt"],
        "'foreign/other.ckpt' is not a tokenizer's: give a checkpoint that `python -m vfm_vae fit` wrote",
    ),
    "no Inception": (
        ["--trainer.callbacks+=callbacks.distribution.DistributionCallback", "--trainer.callbacks.network", INCEPTION],
        "weights: there is no file 'nowhere.pth'; give the file of Inception",
    ),
    "no reference": (
        [
            "--trainer.callbacks+=callbacks.distribution.DistributionCallback",
            "--trainer.callbacks.network",
            EMBEDDED,
            "--trainer.callbacks.reference=nowhere.npz",
        ],
        "reference: nothing at 'nowhere.npz'; give a folder",
    ),
    "no such precision": (["--matmul_precision=low"], "['highest', 'high', 'medium']. Got value: low"),
    "misspelt key": (["--model.cosine_wait=3"], "--model.cosine_wait"),
}


# What `test_cli`, `test_compare` and `test_read_checkpoints` find, too.
ALSO = {"no such tokenizer", "no tokenizer's checkpoint", "no Inception", "no such precision", "misspelt key"}


@pytest.mark.parametrize(
    "mistake", [pytest.param(name, marks=pytest.mark.slow if name in ALSO else []) for name in MISTAKES]
)
def test_a_mistake_ends_with_one_line(chain: Path, mistake: str):
    foreign = chain / "foreign"
    if not foreign.exists():
        shutil.copytree(chain / "latents", foreign)
        file = foreign / "train/latents.json"
        identity = json.loads(file.read_text())
        identity["tokenizer"]["fingerprint"] = "0" * 64
        file.write_text(json.dumps(identity))
        torch.save({"state_dict": {}}, foreign / "other.ckpt")
    options, message = MISTAKES[mistake]
    code, _, err = ldm(chain, *small_ldm("fit", *options))
    assert code == 2, err
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert len(line) < 400


def test_help_shows_our_options(chain: Path):
    code, out, _ = ldm(chain, "fit", "--help")
    assert code == 0
    assert "--model.label_drop" in out and "--data.num_samples" in out
    assert "torchvision" not in out


def test_the_frozen_tokenizer_is_the_one_that_made_the_cache(chain: Path):
    path = chain / "runs/small/checkpoints/last.ckpt"
    tokenizer, stored = FrozenTokenizer(str(path)), torch.load(path, weights_only=True)
    weights = tokenizer.network.state_dict()
    assert all(torch.equal(weights[name.removeprefix("model.")], w) for name, w in stored["ema"]["weights"].items())
    assert not list(tokenizer.parameters()) and not tokenizer.state_dict()
    assert not any(p.requires_grad for p in tokenizer.network.parameters()) and not tokenizer.network.training
    assert tokenizer.identity == json.loads((chain / "latents/train/latents.json").read_text())["tokenizer"]

    photos = ImageFolderDataset(chain / "photos", "val", CentreCrop(64))
    images, index = from_uint8(torch.stack([photos[i][0] for i in range(4)])), torch.arange(4)
    noise = IndexedNoise("posterior", 0, index)
    z, mirrored = (tokenizer.encode(view).sample(noise.normal(4, 8, 8)) for view in (images, images.flip(3)))
    cache = safe_open(chain / "latents/val/latents_shard00000.safetensors", "pt")
    assert torch.allclose(z, cache.get_tensor("latents")[:4], atol=1e-4)
    assert torch.allclose(mirrored, cache.get_tensor("latents_flip")[:4], atol=1e-4)
    assert tokenizer.decode(z).shape == (4, 3, 64, 64) and tokenizer.decode(z).abs().max() <= 1


def test_images_encoded_on_the_fly(chain: Path):
    images = ["--data.root=photos", "--data.source=photos", "--data.image_size=64", "--data.crop=centre"]
    images += ["--data.photos={size: 64, train_per_class: 4, val_per_class: 2}", "--trainer.callbacks=null"]
    images += ["--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint", "--trainer.callbacks.dirpath=fly"]
    images += ["--trainer.callbacks.every_n_train_steps=1", "--trainer.max_steps=2", "--trainer.logger=false"]
    code, _, err = ldm(chain, *small_ldm("fit", *images))
    assert code == 0, err
    (path,) = (chain / "fly").glob("*.ckpt")
    stored = torch.load(path, weights_only=True)
    assert stored["images_seen"] == 16
    cached = LatentStatistics.read(chain / "latents/train")
    mean, std = (stored["state_dict"][f"normalization.{name}"] for name in ("mean", "std"))
    assert torch.allclose(mean, cached.mean, atol=0.2 * cached.std.max())
    assert torch.allclose(std, cached.std, rtol=0.2)
    # A model that was trained on images takes the cache of the same tokenizer, too.
    code, _, err = ldm(chain, *small_ldm("validate", "--trainer.callbacks=null", f"--ckpt_path={path}"))
    assert code == 0, err
