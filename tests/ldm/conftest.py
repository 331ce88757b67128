"""A denoiser small enough to train within a test, on latents that are made up."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from latent_cache import NUM_CLASSES, write_split

from ldm.models.lightningdit import LightningDiT
from ldm.module import DiffusionModule
from ldm.samplers import Euler
from vfm_vae.data.datamodule import ImageNetDataModule

NUM_TRAIN, NUM_VAL = 50, 13


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

    def build(model: dict | None = None, kind: type = LightningDiT, **kwargs) -> DiffusionModule:
        torch.manual_seed(0)
        sizes = {"in_channels": 4, "input_size": 4, "depth": 2, "width": 32, "num_heads": 2, "num_classes": NUM_CLASSES}
        options = {"sampler": Euler(10), "predict": "latents", "seed": 1}
        return DiffusionModule(kind(**sizes | (model or {})), partial(torch.optim.AdamW, lr=2e-3), **options | kwargs)

    return build
