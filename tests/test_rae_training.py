"""Training of RAE: its statistics, stages, and the way to diffusion models."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import run
from lightning.pytorch.callbacks import ModelCheckpoint
from small_rae import IMAGES, VFM, build, module, of_diffusers, reconstructed
from training import repeat, weights

from vfm_vae.data.latents import LatentDataset
from vfm_vae.images import from_uint8
from vfm_vae.pretrained_tokenizer import PretrainedTokenizer
from vfm_vae.rae import RAE

ROOT = Path(__file__).parents[1]


@pytest.fixture
def all_images(data):
    """The training images, as evaluation crops them."""
    datamodule = data(val_batch_size=26)
    datamodule.setup("fit")
    return torch.cat([from_uint8(batch.images) for batch in datamodule.spread_dataloader(100)])


def test_statistics_are_measured_before_the_first_step(data, trainer, all_images):
    means = []
    for asked, options in ((1000, {}), (52, {"num_workers": 1, "val_batch_size": 4})):  # there are no more than 52
        model = build(statistics_images=asked)
        trainer(max_steps=1, limit_val_batches=0).fit(module(model), datamodule=data(**options))
        with torch.no_grad():
            z = model.encode(all_images).mode()
        assert z.mean(0).abs().max() < 1e-5
        assert torch.allclose(z.std(0, correction=0), torch.ones(model.latent_shape), atol=1e-3)
        means.append(model.mean)
    assert torch.allclose(*means, atol=1e-6)
    some = build(statistics_images=10)
    trainer(max_steps=1, limit_val_batches=0).fit(module(some), datamodule=data())
    assert (some.mean - means[0]).abs().max() > 0.01


def test_statistics_come_with_images_alone(data, batch, trainer):
    with pytest.raises(ValueError, match=r"model\.statistics_images: 5 images are to be measured, but .* set 0"):
        trainer(max_steps=1).fit(module(build(statistics_images=5)), repeat(batch))
    model = build(statistics_images=0)
    trainer(max_steps=1, limit_val_batches=0).fit(module(model), datamodule=data())
    assert not model.mean.any() and (model.std == 1).all()


def test_later_stages_and_resumed_runs_keep_the_statistics(data, trainer, tmp_path, monkeypatch):
    save = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1, enable_version_counter=False)
    first = build(statistics_images=20)
    options = {"max_steps": 1, "limit_val_batches": 0}
    trainer(**options, enable_checkpointing=True, callbacks=[save]).fit(module(first), datamodule=data())
    path = str(tmp_path / "last.ckpt")
    monkeypatch.setattr(RAE, "take_statistics", lambda *_: pytest.fail("measured again"))
    resumed, later = build(seed=1, statistics_images=52), build(seed=2, statistics_images=52)
    trainer(max_steps=2, limit_val_batches=0).fit(module(resumed), datamodule=data(), ckpt_path=path)
    stored = torch.load(path, weights_only=True)
    converted = str(tmp_path / "converted.ckpt")  # as published weights are, which count no images
    torch.save(stored | {"images_seen": 0}, converted)
    trainer(max_steps=1, limit_val_batches=0).fit(module(later, init_from=converted), datamodule=data())
    assert first.mean.any() and torch.equal(resumed.mean, first.mean) and torch.equal(later.std, first.std)
    assert stored["vfm"]["name"] == VFM
    assert not any("vfm" in name or "network" in name for name in stored["state_dict"])
    read = PretrainedTokenizer.from_checkpoint(path)
    assert type(read) is RAE and read.latent_identity() == first.latent_identity()
    assert torch.equal(read.encode(IMAGES).mode(), first.encode(IMAGES).mode())


def test_a_batch_is_learnt_while_the_vfm_stays(batch):
    model = build(decoder_depth=2, decoder_width=64)
    vfm, images = weights(model.vfm.network), from_uint8(batch.images[:4])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = (model.decode(model.encode(images).sample()).image - images).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(torch.equal(tensor, vfm[name]) for name, tensor in model.vfm.network.state_dict().items())
    assert model.last_decoding_weight.grad is not None


def test_a_point_has_no_divergence(batch, trainer):
    with pytest.raises(ValueError, match=r"objective\.kl: .* has no KL divergence; set it to 0"):
        trainer(max_steps=1).fit(module(build(statistics_images=0), {"kl": 1e-6}), repeat(batch))


@pytest.mark.slow
def test_two_processes_measure_what_one_does(photos, tmp_path):
    (tmp_path / "measure.py").write_text(MEASURE)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "PYTHONPATH": f"{ROOT}:{ROOT}/tests",
    }
    for devices in (1, 2):
        command = [sys.executable, "measure.py", str(devices), str(photos)]
        subprocess.run(command, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, timeout=120, check=False)
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1_0", "2_0", "2_1"))
    for name in ("mean", "std"):
        assert torch.equal(first[name], second[name]) and torch.allclose(first[name], one[name], atol=1e-6)


MEASURE = """
import sys

import torch
from lightning.pytorch import Trainer
from small_rae import build, module
from vfm_vae.data.datamodule import ImageNetDataModule

