"""Tokenizers in a file of their own: trained, measured, cached, and decoded with, by the command line."""

import importlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import run

from ldm.pipeline import LatentDiffusion
from vfm_vae.data.latents import LatentDataset
from vfm_vae.losses.objective import Objective
from vfm_vae.pretrained_tokenizer import PretrainedTokenizer
from vfm_vae.tokenizer import VFMVAE, FrozenTokenizer
from vfm_vae.types import Decoded

HERE = Path(__file__).parent
SHORT = ["--trainer.max_steps=2", "--trainer.limit_val_batches=0"]
LAST = "runs/conv/checkpoints/last.ckpt"
TOKENIZER = """
seed_everything: 0
run: {name: conv}
model:
  model: {class_path: conv_vae.OwnVAE, init_args: {channels: 4}}
  discriminator: {backbone: vit_photos_patch8_64, size: 64, layers: [2]}
  objective: {multi_resolution: 0.0, alignment: 0.0, adversarial: 0.1}
  optimizer: {class_path: Adam, init_args: {lr: 0.002}}
  discriminator_optimizer: {class_path: Adam, init_args: {lr: 0.002}}
  equivariance: {probability: 0.5, prior_probability: 0.1}
data: {root: photos, image_size: 64, batch_size: 8, val_batch_size: 26, num_workers: 0}
trainer:
  accelerator: cpu
  max_steps: 6
  log_every_n_steps: 1
  enable_progress_bar: false
  callbacks:
  - {class_path: EMA, init_args: {decay: 0.5}}
  - {class_path: ReconstructionImages, init_args: {num_images: 2}}
  - {class_path: ModelCheckpoint, init_args: {save_last: true, enable_version_counter: false}}
  - Report
"""
DIFFUSION = """
seed_everything: 0
run: {name: diffusion}
model:
  model: {class_path: LightningDiT, init_args: {in_channels: 4, input_size: 8, depth: 1, width: 24, num_heads: 2,
    num_classes: 13}}
  optimizer: {class_path: AdamW, init_args: {lr: 0.001}}
  sampler: {class_path: Euler, init_args: {steps: 2}}
  tokenizer: {checkpoint: converted, tokenizer_class: conv_vae.OwnVAE}
data: {root: latents, source: latents, batch_size: 8, val_batch_size: 26, num_workers: 0}
trainer:
  accelerator: cpu
  max_steps: 3
  log_every_n_steps: 1
  enable_progress_bar: false
  callbacks:
  - {class_path: ModelCheckpoint, init_args: {save_last: true, enable_version_counter: false}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, photos):
    """Where the tokenizer was trained."""
    folder = tmp_path_factory.mktemp("another_tokenizer")
    shutil.copy(HERE / "conv_vae.py", folder)
    (folder / "tokenizer.yaml").write_text(TOKENIZER)
    (folder / "diffusion.yaml").write_text(DIFFUSION)
    (folder / "photos").symlink_to(photos)
    importlib.invalidate_caches()
    succeed(folder, "vfm_vae", "fit", "-c", "tokenizer.yaml")
    return folder


@pytest.fixture(autouse=True)
def importable(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))


def succeed(folder, program, *arguments):
    ended = run(folder, program, *arguments)
    assert ended.code == 0, ended.err


def read(path, **options):
    return FrozenTokenizer(str(path), tokenizer_class=importlib.import_module("conv_vae").OwnVAE, **options)


def test_it_is_trained_and_measured(folder):
    assert (folder / "runs/conv/images/val.png").is_file()
    succeed(folder, "vfm_vae", "test", "-c", "tokenizer.yaml", "--ckpt_path", LAST)
    entries = json.loads((folder / "runs/conv/metrics.json").read_text()).values()
    metrics, settings = [[entry[part] for entry in entries][-1] for part in ("metrics", "settings")]
    assert np.isfinite(metrics["test/psnr"]) and settings["model"]["tokenizer"]["tokenizer"] == "OwnVAE"


def test_diffusion_trains_on_its_latents_and_it_decodes(folder):
    options = ["--model.predict=latents", "--data.predict=[train,val]"]
    options += ["--trainer.callbacks=[{class_path: LatentWriter, init_args: {directory: latents}}, EMA]"]
    succeed(folder, "vfm_vae", "predict", "-c", "tokenizer.yaml", *options, "--ckpt_path", LAST)
    succeed(folder, "vfm_vae.convert", LAST, "--out", "converted")
    tokenizer = read(folder / "converted")
    assert tokenizer.identity == LatentDataset(folder / "latents/val", train=False).tokenizer

    succeed(folder, "ldm", "fit", "-c", "diffusion.yaml")
    checkpoint = "runs/diffusion/checkpoints/last.ckpt"
    writer = "--trainer.callbacks=[{class_path: SampleWriter, init_args: {npz: true, directory: samples}}]"
    succeed(folder, "ldm", "predict", "-c", "diffusion.yaml", "--ckpt_path", checkpoint, "--data.num_samples=3", writer)
    with np.load(folder / "samples.npz") as samples:
        assert samples["arr_0"].shape == (3, 64, 64, 3)
    model = LatentDiffusion.from_checkpoint(folder / checkpoint, tokenizer=folder / LAST)
    assert type(model.tokenizer.network).__name__ == "OwnVAE"
    assert model.sample([0, 1]).images.shape == (2, 3, 64, 64)

    other = type(tokenizer.network)(channels=4)  # of the same class and shape, with other weights
    with pytest.raises(ValueError, match=r"tokenizer: it is of another tokenizer \(OwnVAE, .*expected \(OwnVAE"):
        model.use_tokenizer(other)
    other.save_pretrained(folder / "other")
    ended = run(folder, "ldm", "fit", "-c", "diffusion.yaml", "--model.tokenizer.checkpoint=other")
    assert ended.code == 2 and "data.root: the latents in 'latents/train' are of another tokenizer" in ended.err


def test_checkpoints_and_folders_bring_it_back(folder, tmp_path, monkeypatch):
    model = PretrainedTokenizer.from_checkpoint(folder / LAST)
    assert type(model) is importlib.import_module("conv_vae").OwnVAE and model.vfm is None
    model.save_pretrained(tmp_path)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    expected = model.decode(model.encode(images).mode()).image.clamp(-1, 1)
    for again in (FrozenTokenizer(str(folder / LAST)), read(tmp_path)):
        assert again.identity == model.latent_identity()
        assert torch.equal(again.decode(again.encode(images).mode()), expected)
    with pytest.raises(ValueError, match="OwnVAE, and no VFMVAE"):
        VFMVAE.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="vfm_weights: OwnVAE does not encode with a VFM"):
        read(tmp_path, vfm_weights="weights.pth")
    monkeypatch.delitem(sys.modules, "conv_vae")  # a folder alone has nothing imported
    message = r"checkpoint: .* asks for \['conv_vae.OwnVAE'\], but only classes of this project .*tokenizer_class\)$"
    with pytest.raises(ValueError, match=message):
        FrozenTokenizer(str(tmp_path))


def test_losses_of_what_it_lacks_are_refused(folder):
    options = ["--model.objective.alignment=5", "--run.name=refused"]
    ended = run(folder, "vfm_vae", "fit", "-c", "tokenizer.yaml", *options)
    assert ended.code == 2
    assert "objective.alignment: 5 aligns latents to a VFM, but this OwnVAE has none; set it to 0" in ended.err
    images, objective = torch.zeros(1, 3, 8, 8), Objective(alignment=0.0)
    with pytest.raises(ValueError, match=r"objective\.multi_resolution: the tokenizer decodes only one resolution"):
        objective.reconstruction(Decoded(images, ()), images, "bicubic", images_seen=0)
    certain = type("Certain", (), {"mode": None, "sample": None, "moments": None})()
    with pytest.raises(ValueError, match=r"objective\.kl: .* set it to 0"):
        objective.latent(certain, images, None, None, torch.zeros(()))


def test_latents_are_aligned_to_a_vfm_that_does_not_encode(folder):
    vfm = "{class_path: FrozenVFM, init_args: {name: vit_photos_patch8_64}}"
    options = ["--run.name=aligned", "--model.model=conv_vae.AlignedVAE", f"--model.model.init_args.vfm={vfm}"]
    options += ["--model.objective.alignment=0.5", "--model.objective.distmat_margin=0.25", *SHORT]
    succeed(folder, "vfm_vae", "fit", "-c", "tokenizer.yaml", *options)
    path = folder / "runs/aligned/checkpoints/last.ckpt"
    stored = torch.load(path, weights_only=True)
    assert stored["vfm"]["name"] == "vit_photos_patch8_64" and not any("vfm." in n for n in stored["state_dict"])
    model = PretrainedTokenizer.from_checkpoint(path)
    assert model.vfm is None and model.vfm_source()["name"] == "vit_photos_patch8_64"  # not needed for latents
    options = ["--run.name=next", "--model.model=conv_vae.AlignedVAE", f"--model.init_from={path}", *SHORT]
    succeed(folder, "vfm_vae", "fit", "-c", "tokenizer.yaml", *options)  # without the VFM
    assert torch.load(folder / "runs/next/checkpoints/last.ckpt", weights_only=True)["images_seen"] == 32
