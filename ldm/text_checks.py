"""Checks that data, denoiser, checkpoint and text encoder fit each other, before anything is computed."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningDataModule

from ldm.condition import Conditioning
from ldm.models.denoiser import Denoiser
from vfm_vae.data.images import ImageDataset
from vfm_vae.data.latents import LatentDataset
from vfm_vae.data.prompts import SamplePrompts
from vfm_vae.data.samples import SampleSet
from vfm_vae.text import TextEncoder


def check_texts(denoiser: Denoiser, conditioning: Conditioning) -> None:
    """Checks that a denoiser takes the texts that it is told, or is told none and takes none.

    Raises:
        ValueError: if not.
    """
    takes, gives = denoiser.text_channels, conditioning.text_channels
    network, told = type(denoiser).__name__, type(conditioning).__name__
    if takes and not gives:
        raise ValueError(
            f"model.conditioning: {network} takes texts, but {told} gives none; give ldm.text.Captions with a text "
            "encoder"
        )
    if gives and not takes:
        raise ValueError(
            f"model.conditioning: {told} gives texts, but {network} takes none; leave it null, or give another denoiser"
        )
    if takes != gives:
        raise ValueError(
            f"model.text_channels: {network} takes texts of {takes} channels, but the encoder of {told} gives {gives}; "
            f"set it to {gives}"
        )


def check_captions(dataset: SampleSet, encoder: TextEncoder) -> None:
    """Checks that a data set has captions, and none that another text encoder embedded.

    Args:
        dataset: Images or cached latents.
        encoder: At hand; it remembers the fingerprint of the one that made a cache.

    Raises:
        ValueError: if not.
    """
    if not isinstance(dataset, LatentDataset):
        if isinstance(dataset, ImageDataset) and not dataset.has_captions:
            raise ValueError(
                "data.captions: the denoiser is told captions, but the data comes without; say where they are, such as "
                "'text' for that field of metadata.jsonl"
            )
        return
    place, again = f"data.root: the latents in {str(dataset.folder)!r}", "make the cache again with this one"
    if dataset.text_shape is None:
        raise ValueError(
            f"{place} come without captions, which the denoiser is told; {again}: set data.captions and LatentWriter's "
            "text"
        )
    what, advice = f"{place} have captions of", f"give that one (model.conditioning), or {again}"
    encoder.go_on_as(dataset.text_source, what, advice)
    if dataset.text_shape != (encoder.max_tokens, encoder.width):
        raise ValueError(
            f"{what} {dataset.text_shape} (tokens at most, channels), but {encoder.name} gives "
            f"{(encoder.max_tokens, encoder.width)}; {again}"
        )


def check_prompts(data: LightningDataModule, conditioning: Conditioning) -> None:
    """Checks that samples of prompts are not asked of a model of classes.

    Raises:
        ValueError: if they are.
    """
    samples = getattr(data, "samples", None)  # others' DataModules need not have it
    if isinstance(samples, SamplePrompts) and conditioning.num_classes is not None:
        raise ValueError(
            f"data.prompts (--prompt): the model draws samples of {conditioning.num_classes} classes, and takes no "
            "prompts; give data.num_samples, or a model that was trained on captions"
        )


def check_text_encoder(conditioning: Conditioning, source: Mapping[str, Any] | None, place: str) -> None:
    """Checks that the text encoder, where there is one, is the one that a model was trained with.

    Args:
        conditioning: What the denoiser is told.
        source: What the model says of its own, see `TextEncoder.source`; None where it says nothing.
        place: Names the model.

    Raises:
        ValueError: if it is another.
    """
    if conditioning.text_encoder is not None:
        conditioning.text_encoder.go_on_as(source, f"{place} was trained on texts of", "give the same")
