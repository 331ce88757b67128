"""The tokenizer as a VAE of the library diffusers."""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from jsonargparse import ArgumentError
from torch import Tensor

from vfm_vae.checkpoints import few
from vfm_vae.modules.posterior import DiagonalGaussian
from vfm_vae.pretrained import CONFIG, FORMAT_VERSION, Pretrained, build, check_config
from vfm_vae.tokenizer import VFMVAE


class WholeModel(ModelMixin):
    """A model that diffusers loads with all of its weights, or not at all; by itself, it leaves missing ones random."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """Loads a model as diffusers does.

        Raises:
            ValueError: if weights are missing in the file, or left over.
        """
        place = str(pretrained_model_name_or_path)
        model, found = super().from_pretrained(place, output_loading_info=True, **kwargs)
        missing, left_over = found["missing_keys"], found["unexpected_keys"]
        if missing or left_over:
            raise ValueError(
                f"the weights in {place!r} are of another model than its {CONFIG}: of {len(model.state_dict())} "
                f"tensors {len(missing)} missing {few(missing)}, {len(left_over)} left over {few(left_over)}"
            )
        return (model, found) if output_loading_info else model


class AutoencoderVFM(WholeModel, AutoencoderMixin, ConfigMixin):
    """A VFMVAE behind the interface of diffusers' `AutoencoderKL`; made by `from_tokenizer` or `from_pretrained`.

    Latents come as the tokenizer makes them, not normalised. Code that knows one factor for all channels trains on
    `(z - shift_factor) * scaling_factor` and decodes `x / scaling_factor + shift_factor`; code that knows channels, on
    `(z - latents_mean) / latents_std`.

    The VFM is loaded when something is encoded for the first time, and is never saved.

    Args:
        description: The tokenizer and its VFM, as the `config.json` of a VFMVAE says them.
        in_channels: Channels of the images.
        out_channels: Channels of the reconstructions.
        latent_channels: C.
        block_out_channels: Channels of the decoder's finest blocks, fine to coarse: one more than there are halvings
            from image to latent, for diffusers computes the compression from their number. Where that is one more than
            there are blocks, the coarsest counts twice.
        sample_size: Side of the images in pixels that pipelines are to expect.
        scaling_factor: 1 over the standard deviation of all latents; 1 where it is not known.
        shift_factor: The mean of all latents; 0 where it is not known.
        latents_mean: Mean of each latent channel, `[C]`, if it is known.
        latents_std: Standard deviation of each latent channel, `[C]`, if it is known.
        force_upcast: Asks pipelines in float16 to decode in float32.

    Attributes:
        network: The VFMVAE.

    Raises:
        ValueError: if the description is in a format that is not this version's, or does not fit.
    """

    network: VFMVAE

    @register_to_config
    def __init__(
        self,
        description: dict[str, Any],
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 32,
        block_out_channels: Sequence[int] = (128, 256, 512, 512, 512),
        sample_size: int = 256,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        force_upcast: bool = True,
    ):
        super().__init__()
        self.network = build_described(VFMVAE, description)
        self.network.absent_vfm = description["vfm"]
        self.use_slicing = False

    @classmethod
    def from_tokenizer(
        cls,
        model: VFMVAE,
        latents_mean: Sequence[float] | Tensor | None = None,
        latents_std: Sequence[float] | Tensor | None = None,
        sample_size: int = 256,
    ) -> "AutoencoderVFM":
        """Wraps a tokenizer, which is not copied.

        Args:
            model: The tokenizer.
            latents_mean: Mean of each channel of its latents, C numbers; also sets `shift_factor`.
            latents_std: Standard deviation of each channel, C numbers; also sets `scaling_factor`.
            sample_size: Side of the images in pixels that pipelines are to expect.

        Raises:
            ValueError: if the statistics are not those of C channels, or the tokenizer does not take the size.
        """
        if not isinstance(model, VFMVAE):
            raise ValueError(f"model: AutoencoderVFM holds a VFMVAE, and no {type(model).__name__}")
        model.check_image_size(sample_size)
        statistics = _statistics(model.latent_channels, latents_mean, latents_std)
        halvings = model.compression.bit_length() - 1
        channels = list(model.decoder.arguments["channels"])
        with torch.device("meta"):  # the structure alone, in which the tokenizer takes its place
            vae = cls(
                description=described(model),
                latent_channels=model.latent_channels,
                block_out_channels=[*reversed(channels), channels[0]][: halvings + 1],
                sample_size=sample_size,
                **statistics,
            )
        vae.network = model
        return vae.train(model.training)

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Encodes images; gradients reach the adapter, not the VFM.

        Args:
            x: Images `[B, 3, H, W]` in [-1, 1].
            return_dict: Whether not to return a tuple.

        Returns:
            `latent_dist`, over latents `[B, C, H / compression, W / compression]`. With a quantizer it is
            deterministic, and its `kl()` is 0.

        Raises:
            ValueError: if the VFM can't be had, or does not take this size.
        """
        if self.network.vfm is None:
            self.network.attach_vfm()
            assert self.network.vfm is not None
            self.network.vfm.to(self.device, self.dtype)
        features = self.network.vfm(x)
        with half_precision(self):
            tokens = [layer.to(self.dtype) for layer in features.layers]
            posterior = self.network.encode_features(tokens, features.grid)
        certain = not isinstance(posterior, DiagonalGaussian)
        logvar = posterior.logvar if isinstance(posterior, DiagonalGaussian) else torch.full_like(posterior.mean, -30.0)
        moments = torch.cat([posterior.mean, logvar], dim=1).to(self.dtype)  # [B, 2C, h, w]
        latent_dist = DiagonalGaussianDistribution(moments, deterministic=certain)
        return AutoencoderKLOutput(latent_dist=latent_dist) if return_dict else (latent_dist,)

    @apply_forward_hook
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Decodes latents; the VFM is not needed.

        Args:
            z: `[B, C, h, w]`, not normalised; h and w divide by `network.decoder.side_multiple`.
            return_dict: Whether not to return a tuple.
            generator: Taken since diffusers hands one over; nothing is random.

        Returns:
            `sample`, float32 images `[B, 3, h · compression, w · compression]`, nominally in [-1, 1], not clamped.
        """
        parts = z.to(self.dtype).split(1 if self.use_slicing else len(z))
        with half_precision(self):
            sample = torch.cat([self.network.decode(part).image for part in parts])
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Reconstructs images `[B, 3, H, W]` in [-1, 1].

        Args:
            sample: The images.
            sample_posterior: Whether to sample the latent instead of taking the most likely one.
            return_dict: Whether not to return a tuple.
            generator: Random numbers for that sample.
        """
        latent_dist = self.encode(sample).latent_dist
        z = latent_dist.sample(generator) if sample_posterior else latent_dist.mode()
        return self.decode(z, return_dict)


