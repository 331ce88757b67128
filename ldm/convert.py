"""`python -m ldm.convert`: writes published weights, or a training checkpoint, as a folder that can be loaded."""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from jsonargparse import ArgumentParser

from ldm.compatibility import DIFFUSION
from ldm.guidance import Guidance
from ldm.models.denoiser import Denoiser
from ldm.models.sit import SiT
from ldm.pipeline import LatentDiffusion
from ldm.published import (
    denoiser_from_published,
    lightningdit_from_published,
    reg_from_published,
    to_published,
)
from ldm.samplers import Euler, EulerMaruyama, Sampler
from vfm_vae import schema
from vfm_vae.checkpoints import read_weights
from vfm_vae.cli import short_errors
from vfm_vae.data.latents import LatentStatistics
from vfm_vae.description import describe
from vfm_vae.published_files import pick, read_yaml, remove_training, write_training

__all__ = ["denoiser_from_published", "lightningdit_from_published", "reg_from_published", "to_published"]


def convert(
    source: str,
    out: str,
    config: str | None = None,
    statistics: str | None = None,
    tokenizer: str | None = None,
) -> None:
    """Writes a diffusion model into a folder that Python and the command lines read.

    From published weights come `config.json`, `model.safetensors` and `README.md`, for `LatentDiffusion`; and
    `training.ckpt` and `model.yaml`, with which `python -m ldm` goes on training (model.init_from), samples and
    measures. From a checkpoint of training come the first three. Averaged weights are taken where there are any.

    Args:
        source: Public file of weights, or a checkpoint that `python -m ldm fit` wrote.
        out: The folder, which is made if it is missing.
        config: The public YAML that belongs to published weights. It is not needed if the file holds the arguments of
            its training script.
        statistics: The file `latents_stats.pt` of the latents that published weights were trained on.
        tokenizer: The tokenizer that makes these latents: a folder, a checkpoint, or `owner/model`. The model is then
            marked as trained on its latents.
    """
    content = read_weights(source, "source")
    if DIFFUSION.describes(content):
        model = LatentDiffusion.from_checkpoint(source, tokenizer)
        remove_training(out)
        model.save_pretrained(out)
        print(f"{out}: the diffusion model of {source}")
        return
    trained, averaged = pick(content, "x_embedder.")
    if (weights := averaged or trained) is None:
        raise ValueError(f"source: {source!r} holds no weights of a LightningDiT or a SiT (x_embedder.…)")
    if statistics is None:
        raise ValueError("statistics: latents are normalised by those of training: give the model's latents_stats.pt")
    published = _read_config(content, config)
    network = denoiser_from_published(weights, published)
    model = LatentDiffusion(network, *_sampling(network, published.get("sample") or {})).eval()
    model.normalization.take(_matching(LatentStatistics.read(statistics), network))
    if tokenizer is not None:
        model.use_tokenizer(tokenizer)
        assert model.tokenizer is not None
        model.latent_source = model.tokenizer.network.latent_identity()
    other = None if averaged is None or trained is None else denoiser_from_published(trained, published)
    checkpoint = _checkpoint(model, other)
    overlay = dict(describe(model)["init_args"])
    if tokenizer is not None:
        overlay["tokenizer"] = {
            "class_path": "vfm_vae.tokenizer.FrozenTokenizer",
            "init_args": {"checkpoint": str(tokenizer)},
        }
    remove_training(out)
    model.save_pretrained(out)
    write_training(out, checkpoint, {"model": overlay})
    print(f"{out}: the {type(network).__name__} of {source}")


def _read_config(content: Any, path: str | None) -> Mapping[str, Any]:
    """The public YAML; without one, the arguments of training that a public file may hold."""
    if path is None:
        arguments = content.get("args") if isinstance(content, Mapping) else None
        if arguments is None:
            raise ValueError("config: published weights need the public YAML that they were trained with")
        return vars(arguments) if isinstance(arguments, Namespace) else arguments
    return read_yaml(path)


def _sampling(network: Denoiser, options: Mapping[str, Any]) -> tuple[Sampler, Guidance]:
    """How published samples were drawn; the public LightningDiT guides only the first three channels.

    Raises:
        ValueError: if by another method than Euler's.
    """
    if isinstance(network, SiT):
        return EulerMaruyama(), Guidance(start=0.2, cls_scale=4.0)
    if (method := options.get("sampling_method", "euler")) != "euler":
        raise ValueError(f"config: sample.sampling_method {method!r} is not supported, only 'euler' is; change it")
    steps, shift = options.get("num_sampling_steps", 250), options.get("timestep_shift", 0.3)
    guidance = Guidance(options.get("cfg_scale", 1.0), start=options.get("cfg_interval_start", 0.125), channels=3)
    return Euler(steps, shift or 1.0), guidance


def _matching(statistics: LatentStatistics, network: Denoiser) -> LatentStatistics:
    channels = statistics.mean.shape[1]
    if channels != network.in_channels:
        raise ValueError(f"statistics: of {channels} channels, but the denoiser takes {network.in_channels}")
    return statistics


def _checkpoint(model: LatentDiffusion, trained: Denoiser | None) -> dict[str, Any]:
    """The checkpoint that `python -m ldm` reads: weights without optimizer states.

    Args:
        model: The model with its averaged weights, or with the only ones that there are.
        trained: The same model with its trained weights.
    """
    averaged = model.state_dict()
    others = {} if trained is None else {f"model.{name}": tensor for name, tensor in trained.state_dict().items()}
    checkpoint = schema.of_weights(averaged | others)
    facts = {"skipped_steps": 0, "tokenizer": model.latent_source}
    schema.write(checkpoint, DIFFUSION, model.described(), images_seen=0, **facts)
    if trained is not None:
        weights = {f"model.{name}": averaged[f"model.{name}"] for name, _ in trained.named_parameters()}
        schema.write_average(checkpoint, weights, images_seen=0)
    return checkpoint


def main() -> None:
    """The command line."""
    parser = ArgumentParser(exit_on_error=False, prog="python -m ldm.convert", description=__doc__)
    parser.add_argument("source", help="Public file of weights, or a checkpoint that `python -m ldm fit` wrote.")
    parser.add_function_arguments(convert, skip={"source"})
    with short_errors():
        convert(**parser.parse_args().as_dict())


if __name__ == "__main__":
    main()