devices = int(sys.argv[1])
model = build(statistics_images=11)  # the ranks' parts differ
run = Trainer(
    accelerator="cpu", devices=devices, max_steps=1, logger=False,
    strategy="ddp_find_unused_parameters_true" if devices > 1 else "auto",
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
)
data = ImageNetDataModule(sys.argv[2], image_size=64, batch_size=8, val_batch_size=4, num_workers=0)
run.fit(module(model), datamodule=data)
torch.save({"mean": model.mean, "std": model.std}, f"{devices}_{run.global_rank}.pt")
"""

TOKENIZER = """
seed_everything: 0
run: {name: rae}
model:
  model:
    class_path: RAE
    init_args:
      vfm: {class_path: FrozenVFM, init_args: {name: vit_photos_patch8_64, layers: [-2]}}
      image_size: 64
      decoder_width: 32
      decoder_depth: 1
      decoder_heads: 2
      decoder_mlp_width: 64
  discriminator: {backbone: vit_photos_patch8_64, size: 64, layers: [2]}
  objective: {multi_resolution: 0.0, alignment: 0.0, kl: 0.0, adversarial: 0.1}
  optimizer: {class_path: Adam, init_args: {lr: 0.002}}
  discriminator_optimizer: {class_path: Adam, init_args: {lr: 0.002}}
  equivariance: {probability: 0.5, prior_probability: 0.0}
data: {root: photos, image_size: 64, batch_size: 8, val_batch_size: 26, num_workers: 0, predict: [train, val]}
trainer:
  accelerator: cpu
  max_steps: 2
  log_every_n_steps: 1
  enable_progress_bar: false
  callbacks:
  - EMA
  - {class_path: ModelCheckpoint, init_args: {save_last: true, enable_version_counter: false}}
"""
DIFFUSION = """
seed_everything: 0
run: {name: diffusion}
model:
  model: {class_path: LightningDiT, init_args: {input_size: 8, depth: 1, width: 24, num_heads: 2, num_classes: 13}}
  optimizer: {class_path: AdamW, init_args: {lr: 0.001}}
  sampler: {class_path: Euler, init_args: {steps: 2}}
data: {root: latents, source: latents, batch_size: 8, val_batch_size: 26, num_workers: 0}
trainer:
  accelerator: cpu
  max_steps: 3
  log_every_n_steps: 1
  enable_progress_bar: false
  callbacks:
  - {class_path: ModelCheckpoint, init_args: {save_last: true, enable_version_counter: false}}
"""
CACHE = ["--model.predict=moments", "--trainer.callbacks=[{class_path: LatentWriter, init_args: {directory: latents}}]"]
SAMPLES = "--trainer.callbacks=[{class_path: SampleWriter, init_args: {npz: true, directory: samples}}]"


@pytest.fixture
def folder(tmp_path, photos) -> Path:
    (tmp_path / "tokenizer.yaml").write_text(TOKENIZER)
    (tmp_path / "diffusion.yaml").write_text(DIFFUSION)
    (tmp_path / "photos").symlink_to(photos)
    return tmp_path


def succeed(folder: Path, program: str, *arguments: str) -> None:
    ended = run(folder, program, *arguments)
    assert ended.code == 0, ended.err


def diffuses(folder: Path, tokenizer: Path, channels: int) -> None:
    """A denoiser learns from the cache and draws images that the tokenizer decodes."""
    options = [f"--model.model.init_args.in_channels={channels}", f"--model.tokenizer={{checkpoint: {tokenizer}}}"]
    succeed(folder, "ldm", "fit", "-c", "diffusion.yaml", *options)
    checkpoint = ["--ckpt_path=runs/diffusion/checkpoints/last.ckpt", "--data.num_samples=3"]
    succeed(folder, "ldm", "predict", "-c", "diffusion.yaml", *options, *checkpoint, SAMPLES)
    with np.load(folder / "samples.npz") as samples:
        assert samples["arr_0"].shape == (3, 64, 64, 3)


@pytest.mark.slow
def test_one_that_is_trained_here_makes_latents_for_diffusion(folder):
    succeed(folder, "vfm_vae", "fit", "-c", "tokenizer.yaml")
    last = folder / "runs/rae/checkpoints/last.ckpt"
    succeed(folder, "vfm_vae", "predict", "-c", "tokenizer.yaml", *CACHE, "--ckpt_path", str(last))
    diffuses(folder, last, 128)


@pytest.mark.slow
def test_a_folder_of_diffusers_makes_latents_for_diffusion(folder, data):
    theirs, source = of_diffusers(encoder_input_size=56, latents_mean=None, latents_std=None), folder / "published"
    theirs.save_pretrained(source)
    succeed(folder, "vfm_vae.convert", str(source), "--out", "converted")
    files = ["-c", "tokenizer.yaml", "-c", "converted/model.yaml", "--ckpt_path", "converted/training.ckpt"]
    succeed(folder, "vfm_vae", "predict", *files, *CACHE)
    cached = LatentDataset(folder / "latents/val", train=False)
    images = from_uint8(next(iter(data().evaluation_dataloader("val"))).images)
    expected = reconstructed(theirs, images)[0]
    assert torch.allclose(torch.stack([cached[row][0] for row in range(len(images))]), expected, atol=1e-5)
    diffuses(folder, source, 64)
