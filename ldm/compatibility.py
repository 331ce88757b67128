"""Checks that data, tokenizer, denoiser and checkpoint fit each other, before anything is computed.

What is taken over from a checkpoint that fits is taken here, too.
"""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from ldm.alignment import REPA
from ldm.condition import Conditioning
from ldm.models.denoiser import Denoiser
from ldm.normalization import LatentNormalization
from ldm.text_checks import check_captions, check_text_encoder
from vfm_vae.checkpoints import few, fill
from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.data.latents import LatentDataset, LatentStatistics
from vfm_vae.schema import Kind, Stored, read
from vfm_vae.tokenizer import FrozenTokenizer


def _former_diffusion(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """The `config` of checkpoints from before it was noted: their hyper-parameters are the command line's.

    This is the one place that knows those of diffusion models; `vfm_vae.schema`, which imports nothing of `ldm`, has
    the tokenizers'.
    """
    given = content.get("hyper_parameters")
    if not isinstance(given, Mapping) or not isinstance(given.get("model"), Mapping):
        return None
    arguments = {name: given.get(name) for name in ("model", "sampler", "guidance")}
    model = {"class_path": "ldm.pipeline.LatentDiffusion", "init_args": arguments}
    return {"model": model, "tokenizer": content["tokenizer"]}


PARTS = {name: name for name in ("model.", "normalization.")}
DIFFUSION = Kind("diffusion model", "python -m ldm", PARTS, "tokenizer", _former_diffusion)


def check_data(
    data: ImageNetDataModule,
    denoiser: Denoiser,
    tokenizer: FrozenTokenizer | None,
    alignment: REPA | None,
    latent_source: dict[str, Any] | None,
    conditioning: Conditioning,
) -> dict[str, Any] | None:
    """Checks that a denoiser can be trained and measured on the data sets.

    Args:
        data: The DataModule of latents or images, already set up.
        denoiser: Takes the latents.
        tokenizer: Encodes images.
        alignment: Aligns the denoiser to a VFM.
        latent_source: Identity of the tokenizer whose latents are wanted, where it is known.
        conditioning: What the denoiser is told. Its text encoder remembers that of cached captions.

    Returns:
        That identity, from the data where it was not known.

    Raises:
        ValueError: if something does not fit.
    """
    check_classes(data, denoiser.num_classes)
    for dataset in filter(None, (data.train_set, data.val_set)):
        if conditioning.text_encoder is not None:
            check_captions(dataset, conditioning.text_encoder)
        if isinstance(dataset, LatentDataset):
            check_latents(dataset, denoiser, latent_source)
            latent_source = latent_source or dataset.tokenizer
            if alignment is not None:
                place = repr(str(dataset.folder))
                alignment.check_features(dataset.features_shape, dataset.features_source, denoiser, place)
        else:
            check_images(data.image_size, tokenizer, denoiser)
            if alignment is not None:
                alignment.check_images(data.image_size, denoiser)
    return latent_source


def check_parts(denoiser: Denoiser, alignment: REPA | None, tokenizer: FrozenTokenizer | None) -> None:
    """Checks that a denoiser fits the tokenizer's latents, and has parts for alignment only if it is aligned.

    Raises:
        ValueError: if not.
    """
    if alignment is not None:
        alignment.check_model(denoiser)
    elif denoiser.align_channels or denoiser.cls_channels:
        raise ValueError(
            "model.alignment: the denoiser's align_channels or cls_channels would not be trained; set both to 0, or "
            "give an alignment"
        )
    if tokenizer is not None and tokenizer.identity["channels"] != denoiser.in_channels:
        raise ValueError(
            f"model.in_channels: the tokenizer's latents have {tokenizer.identity['channels']} channels, but the "
            f"denoiser takes {denoiser.in_channels}"
        )


def check_classes(data: ImageNetDataModule, num_classes: int | None) -> None:
    """Checks that a denoiser has all classes of the data.

    Raises:
        ValueError: if the data has more.
    """
    if num_classes is not None and (data.num_classes or 0) > num_classes:
        raise ValueError(f"{_classes(data, num_classes)}; give it {data.num_classes}, or other data")


def check_untrained(data: ImageNetDataModule, num_classes: int | None, begins: bool) -> None:
    """Checks that training data has all of the denoiser's classes, as samples are drawn of all.

    Args:
        data: Set up.
        num_classes: Classes that the denoiser knows; None where it is told something else.
        begins: Whether nothing was trained so far. Weights that were may know more classes: that is but warned of.

    Raises:
        ValueError: if training begins, and the data has fewer.
    """
    if num_classes is None or data.num_classes is None or data.num_classes >= num_classes:
        return
    if begins:
        raise ValueError(
            f"{_classes(data, num_classes)}, and the others would not be trained; give it "
            f"{data.num_classes}, or begin from weights that know them (model.init_from)"
        )
    rank_zero_warn(f"{_classes(data, num_classes)}: samples of the others come from what its weights learned before")


def _classes(data: ImageNetDataModule, num_classes: int) -> str:
    labels = f"the data in {str(data.root)!r} has labels up to {(data.num_classes or 0) - 1}"
    return f"model.num_classes: {labels}, but the denoiser knows {num_classes} classes"


def check_latents(dataset: LatentDataset, denoiser: Denoiser, expected: Mapping[str, Any] | None) -> None:
    """Compares cached latents with the denoiser, and their tokenizer with the expected one.

    Raises:
        ValueError: if they are of another shape, or another tokenizer's.
    """
    if dataset.shape != denoiser.latent_shape:
        raise ValueError(
            f"data.root: the latents in {str(dataset.folder)!r} are {dataset.shape} (channels, rows, columns), but "
            f"model.in_channels and input_size say {denoiser.latent_shape}"
        )
    check_tokenizer(expected, dataset.tokenizer, f"data.root: the latents in {str(dataset.folder)!r} are")


def check_images(image_size: int, tokenizer: FrozenTokenizer | None, denoiser: Denoiser) -> None:
    """Compares the latents that a tokenizer would make of images with the denoiser.

    Args:
        image_size: Side of the images in pixels.
        tokenizer: Encodes them.
        denoiser: Takes the latents.

    Raises:
        ValueError: if there is no tokenizer, or the image size does not fit tokenizer and denoiser.
    """
    if tokenizer is None:
        raise ValueError("model.tokenizer: training on images needs one; give its checkpoint, or cached latents")
    tokenizer.network.check_image_size(image_size)
    sides = (image_size // tokenizer.identity["compression"],) * 2
    if sides != denoiser.input_size:
        raise ValueError(
            f"data.image_size: {image_size} pixels give latents of {sides}, but the denoiser takes "
            f"{denoiser.input_size}"
        )


def begin_from(
    source: str,
    module: nn.Module,
    latent_source: dict[str, Any] | None,
    normalization: LatentNormalization,
    conditioning: Conditioning,
) -> dict[str, Any] | None:
    """Loads a checkpoint's weights, averaged ones if it has them, and its statistics of latents.

    Args:
        source: The checkpoint.
        module: Takes the weights.
        latent_source: Identity of the tokenizer at hand, where it is known.
        normalization: The module's normalization.
        conditioning: What its denoiser is told.

    Returns:
        That identity, from the checkpoint where it was not known.

    Raises:
        ValueError: if there is no checkpoint, or it holds another model, or belongs to another tokenizer's latents or
            another text encoder.
    """
    stored = read(source, "init_from", DIFFUSION)
    check_checkpoint(stored, latent_source, normalization, conditioning, "init_from")
    fill(module, stored.averaged(), f"{stored.place} holds another model")
    denoiser = module.get_submodule("model")
    assert isinstance(denoiser, Denoiser)
    check_meaning(stored, denoiser, "init_from")
    return latent_source or stored.content["tokenizer"]


def check_checkpoint(
    stored: Stored,
    latent_source: Mapping[str, Any] | None,
    normalization: LatentNormalization,
    conditioning: Conditioning,
    option: str,
) -> None:
    """Compares the latents and texts that a checkpoint was trained on with those at hand.

    Args:
        stored: A checkpoint of a diffusion model's training.
        latent_source: Identity of the tokenizer at hand, where it is known.
        normalization: At hand.
        conditioning: At hand; its text encoder, where it has one, remembers the fingerprint of the checkpoint's.
        option: Names the checkpoint.

    Raises:
        ValueError: if it belongs to another tokenizer's latents, or another text encoder.
    """
    check_text_encoder(conditioning, stored.content.get("config", {}).get("text"), f"{option}: the checkpoint")
    check_tokenizer(stored.content["tokenizer"], latent_source, f"{option}: data and tokenizer at hand are")
    # A strategy that shards the model has loaded its state by now, and taken it out.
    state = stored.content.get("state_dict", normalization.state_dict(prefix="normalization."))
    names = [f"normalization.{name}" for name in LatentStatistics._fields]
    if missing := set(names) - state.keys():
        raise ValueError(f"{option}: the checkpoint is of another model: missing {few(missing)}")
    check_statistics(LatentStatistics(*(state[name] for name in names)), normalization, option)


def check_meaning(stored: Stored, denoiser: Denoiser, option: str) -> None:
    """Checks that a checkpoint's weights mean to the denoiser what they were trained for, which names don't tell.

    Args:
        stored: A checkpoint of a diffusion model's training.
        denoiser: Takes the weights, which fit by names and shapes.
        option: Names the checkpoint.

    Raises:
        ValueError: if the one predicts velocities and the other data, or their internal heads are at other depths.
    """
    pipeline = stored.content.get("config", {}).get("model", {})  # older ones predict velocities and may not say so
    described = (pipeline.get("init_args") or {}).get("model") or {}
    arguments = described.get("init_args") or {}
    for name, former, what in (("predicts", "velocity", "predicts"), ("base_depth", 0, "has its internal head at")):
        theirs, ours = arguments.get(name, former), getattr(denoiser, name)
        if name in denoiser.arguments and theirs != ours:  # a class of its own may have settled it
            raise ValueError(
                f"{option}: the checkpoint's denoiser {what} {theirs!r}, but model.{name} is {ours!r}; set it to "
                f"{theirs!r}"
            )


def check_statistics(stored: LatentStatistics, normalization: LatentNormalization, option: str) -> None:
    """Compares the statistics of latents in a checkpoint with those at hand, where there are any.

    Args:
        stored: Those in the checkpoint.
        normalization: At hand.
        option: Names the checkpoint.

    Raises:
        ValueError: if they are of another number of channels, or clearly others.
    """
    channels = normalization.mean.shape[1]
    if stored.mean.shape[1] != channels:
        raise ValueError(
            f"{option}: the checkpoint is for latents of {stored.mean.shape[1]} channels, but model.in_channels "
            f"is {channels}"
        )
    if normalization.is_known and normalization.differs_from(stored):
        raise ValueError(
            f"{option}: the checkpoint was trained on latents with clearly different means or deviations than these, "
            "so they are from another tokenizer or were made differently"
        )


def check_tokenizer(
    expected: Mapping[str, Any] | None,
    found: Mapping[str, Any] | None,
    what: str,
    advice: str = "give the tokenizer that made these latents, or make them again",
) -> None:
    """Compares two tokenizers by what makes their latents, or by less if one of them is not fully known.

    Args:
        expected: Identity of the tokenizer whose latents are wanted.
        found: Identity of the one whose latents there are.
        what: Begins the message.
        advice: Ends it: what would do.

    Raises:
        ValueError: if they differ.
    """
    if expected is None or found is None:
        return
    # Where the weights of a VFM are not known there is no fingerprint, and the rest has to agree.
    by_name = None in (expected["fingerprint"], found["fingerprint"])
    compared = ("tokenizer", "vfm", "channels", "compression") if by_name else ("fingerprint",)
    if all(expected.get(name) == found.get(name) for name in compared):
        return
    with_vfm = "vfm" in {*expected, *found}
    seen = ", or its VFM sees images differently (antialias, antialias_positions)" if with_vfm else ""
    raise ValueError(
        f"{what} of another tokenizer ({_short(found)}) than was expected ({_short(expected)}): its weights differ"
        f"{seen}; {advice}"
    )


def name_of(identity: Mapping[str, Any]) -> str:
    """The name of a tokenizer with this identity: its class or, for a VFMVAE, its VFM."""
    return str(identity.get("tokenizer") or identity["vfm"])


def _short(identity: Mapping[str, Any]) -> str:
    fingerprint = identity["fingerprint"]
    return f"{name_of(identity)}, {'weights not known' if fingerprint is None else fingerprint[:12] + '…'}"
