"""`python -m ldm.convert`: writes published weights, or a training checkpoint, as a folder that can be loaded."""

from argparse import Namespace
from collections.abc import Mapping
from math import prod, sqrt
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser

from ldm.compatibility import DIFFUSION
from ldm.guidance import Guidance
from ldm.models.denoiser import Denoiser
from ldm.models.sit import SiT
from ldm.path import UNSHIFTED_SIZE, Shift
from ldm.pipeline import LatentDiffusion
from ldm.published import (
    denoiser_from_published,
    ditdh_from_published,
    lightningdit_from_published,
    reg_from_published,
    to_published,
)
from ldm.published_configs import parameters
from ldm.samplers import Euler, EulerMaruyama, Sampler
from vfm_vae import schema
from vfm_vae.checkpoints import read_weights
from vfm_vae.cli import short_errors
from vfm_vae.data.folder import list_classes
from vfm_vae.data.latents import LatentStatistics
from vfm_vae.description import describe
from vfm_vae.options import named_as
from vfm_vae.published_files import pick, read_yaml, remove_training, write_training

__all__ = [
    "denoiser_from_published",
    "ditdh_from_published",
    "lightningdit_from_published",
    "reg_from_published",
    "to_published",
]


def convert(
    source: str,
    out: str,
    config: str | None = None,
    statistics: str | None = None,
    tokenizer: str | None = None,
    class_names: str | None = None,
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
        statistics: The file `latents_stats.pt` of the latents that published weights were trained on. RAE's tokenizer
            normalises its latents itself, so DiTDH's weights go without.
        tokenizer: The tokenizer that makes these latents: a folder, a checkpoint, or `owner/model`. The model is then
            marked as trained on its latents.
        class_names: What the classes are called: a file with a name on each line, by their numbers; or the folder of
            training images, `<folder>/<class>/`, whose classes are numbered in alphabetical order.
    """
    content = read_weights(source, "source")
    names = None if class_names is None else _names(Path(class_names))
    if DIFFUSION.describes(content):
        model = LatentDiffusion.from_checkpoint(source, tokenizer)
        model.name_classes(names or model.class_names)
        remove_training(out)
        model.save_pretrained(out)
        print(f"{out}: the diffusion model of {source}")
        return
    trained, averaged = pick(content, "x_embedder.")
    if (weights := averaged or trained) is None:
        raise ValueError(f"source: {source!r} holds no weights of a LightningDiT, a SiT or a DiTDH (x_embedder.…)")
    is_ditdh = any(name.startswith("s_embedder.") for name in weights)
    if statistics is None and not is_ditdh:
        raise ValueError("statistics: latents are normalised by those of training: give the model's latents_stats.pt")
    published = _read_config(content, config)
    network = denoiser_from_published(weights, published)
    sampling = _sampling_of_rae(network, published) if is_ditdh else _sampling(network, published.get("sample") or {})
    model = LatentDiffusion(network, *sampling).eval()
    model.name_classes(names)
    model.normalization.take(_statistics(statistics, network))
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


def _names(place: Path) -> list[str]:
    """Names of classes by their numbers, from a file of lines or a folder of class folders."""
    if place.is_dir():
        with named_as(root="class_names"):
            return list_classes(place.parent, place.name)
    try:
        return place.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"class_names: there is no folder and no text file {str(place)!r}") from error


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


def _sampling_of_rae(network: Denoiser, config: Mapping[str, Any]) -> tuple[Sampler, Guidance]:
    """How RAE's published samples were drawn, at times that are noise levels; without autoguidance and its partner.

    Raises:
        ValueError: if by another method than Euler's.
    """
    options, guidance, misc = parameters(config, "sampler"), config.get("guidance") or {}, config.get("misc") or {}
    if (method := options.get("sampling_method", "euler")) != "euler":
        raise ValueError(f"config: sampler.sampling_method {method!r} is not supported, only 'euler' is; change it")
    usual = prod(network.latent_shape), UNSHIFTED_SIZE
    size, base = misc.get("time_dist_shift_dim") or usual[0], misc.get("time_dist_shift_base") or usual[1]
    shift: Shift = "auto" if (size, base) == usual else sqrt(base / size)
    sampler = Euler(options.get("num_steps", 50), shift, end=0.999)
    if guidance.get("method", "cfg") != "cfg":
        print(f"guidance is off: the config's {guidance['method']} needs a partner, which model.guidance may name")
        return sampler, Guidance()
    interval = {"start": 1 - guidance.get("t_max", 1.0), "end": 1 - guidance.get("t_min", 0.0)}
    return sampler, Guidance(guidance.get("scale", 1.0), **interval)


def _statistics(path: str | None, network: Denoiser) -> LatentStatistics:
    """Those of a file; without one, of latents that are normalised already."""
    if path is None:
        shape = 1, network.latent_shape[0], 1, 1
        return LatentStatistics(torch.zeros(shape), torch.ones(shape))
    return _matching(LatentStatistics.read(path), network)


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
