"""The partner of autoguidance: a weaker denoiser, which is read, checked and run, but never trained or saved along."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from ldm.compatibility import DIFFUSION, check_statistics, check_tokenizer
from ldm.condition import ClassLabels, Conditioning
from ldm.models.denoiser import Denoiser
from ldm.normalization import LatentNormalization
from vfm_vae import schema
from vfm_vae.checkpoints import fill
from vfm_vae.data.latents import LatentStatistics
from vfm_vae.description import class_path
from vfm_vae.frozen import Frozen, device_of
from vfm_vae.options import named_as
from vfm_vae.pretrained import CONFIG, Pretrained, load, read_pretrained

OPTION = "guidance.partner"
ADVICE = "give a partner that was trained on the same latents"


class Guided(Protocol):
    """What is guided: a denoiser with what it is told and what its latents are, such as a `LatentDiffusion`."""

    model: Denoiser
    conditioning: Conditioning
    normalization: LatentNormalization
    latent_source: dict[str, Any] | None


class Found(NamedTuple):
    """What was read of a partner.

    Attributes:
        network: The denoiser, frozen.
        conditioning: Class of what tells it.
        statistics: Those of the latents that it was trained on.
        latent_source: Which tokenizer's latents these are; None where it is not known.
        text_source: Which text encoder's texts it takes; None where it takes none.
    """

    network: Frozen
    conditioning: str
    statistics: LatentStatistics
    latent_source: dict[str, Any] | None
    text_source: dict[str, Any] | None


class Partner:
    """A weaker denoiser, read when it is first needed.

    It is outside the module registry, so that nothing trains, saves, averages or counts it; copies share it.

    Args:
        source: A checkpoint of training, a folder that `save_pretrained` wrote, or `owner/model` on the hub.
    """

    def __init__(self, source: str):
        self.source = source
        self._compiles = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Itself, for it never changes."""
        return self

    def on(self, device: torch.device) -> Denoiser:
        """The denoiser, on a device.

        Raises:
            ValueError: if it can't be read.
        """
        network = self._found.network
        if device_of(network) != device:
            with torch.inference_mode(False):  # made in it, weights could not be used outside
                network.to(device)
        denoiser: Denoiser = network.network
        return denoiser

    def fingerprint(self) -> str:
        """SHA-256 of its weights, in hexadecimal.

        Raises:
            ValueError: if it can't be read.
        """
        return self._found.network.fingerprint()

    def compile_regions(self) -> None:
        """Compiles the denoiser block by block; once it is read, if it is not yet."""
        self._compiles = True
        if "_found" in vars(self):
            self._found.network.network.compile_regions()

    def check(self, diffusion: Guided) -> None:
        """Checks that it predicts the same of the same latents as the denoiser that it guides.

        Raises:
            ValueError: if it does not, or can't be read.
        """
        place = f"{OPTION}: {self.source!r}"
        theirs, ours = self._found.network.network, diffusion.model
        if _states(theirs) != _states(ours):
            raise ValueError(f"{place} predicts {_states(theirs)}, but the denoiser {_states(ours)}; {ADVICE}")
        told = _told(theirs, self._found.conditioning), _told(ours, class_path(type(diffusion.conditioning)))
        if told[0] != told[1]:
            raise ValueError(f"{place} is told {told[0]}, but the denoiser {told[1]}; give one that is told the same")
        if (encoder := diffusion.conditioning.text_encoder) is not None:
            encoder.go_on_as(self._found.text_source, f"{place} was trained on texts of", "give one of the same")
        source = self._found.latent_source
        check_tokenizer(diffusion.latent_source, source, f"{place} was trained on latents", ADVICE)
        check_statistics(self._found.statistics, diffusion.normalization, OPTION)

    @cached_property
    def _found(self) -> Found:
        """Reads it, and leaves torch's random numbers as they are."""
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
            found = _read(self.source)
        if self._compiles:
            found.network.network.compile_regions()
        return found


def _read(source: str) -> Found:
    """Reads a partner from a file, a folder or the hub.

    Raises:
        ValueError: if it is no diffusion model, or can't be read.
    """
    place = f"{OPTION}: {source!r}"
    if Path(source).is_file() or Path(source).suffix == ".ckpt":
        stored = schema.read(source, OPTION, DIFFUSION)
        config, tensors = stored.config(), stored.model()
    else:
        if Path(source).is_dir() and not Path(source, CONFIG).is_file():
            raise ValueError(
                f"{place} holds no {CONFIG}; give a checkpoint, such as checkpoints/last.ckpt of a run, or a folder "
                "that save_pretrained wrote"
            )
        with named_as(name=OPTION):
            config, tensors = read_pretrained(source, Pretrained)
    parts = config["model"].get("init_args") or {}
    if "model" not in parts or "tokenizer" not in config:
        raise ValueError(f"{place} holds a {config['model']['class_path']}, and no diffusion model")
    denoiser = load(Denoiser, parts["model"], _within("model.", tensors), place, "description")
    statistics = LatentNormalization(denoiser.in_channels)
    fill(statistics, _within("normalization.", tensors), f"{place} lacks statistics of latents")
    conditioning = (parts.get("conditioning") or {}).get("class_path", class_path(ClassLabels))
    known = LatentStatistics(statistics.mean, statistics.std)
    return Found(Frozen(denoiser), conditioning, known, config["tokenizer"], config.get("text"))


def _within(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _states(model: Denoiser) -> str:
    token = f" with a class token of {model.cls_channels}" if model.cls_channels else ""
    return f"latents of {model.latent_shape} (channels, rows, columns){token}"


def _told(model: Denoiser, conditioning: str) -> str:
    return f"{conditioning} values" if model.num_classes is None else f"one of {model.num_classes} classes"
