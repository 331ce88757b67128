"""A cache of latents that are made up, small enough to train on within a test."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from vfm_vae.data.latents import STATISTICS, ShardPlan, measure_shards

NUM_CLASSES = 3


def write_split(folder: Path, size: int, channels: int = 4, side: int = 4) -> None:
    """Two shards of latents whose mean tells the class; the mirrored view is the mirrored latent."""
    folder.mkdir(parents=True)
    plan = ShardPlan(folder, size, size - size // 3)
    generator = torch.Generator().manual_seed(size)
    for shard in range(len(plan)):
        labels = torch.tensor([image % NUM_CLASSES for image in plan.images(shard)])
        latents = 0.3 * torch.randn(len(labels), channels, side, side, generator=generator)
        latents += 2 * labels[:, None, None, None] + torch.arange(side) / side
        tensors = {"latents": latents, "latents_flip": latents.flip(3).contiguous(), "labels": labels}
        save_file(tensors, plan.path(shard))
    measure_shards(plan).compute().write(folder / STATISTICS)
