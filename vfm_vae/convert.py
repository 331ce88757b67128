"""`python -m vfm_vae.convert`: writes published weights, or a training checkpoint, as a folder that can be loaded."""

from collections.abc import Mapping
from typing import Any

from jsonargparse import ArgumentParser
from torch import Tensor

from vfm_vae import schema
from vfm_vae.checkpoints import read_weights
from vfm_vae.cli import short_errors
from vfm_vae.description import describe
from vfm_vae.losses.guard import NonFiniteGuard
from vfm_vae.published import (
    opponents_from_published,
    read_config,
    tokenizer_from_published,
    tokenizer_to_published,
    vfm_source_of,
    weights_from_published,
)
from vfm_vae.published_files import pick, remove_training, write_training
from vfm_vae.schema import TOKENIZER
from vfm_vae.tokenizer import VFMVAE, read_tokenizer
from vfm_vae.vfm import FORMERLY

__all__ = ["opponents_from_published", "tokenizer_from_published", "tokenizer_to_published"]


def convert(
    source: str,
    out: str,
    config: str | None = None,
    vfm: str | None = None,
    vfm_weights: str | None = None,
    images_seen: int | None = None,
) -> None:
    """Writes a tokenizer into a folder that Python and the command lines read.

    From published weights come `config.json`, `model.safetensors` and `README.md`, for `VFMVAE.from_pretrained` and
    wherever a tokenizer is asked for; and `training.ckpt` and `model.yaml`, with which `python -m vfm_vae` goes on
    training (model.init_from), measures, and caches latents. From a checkpoint of training come the first three.

    Args:
        source: Public file of weights, or a checkpoint that `python -m vfm_vae fit` wrote.
        out: The folder, which is made if it is missing.
        config: The public YAML that belongs to published weights.
        vfm: Name of the VFM in timm, if it is not clear from the public YAML.
        vfm_weights: File with the VFM's weights. With it, their fingerprint is noted and the model is checked against
            it.
        images_seen: How many images the weights were trained on, if not the public YAML's total_kimg.
    """
    content = read_weights(source, "source")
    if TOKENIZER.describes(content):
        model = read_tokenizer(source, vfm=vfm_weights is not None, vfm_weights=vfm_weights)
        remove_training(out)
        model.save_pretrained(out)
        print(f"{out}: the tokenizer of {source}")
        return
    if config is None:
        raise ValueError("config: published weights need the public YAML that they were trained with")
    generator, trained_images = read_config(config)
    trained, averaged = pick(content, "ldm_adapter.")
    if (weights := averaged or trained) is None:
        raise ValueError(f"source: {source!r} holds no weights of a VFM-VAE generator (ldm_adapter.…)")
    model = tokenizer_from_published(weights, generator)
    model.absent_vfm = vfm_source_of(generator, vfm)
    if vfm_weights is not None:
        model.attach_vfm(vfm_weights)
    opponents = pick(content, "heads.")[0] or pick(content, "patchgan_discriminator.")[0] or {}
    checkpoint = _checkpoint(
        model,
        None if averaged is None or trained is None else weights_from_published(model, trained),
        opponents_from_published(opponents),
        trained_images if images_seen is None else images_seen,
    )
    remove_training(out)
    model.save_pretrained(out)
    write_training(out, checkpoint, _overlay(model))
    kinds = sorted({name.partition(".")[0] for name in checkpoint["state_dict"]} - {"model"})
    print(f"{out}: the tokenizer of {source}, with {', '.join(kinds) or 'no discriminators'}")


def _checkpoint(
    model: VFMVAE, trained: Mapping[str, Tensor] | None, opponents: Mapping[str, Tensor], images_seen: int
) -> dict[str, Any]:
    """What `python -m vfm_vae` reads: weights without states of optimisers, see `TokenizerModule`.

    Args:
        model: The model with its averaged weights, or with the only ones that there are.
        trained: The others.
        opponents: As `opponents_from_published` gives them.
        images_seen: Counter.
    """
    averaged = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    state = averaged if trained is None else {f"model.{name}": tensor for name, tensor in trained.items()}
    source = {**FORMERLY, **(model.vfm_source() or {})}
    checkpoint = schema.of_weights(state | dict(opponents))
    schema.write(
        checkpoint,
        TOKENIZER,
        model.described(),
        images_seen=images_seen,
        guard=NonFiniteGuard().state_dict(),
        vfm={name: source[name] for name in ("name", "fingerprint", "antialias_positions")},
    )
    if trained is not None:
        parameters = {f"model.{name}" for name, _ in model.named_parameters()}
        weights = {name: tensor for name, tensor in averaged.items() if name in parameters}
        schema.write_average(checkpoint, weights, images_seen)
    return checkpoint


def _overlay(model: VFMVAE) -> dict[str, Any]:
    """The model as a config of `python -m vfm_vae` has it, with its VFM."""
    arguments = {name: value for name, value in (model.vfm_source() or {}).items() if name != "fingerprint"}
    description = describe(model)
    description["init_args"]["vfm"] = {"class_path": "vfm_vae.vfm.FrozenVFM", "init_args": arguments}
    return {"model": {"model": description}}


def main() -> None:
    """The command line."""
    parser = ArgumentParser(exit_on_error=False, prog="python -m vfm_vae.convert", description=__doc__)
    parser.add_argument("source", help="Public file of weights, or a checkpoint that `python -m vfm_vae fit` wrote.")
    parser.add_function_arguments(convert, skip={"source"})
    with short_errors():
        convert(**parser.parse_args().as_dict())


if __name__ == "__main__":
    main()
