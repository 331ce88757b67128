"""A denoiser small enough to train within a test, on latents that are made up."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ldm.models.lightningdit import LightningDiT
from ldm.module import DiffusionModule
from ldm.samplers import Euler
from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.data.latents import STATISTICS, ShardPlan, measure_shards

NUM_TRAIN, NUM_VAL, NUM_CLASSES = 50, 13, 3


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


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with `train` and `val`."""
    root = tmp_path_factory.mktemp("latents") / "cache"
    write_split(root / "train", NUM_TRAIN)
    write_split(root / "val", NUM_VAL)
    return root


@pytest.fixture
def latents(cache: Path) -> Callable[..., ImageNetDataModule]:
    """Builds the DataModule over the cache."""

    def build(**kwargs) -> ImageNetDataModule:
        options = {"source": "latents", "batch_size": 8, "val_batch_size": 5, "num_workers": 0}
        return ImageNetDataModule(**{"root": cache} | options | kwargs)

    return build


@pytest.fixture
def diffusion() -> Callable[..., DiffusionModule]:
    """Builds a DiffusionModule for latents `[B, 4, 4, 4]` of three classes; `model` are options of its denoiser."""

    def build(model: dict | None = None, **kwargs) -> DiffusionModule:
        torch.manual_seed(0)
        sizes = {"in_channels": 4, "input_size": 4, "depth": 2, "width": 32, "num_heads": 2, "num_classes": NUM_CLASSES}
        options = {"sampler": Euler(10), "predict": "latents", "seed": 1}
        return DiffusionModule(
            LightningDiT(**sizes | (model or {})), partial(torch.optim.AdamW, lr=2e-3), **options | kwargs
        )

    return build
