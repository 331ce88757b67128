"""A published convolutional VAE by the command lines: converted, fine-tuned, cached, and decoded with."""

import numpy as np
import pytest
import torch
from command_line import run

from vfm_vae.conv_vae import ConvVAE
from vfm_vae.data.latents import LatentDataset
from vfm_vae.tokenizer import read_tokenizer

TOKENIZER = """
seed_everything: 0
run: {name: decoder}
model:
  discriminator: null
  objective: {multi_resolution: 0.0, alignment: 0.0, adversarial: 0.0}
  optimizer: {class_path: Adam, init_args: {lr: 0.01}}
  discriminator_optimizer: {class_path: Adam, init_args: {lr: 0.01}}
  init_from: converted/training.ckpt
  train_only: [decoder]
data: {root: photos, image_size: 32, batch_size: 8, val_batch_size: 26, num_workers: 0}
trainer:
  accelerator: cpu
  max_steps: 2
  enable_progress_bar: false
  callbacks:
  - {class_path: ModelCheckpoint, init_args: {save_last: true, enable_version_counter: false}}
"""
DIFFUSION = """
seed_everything: 0
run: {name: diffusion}
model:
  model: {class_path: LightningDiT, init_args: {in_channels: 4, input_size: 4, depth: 1, width: 24, num_heads: 2,
    num_classes: 13}}
  optimizer: {class_path: AdamW, init_args: {lr: 0.001}}
  sampler: {class_path: Euler, init_args: {steps: 2}}
  tokenizer: {checkpoint: published}
data: {root: latents, source: latents, batch_size: 8, val_batch_size: 26, num_workers: 0}
trainer:
  accelerator: cpu
  max_steps: 2
  enable_progress_bar: false
  callbacks:
  - {class_path: ModelCheckpoint, init_args: {save_last: true, enable_version_counter: false}}
"""


def succeed(folder, program, *arguments):
    ended = run(folder, program, *arguments)
    assert ended.code == 0, ended.err


@pytest.mark.slow
def test_a_published_vae_goes_all_the_way_to_images(tmp_path, photos):
    (tmp_path / "tokenizer.yaml").write_text(TOKENIZER)
    (tmp_path / "diffusion.yaml").write_text(DIFFUSION)
    (tmp_path / "photos").symlink_to(photos)
    for name in ("published", "other"):
        ConvVAE(channels=[8, 8, 16, 16], num_res_blocks=1, norm_groups=8).to_diffusers(tmp_path / name)
    published = read_tokenizer(tmp_path / "published")

    succeed(tmp_path, "vfm_vae.convert", "published", "--out", "converted")
    model = ["-c", "tokenizer.yaml", "-c", "converted/model.yaml"]
    succeed(tmp_path, "vfm_vae", "fit", *model)
    tuned = "runs/decoder/checkpoints/last.ckpt"
    network = read_tokenizer(tmp_path / tuned)
    assert network.latent_identity() == published.latent_identity()  # it began with these weights
    assert not torch.equal(network.decoder.conv_in.weight, published.decoder.conv_in.weight)

    writer = "--trainer.callbacks=[{class_path: LatentWriter, init_args: {directory: latents}}]"
    options = [
        "--model.predict=moments",
        "--data.predict=[train,val]",
        writer,
        "--ckpt_path",
        "converted/training.ckpt",
    ]
    succeed(tmp_path, "vfm_vae", "predict", *model, *options)
    cached = LatentDataset(tmp_path / "latents/val", train=False)
    assert cached.tokenizer == published.latent_identity()

    succeed(tmp_path, "ldm", "fit", "-c", "diffusion.yaml")
    checkpoint = "runs/diffusion/checkpoints/last.ckpt"
    drawn = ["ldm", "predict", "-c", "diffusion.yaml", "--ckpt_path", checkpoint, "--data.num_samples=3"]
    images = []
    for decoder in ("published", tuned):
        name = f"samples{len(images)}"
        writer = f"--trainer.callbacks=[{{class_path: SampleWriter, init_args: {{npz: true, directory: {name}}}}}]"
        succeed(tmp_path, *drawn, f"--model.tokenizer.checkpoint={decoder}", writer)
        with np.load(tmp_path / f"{name}.npz") as samples:
            images.append(samples["arr_0"])
    assert images[0].shape == (3, 32, 32, 3) and not np.array_equal(*images)
    ended = run(tmp_path, "ldm", "fit", "-c", "diffusion.yaml", "--model.tokenizer.checkpoint=other")
    assert ended.code == 2 and "data.root: the latents in 'latents/train' are of another tokenizer" in ended.err
