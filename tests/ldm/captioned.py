"""A denoiser of texts in a few lines, and a cache of made-up latents with captions that it can be trained on."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from latent_cache import NUM_CLASSES, write_split
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.condition import Condition
from ldm.models.denoiser import Denoiser, Prediction
from ldm.module import DiffusionModule
from ldm.samplers import Euler
from ldm.text import Captions, text_of
from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.data.latents import IDENTITY
from vfm_vae.data.texts import EmptyCaption, pack_texts
from vfm_vae.text import HashedWords, TextEncoder
from vfm_vae.types import Caption
from vfm_vae.writing import write_json

WIDTH, LENGTH = 8, 6
SUBJECTS = ("cat", "rocket", "cup of coffee")[:NUM_CLASSES]


def words(**options) -> HashedWords:
    return HashedWords(**{"width": WIDTH, "max_tokens": LENGTH} | options)


class Pooling(Denoiser):
    """Sees the mean of a text's tokens, and each position of the latent by itself."""

    def __init__(self, text_channels: int = WIDTH, in_channels: int = 4, input_size: int = 4, width: int = 16) -> None:
        super().__init__(in_channels, input_size)
        self.text_channels = text_channels
        self.enter = nn.Linear(in_channels + 1 + text_channels, width)
        self.blocks = nn.ModuleList([nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU())])
        self.leave = nn.Linear(width, in_channels)

    def forward(self, state: Tensor, t: Tensor, condition: Condition, align: bool = False) -> Prediction:
        text = text_of(condition)
        pooled = (text.embeddings * text.mask[..., None]).sum(1) / text.mask.sum(1, keepdim=True)
        told = torch.cat([t[:, None], pooled], dim=1)[:, :, None, None].expand(-1, -1, *self.input_size)
        tokens = self.enter(torch.cat([state, told], dim=1).flatten(2).mT)
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return Prediction(self.leave(tokens).mT.unflatten(2, self.input_size))


def captions_of(label: int) -> list[str]:
    """Two for each image."""
    return [f"a {SUBJECTS[label]}", f"photograph of {SUBJECTS[label]}, on the left"]


def embedded(captions: Sequence[str], encoder: TextEncoder) -> list[Caption]:
    return list(map(Caption, captions, encoder.tokens(captions, torch.device("cpu"))))


def write_captioned(root: Path, encoder: TextEncoder, sizes: Sequence[int] = (50, 13)) -> Path:
    """A cache with `train` and `val`, as LatentWriter makes it."""
    for split, size in zip(("train", "val"), sizes, strict=True):
        folder = root / split
        write_split(folder, size)
        for path in folder.glob("*.safetensors"):
            tensors = load_file(path)
            images = [embedded(captions_of(label), encoder) for label in tensors["labels"].tolist()]
            save_file(tensors | pack_texts(images, encoder.width), path)
        EmptyCaption(encoder.empty(), encoder.max_tokens).write(folder)
        write_json(folder / IDENTITY, {"text": encoder.source()})
    return root


def cached(root: Path, **options) -> ImageNetDataModule:
    defaults = {"source": "latents", "batch_size": 8, "val_batch_size": 5, "num_workers": 0}
    return ImageNetDataModule(root, **defaults | options)


def captioner(model: Denoiser | None = None, encoder: TextEncoder | None = None, **options) -> DiffusionModule:
    """A module that trains on captions."""
    torch.manual_seed(0)
    encoder = encoder or words()
    defaults = {"sampler": Euler(6), "predict": "latents", "seed": 1, "conditioning": Captions(encoder)}
    return DiffusionModule(model or Pooling(encoder.width), partial(torch.optim.AdamW, lr=2e-3), **defaults | options)
