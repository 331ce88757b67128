"""`python -m vfm_vae.convert`: writes published weights, or a training checkpoint, as a folder that can be loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from torch import Tensor

from vfm_vae import schema
from vfm_vae.checkpoints import read_weights
from vfm_vae.cli import short_errors
from vfm_vae.description import describe
from vfm_vae.diffusers_folder import WEIGHTS as DIFFUSERS_WEIGHTS
from vfm_vae.losses.guard import NonFiniteGuard
from vfm_vae.options import named_as
from vfm_vae.pretrained import CONFIG
from vfm_vae.pretrained_tokenizer import PretrainedTokenizer
from vfm_vae.published import (
    opponents_from_published,
    read_config,
    tokenizer_from_published,
    tokenizer_to_published,
    vfm_source_of,
    weights_from_published,
)
from vfm_vae.published_conv import aligned_to, conv_vae_from_published, find_conv_vae
from vfm_vae.published_files import pick, remove_training, write_training
from vfm_vae.schema import TOKENIZER
from vfm_vae.tokenizer import VFMVAE, read_tokenizer
from vfm_vae.vfm import FORMERLY, description_from

__all__ = ["opponents_from_published", "tokenizer_from_published", "tokenizer_to_published"]

FILES = {".bin", ".ckpt", ".pkl", ".pt", ".pth", ".safetensors"}  # so named, it is no folder and not on the hub


def convert(
    source: str,
    out: str,
    config: str | None = None,
    vfm: str | None = None,
    vfm_weights: str | None = None,
    images_seen: int | None = None,
) -> None:
    """Writes a tokenizer into a folder that Python and the command lines read.

    From published weights come `config.json`, `model.safetensors` and `README.md`, for `from_pretrained` and wherever
    a tokenizer is asked for; and `training.ckpt` and `model.yaml`, with which `python -m vfm_vae` goes on training
    (model.init_from), measures, and caches latents. From a checkpoint of training come the first three.

    Args:
        source: Public file of weights, of a VFM-VAE or of a convolutional VAE such as SD-VAE and VA-VAE; a folder in
            the format of diffusers, or such a model's `owner/model` on the hub; or a checkpoint that
            `python -m vfm_vae fit` wrote.
        out: The folder, which is made if it is missing.
        config: The public YAML that belongs to published weights of a VFM-VAE.
        vfm: Name of the VFM in timm, if it is not clear from the public YAML; of a convolutional VAE, the one that it
            was aligned to.
        vfm_weights: File with the VFM's weights. With it, their fingerprint is noted and the model is checked against
            it.
        images_seen: How many images the weights were trained on, if not the public YAML's total_kimg.
    """
    is_file = Path(source).is_file() or Path(source).suffix in FILES
    content = read_weights(source, "source") if is_file else None
    if content is None or TOKENIZER.describes(content):
        _leave_out(source, config=config, vfm=vfm, images_seen=images_seen if is_file else None)
        with named_as(name="source"):
            model = read_tokenizer(source, vfm=vfm_weights is not None, vfm_weights=vfm_weights)
        checkpoint = None if is_file else _checkpoint(model, images_seen or 0)
    elif (tensors := find_conv_vae(content)) is not None:
        _leave_out(source, config=config)
        model = conv_vae_from_published(tensors).attach_vfm(vfm_weights)
        model.absent_vfm = None if vfm is None else aligned_to(vfm, model)
        checkpoint = _checkpoint(model, images_seen or 0)
    else:
        model, checkpoint = _published(content, source, config, vfm, vfm_weights, images_seen)
    remove_training(out)
    model.save_pretrained(out)
    opponents = ""
    if checkpoint is not None:
        write_training(out, checkpoint, _overlay(model))
        kinds = {name.partition(".")[0] for name in checkpoint["state_dict"]} - {"model"}
        opponents = f", with {', '.join(sorted(kinds)) or 'no discriminators'}"
    print(f"{out}: the tokenizer of {source}{opponents}")


def _leave_out(source: str, **options: Any) -> None:
    """Refuses options that `source` itself answers."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name}: given {value!r}, but {source!r} tells that itself; leave it out")


