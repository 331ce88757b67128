"""Embeds the captions of images for a cache of latents."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from vfm_vae.checkpoints import read_json
from vfm_vae.data.images import ImageDataset
from vfm_vae.data.samples import SampleSet
from vfm_vae.data.texts import EMPTY, EmptyCaption
from vfm_vae.finite import NotFinite
from vfm_vae.saving import alike
from vfm_vae.text import TextEncoder
from vfm_vae.types import Caption

NUM_ASKED = 1000  # images whose captions are counted before all are embedded


def check_captions(datasets: Iterable[SampleSet]) -> None:
    """Checks that images have captions.

    Raises:
        ValueError: if not.
    """
    if not all(isinstance(dataset, ImageDataset) and dataset.has_captions for dataset in datasets):
        raise ValueError(
            "data.captions: the cache is to hold embeddings of captions, and the images have none; name the field that "
            "holds them, or leave out the writer's text"
        )


def expected_size(encoder: TextEncoder, datasets: Iterable[ImageDataset]) -> str:
    """What embeddings will take on disk, and how many captions will be cut, in one line; no weights are read.

    Both are estimated from the captions of at most `NUM_ASKED` images, spread evenly over each data set.

    Args:
        encoder: The text encoder.
        datasets: Images with captions.
    """
    num_captions = num_tokens = num_cut = 0.0
    for dataset in datasets:
        asked = range(0, len(dataset), -(-len(dataset) // NUM_ASKED))
        counts = encoder.count([caption for index in asked for caption in dataset.captions_of(index)])
        each = len(dataset) / len(asked)  # images that one of those asked stands for
        num_captions += each * len(counts)
        num_tokens += each * sum(min(count, encoder.max_tokens) for count in counts)
        num_cut += each * sum(count > encoder.max_tokens for count in counts)
    size = num_tokens * encoder.width * torch.bfloat16.itemsize
    in_units = f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
    told = f"text: {num_captions:,.0f} captions of about {num_tokens / num_captions:.0f} tokens: {in_units} in bfloat16"
    return told + (f"; {num_cut / num_captions:.1%} are cut to {encoder.max_tokens} tokens" if num_cut else "")


def source_of(encoder: TextEncoder, file: Path) -> Mapping[str, Any]:
    """What a cache notes of its text encoder, whose weights are read; where it was noted before, that.

    Args:
        encoder: The text encoder.
        file: The cache's notes, which may be missing.

    Raises:
        ValueError: if another is noted, whose embeddings differ, or that may.
    """
    fingerprint = encoder.fingerprint()
    noted: Mapping[str, Any] | None = read_json(file, "directory").get("text") if file.is_file() else None
    encoder.go_on_as(noted, f"directory: {str(file.parent)!r} holds embeddings of", "choose another folder")
    return {**encoder.source(), "fingerprint": fingerprint} if noted is None else noted


def keep_empty(trainer: Trainer, encoder: TextEncoder, folder: Path, device: torch.device) -> None:
    """Writes what the encoder makes of the empty caption where a cache lacks it; rank zero does."""

    def write() -> None:
        if trainer.is_global_zero and not (folder / EMPTY).is_file():
            EmptyCaption(encoder.empty(device), encoder.max_tokens).write(folder)

    alike(trainer.strategy, write)


def embedded(encoder: TextEncoder, dataset: ImageDataset, index: Tensor, device: torch.device) -> list[list[Caption]]:
    """All captions of each image with their embeddings, in memory.

    Args:
        encoder: The text encoder.
        dataset: The images.
        index: Their positions, int64 `[B]`; negative ones are padding, of which nothing is said.
        device: Device to compute on.

    Raises:
        NotFinite: if an embedding holds nan or inf.
    """
    captions = [dataset.captions_of(number) if number >= 0 else [] for number in index.tolist()]
    if not any(captions):
        return [[] for _ in captions]
    tokens = encoder.tokens([text for texts in captions for text in texts], device)
    together = torch.cat(tokens).to("cpu", torch.bfloat16)  # one tensor, so that nothing beside it is held
    if not together.isfinite().all():
        raise NotFinite(
            f"text: embeddings by {encoder.name} hold nan or inf; its weights are broken, or numbers overflowed in its "
            "precision"
        )
    rows = iter(together.split([len(text) for text in tokens]))
    return [[Caption(text, next(rows)) for text in texts] for texts in captions]