def half_precision(model: ModelMixin) -> AbstractContextManager[Any]:
    """Autocast to the precision of the model's weights; where they are in float32, the caller's own autocast stays."""
    return nullcontext() if model.dtype == torch.float32 else torch.autocast(model.device.type, model.dtype)


def described(model: Pretrained) -> dict[str, Any]:
    """What the model's `config.json` says, as JSON has it."""
    return json.loads(json.dumps({"format_version": FORMAT_VERSION, **model.pretrained_config()}))


def build_described(base: type, description: Mapping[str, Any]) -> Any:
    """Builds what `described` describes, without its weights.

    Raises:
        ValueError: if that is another class, no class of this project, in another format, or does not fit.
    """
    check_config(CONFIG, description, base)
    try:
        return build(base, description["model"])
    except ArgumentError as error:
        cause = " ".join(str(error).partition("Given value")[0].split())
        raise ValueError(f"description: does not fit {base.__name__}: {cause}") from error


def _statistics(
    channels: int, mean: Sequence[float] | Tensor | None, std: Sequence[float] | Tensor | None
) -> dict[str, Any]:
    """Those of single channels, and of all latents together; nothing where none are given."""
    if mean is None and std is None:
        return {}
    if mean is None or std is None:
        raise ValueError("latents_mean, latents_std: give both or none")
    mean, std = (torch.as_tensor(x, dtype=torch.float64).flatten() for x in (mean, std))
    if (
        mean.shape != (channels,)
        or std.shape != (channels,)
        or not (mean.isfinite() & std.isfinite() & (std > 0)).all()
    ):
        raise ValueError(
            f"latents_mean, latents_std: {channels} finite numbers each are needed, those of latents_std positive; "
            f"given {mean.tolist()} and {std.tolist()}"
        )
    overall_mean = mean.mean()
    overall_std = (std.square() + (mean - overall_mean).square()).mean().sqrt()
    return {
        "latents_mean": mean.tolist(),
        "latents_std": std.tolist(),
        "scaling_factor": 1 / overall_std.item(),
        "shift_factor": overall_mean.item(),
    }