def _published(
    content: Any, source: str, config: str | None, vfm: str | None, vfm_weights: str | None, images_seen: int | None
) -> tuple[VFMVAE, dict[str, Any]]:
    """A published VFM-VAE, and what training goes on from; arguments as of `convert`, after what the file holds."""
    trained, averaged = pick(content, "ldm_adapter.")
    if (weights := averaged or trained) is None:
        raise ValueError(f"source: {source!r} {_other(content, source)}")
    if config is None:
        raise ValueError("config: published weights need the public YAML that they were trained with")
    generator, trained_images = read_config(config)
    model = tokenizer_from_published(weights, generator)
    model.absent_vfm = vfm_source_of(generator, vfm)
    if vfm_weights is not None:
        model.attach_vfm(vfm_weights)
    opponents = pick(content, "heads.")[0] or pick(content, "patchgan_discriminator.")[0] or {}
    checkpoint = _checkpoint(
        model,
        trained_images if images_seen is None else images_seen,
        None if averaged is None or trained is None else weights_from_published(model, trained),
        opponents_from_published(opponents),
    )
    return model, checkpoint


def _other(content: Any, source: str) -> str:
    """What a file is that holds no tokenizer."""
    if isinstance(content, Mapping) and {"state_dict", "tokenizer"} <= content.keys():
        return "is a diffusion model's checkpoint: use python -m ldm.convert"
    place = Path(source).parent
    if Path(source).name in DIFFUSERS_WEIGHTS or (place / CONFIG).is_file():
        return f"is only the weights of a folder whose {CONFIG} says what they are: give the folder, {str(place)!r}"
    return "holds no weights of a VFM-VAE generator (ldm_adapter.…)"


def _checkpoint(
    model: PretrainedTokenizer,
    images_seen: int,
    trained: Mapping[str, Tensor] | None = None,
    opponents: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """What `python -m vfm_vae` reads: weights without states of optimisers, see `TokenizerModule`.

    Args:
        model: The model with its averaged weights, or with the only ones that there are.
        images_seen: Counter.
        trained: The others.
        opponents: As `opponents_from_published` gives them.
    """
    averaged = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    state = averaged if trained is None else {f"model.{name}": tensor for name, tensor in trained.items()}
    checkpoint = schema.of_weights(state | dict(opponents or {}))
    schema.write(
        checkpoint,
        TOKENIZER,
        model.described(),
        images_seen=images_seen,
        guard=NonFiniteGuard().state_dict(),
        vfm=_identity(model.vfm_source()),
    )
    if trained is not None:
        parameters = {f"model.{name}" for name, _ in model.named_parameters()}
        weights = {name: tensor for name, tensor in averaged.items() if name in parameters}
        schema.write_average(checkpoint, weights, images_seen)
    return checkpoint


def _identity(source: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What a checkpoint says of a VFM, see `vfm_vae.vfm.vfm_identity`, where it is known by name alone."""
    if source is None:
        return None
    told = source if "class_path" in source else {**FORMERLY, **source}
    return {name: told[name] for name in ("name", "fingerprint", "class_path", "antialias_positions") if name in told}


def _overlay(model: PretrainedTokenizer) -> dict[str, Any]:
    """The model as a config of `python -m vfm_vae` has it, with its VFM; unless it is unknown."""
    description, source = describe(model, without={"vfm"}), model.vfm_source()
    if source is None:
        description["init_args"].pop("vfm", None)
    else:
        description["init_args"]["vfm"] = description_from(source)
    return {"model": {"model": description}}


def main() -> None:
    """The command line."""
    parser = ArgumentParser(exit_on_error=False, prog="python -m vfm_vae.convert", description=__doc__)
    parser.add_argument(
        "source",
        help="Published weights; a folder in the format of diffusers, or such a model's `owner/model` on the hub; or a "
        "checkpoint that `python -m vfm_vae fit` wrote.",
    )
    parser.add_function_arguments(convert, skip={"source"})
    with short_errors():
        convert(**parser.parse_args().as_dict())


if __name__ == "__main__":
    main()
