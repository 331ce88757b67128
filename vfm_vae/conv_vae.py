"""ConvVAE: the convolutional VAE of latent diffusion (arXiv 2112.10752), alone or aligned to a VFM (2501.01423)."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from vfm_vae.checkpoints import fill
from vfm_vae.compilation import compile_regions
from vfm_vae.contracts import VFM
from vfm_vae.diffusers_folder import read_diffusers
from vfm_vae.frozen import sha256_of
from vfm_vae.losses.alignment import pool_tokens
from vfm_vae.modules.maps import without_autocast
from vfm_vae.modules.posterior import DiagonalGaussian
from vfm_vae.options import at_least, within
from vfm_vae.pretrained import CONFIG
from vfm_vae.pretrained_tokenizer import PretrainedTokenizer
from vfm_vae.types import Decoded, Posterior, VFMFeatures
from vfm_vae.vfm import check_frozen

# Blocks of diffusers' encoder and decoder, without attention and with it.
DOWN_BLOCKS = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
UP_BLOCKS = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")

# Options of diffusers' AutoencoderKL that have to be as here, and those that change neither latents nor images.
FIXED = {"in_channels": 3, "out_channels": 3, "act_fn": "silu"}
IGNORED = {"sample_size", "scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast"}

# Names of an attention's layers in folders of before diffusers renamed them, as that of SD-VAE is.
FORMER_LAYERS = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


class ConvVAE(PretrainedTokenizer):
    """Convolutional encoder → Gaussian posterior → convolutional decoder; the networks of diffusers' `AutoencoderKL`.

    The defaults are those of SD-VAE (f8d4). VA-VAE (f16d32) has channels `[128, 128, 256, 256, 512]`, 32 latent
    channels, attention at level 4, and a VFM. Latents come as the encoder makes them: no scaling factor is applied.

    Args:
        latent_channels: Channels of the latent.
        channels: Channels of each level, from the finest to the coarsest; each level but the last halves the sides.
        num_res_blocks: Number of residual blocks at each level of the encoder; the decoder has one more.
        attention: Levels at which self-attention follows each block, counted from 0 for the finest.
        middle_attention: Whether the coarsest level has self-attention between its two innermost blocks.
        norm_groups: Number of groups of the normalisations.
        quant_conv: Whether a pointwise convolution follows the encoder and another one precedes the decoder.
        vfm: The VFM that training aligns the latents to. Without one, the model still encodes and decodes.
        alignment_channels: Width of the VFM's features, which latents are projected to; by default the VFM's own.

    Raises:
        ValueError: if an option lies outside its range, or does not fit another.
    """

    def __init__(
        self,
        latent_channels: int = 4,
        channels: Sequence[int] = (128, 256, 512, 512),
        num_res_blocks: int = 2,
        attention: Sequence[int] = (),
        middle_attention: bool = True,
        norm_groups: int = 32,
        quant_conv: bool = True,
        vfm: VFM | None = None,
        alignment_channels: int | None = None,
    ) -> None:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL  # takes seconds to import

        super().__init__()
        numbers = {"latent_channels": latent_channels, "num_res_blocks": num_res_blocks}
        _check_options(channels, attention, norm_groups, **numbers, alignment_channels=alignment_channels)
        if vfm is not None:
            check_frozen(vfm)
            if alignment_channels not in (None, vfm.width):
                raise ValueError(f"alignment_channels: {vfm.name} is {vfm.width} wide, given {alignment_channels}")
            alignment_channels = vfm.width
        self.arguments["alignment_channels"] = alignment_channels  # known without the VFM, too
        networks = AutoencoderKL(**to_diffusers_config(self.arguments))
        self.encoder, self.decoder = networks.encoder, networks.decoder
        self.quant_conv, self.post_quant_conv = networks.quant_conv, networks.post_quant_conv
        self.alignment = (
            None if alignment_channels is None else nn.Conv2d(latent_channels, alignment_channels, 1, bias=False)
        )
        self.vfm = vfm

    @classmethod
    def from_diffusers(cls, name: str | Path, vfm: bool = True, vfm_weights: str | None = None, **hub: Any) -> Self:
        """Loads a folder that diffusers' `AutoencoderKL.save_pretrained` wrote, or such a one of the hub.

        Its `scaling_factor` is left out: diffusion models here normalise latents by statistics of each channel.

        Args:
            name: The folder, or the hub's `owner/model`.
            vfm: Taken as by other tokenizers; an `AutoencoderKL` has no VFM.
            vfm_weights: Likewise.
            **hub: Options of `huggingface_hub.snapshot_download`: `revision`, `token`, `cache_dir`, …

        Returns:
            The model, in eval mode.

        Raises:
            ValueError: if there is no such model, it has parts that a ConvVAE has not, or weights are missing.
        """
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        config, tensors, _ = read_diffusers(name, AutoencoderKL, hub, unread=IGNORED)
        place = f"name: {str(name)!r}"
        model = cls(**from_diffusers_config(config, place))
        fill(model, with_present_names(tensors), f"{place}: the weights are of another model than its {CONFIG}")
        return model.eval().attach_vfm(vfm_weights)

    def to_diffusers(self, folder: str | Path, scaling_factor: float = 1.0, sample_size: int = 256) -> None:
        """Writes a folder that diffusers' `AutoencoderKL.from_pretrained` reads; the projection for a VFM is left out.

        Args:
            folder: Is made if it is missing.
            scaling_factor: What diffusers' pipelines multiply latents by: 1 over their standard deviation.
            sample_size: Side of the images in pixels that pipelines are to expect.
        """
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        weights = {name: w for name, w in self.state_dict().items() if not name.startswith("alignment.")}
        config = to_diffusers_config(self.arguments)
        with torch.device("meta"):
            networks = AutoencoderKL(**config, scaling_factor=scaling_factor, sample_size=sample_size)
        networks.load_state_dict(weights, assign=True)
        networks.save_pretrained(folder)

    @property
    def latent_channels(self) -> int:
        """Channels of the latent."""
        return self.arguments["latent_channels"]

    @property
    def compression(self) -> int:
        """Sides of the image over sides of the latent."""
        return 2 ** (len(self.arguments["channels"]) - 1)

    def check_image_size(self, size: int) -> None:
        """Checks that images of this size can be tokenized, and aligned to the VFM where there is one.

        Raises:
            ValueError: if not.
        """
        super().check_image_size(size)
        if self.vfm is not None and (tokens := self.vfm.grid(size, size)[0]) % (cells := size // self.compression):
            raise ValueError(
                f"vfm: {self.vfm.name} has {tokens} tokens along a side of {size} pixels, which can't be averaged to "
                f"the {cells} positions of the latent; change its input_scale, or the number of channels"
            )

    def latent_identity(self) -> dict[str, Any] | None:
        """What a cache of latents, and a model trained on it, say of where they come from.

        The fingerprint is of the encoder's weights and of `norm_groups`, which their shapes do not tell: models that
        differ in their decoders or in their alignment alone share it.
        """
        parts = ("encoder.", "quant_conv.")
        encoding = {name: weight for name, weight in self.state_dict().items() if name.startswith(parts)}
        return {
            "tokenizer": type(self).__name__,
            "fingerprint": sha256_of(encoding, f"{self.arguments['norm_groups']} groups"),
            "channels": self.latent_channels,
            "compression": self.compression,
        }

    def encode(self, images: Tensor) -> Posterior:
        """The posterior of latents `[B, C, H / compression, W / compression]`, of images `[B, 3, H, W]` in [-1, 1]."""
        moments = self.encoder(images)
        moments = moments if self.quant_conv is None else self.quant_conv(moments)
        return DiagonalGaussian(moments.contiguous())  # noise is drawn in the order of memory

    def decode(self, z: Tensor) -> Decoded:
        """Images `[B, 3, h · compression, w · compression]` of latents `[B, C, h, w]`; of one resolution alone."""
        return Decoded(self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z)), ())

    @property
    def last_encoding_weight(self) -> Tensor:
        """Where the adaptive alignment weight compares gradients: the encoder's last convolution, as in VA-VAE."""
        return self.encoder.conv_out.weight

    @property
    def last_decoding_weight(self) -> Tensor:
        """Where an adaptive adversarial weight compares gradients: the decoder's last convolution."""
        return self.decoder.conv_out.weight

    def align(self, z: Tensor) -> Tensor:
        """Projects latents `[B, C, h, w]` to the VFM's width, `[B, D, h, w]`, in float32.

        Raises:
            ValueError: if the model has no such projection.
        """
        if self.alignment is None:
            raise ValueError("alignment_channels: this ConvVAE was made without a VFM to align latents to; give vfm")
        with without_autocast(z):
            return self.alignment(z.to(self.alignment.weight.dtype))

    def alignment_target(self, features: VFMFeatures, z: Tensor) -> Tensor:
        """The VFM's final tokens, averaged over each of the latents' positions, `[B, D, h, w]`."""
        return pool_tokens(features.tokens, features.grid, z.shape[2:])

    def compile_regions(self) -> None:
        """Compiles the residual blocks, in place."""
        from diffusers.models.resnet import ResnetBlock2D

        compile_regions(block for block in self.modules() if isinstance(block, ResnetBlock2D))
        if self.vfm is not None:
            self.vfm.compile_regions()


def from_diffusers_config(config: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The arguments of a ConvVAE with the networks of an `AutoencoderKL`.

    Args:
        config: What the `config.json` of that one says.
        place: Begins the message.

    Raises:
        ValueError: if it has options that a ConvVAE does not have.
    """
    given = {name: value for name, value in config.items() if not name.startswith("_") and name not in IGNORED}
    arguments = {
        "latent_channels": given.get("latent_channels", 4),
        "channels": given.get("block_out_channels", [64]),
        "num_res_blocks": given.get("layers_per_block", 1),
        "attention": [n for n, block in enumerate(given.get("down_block_types", ())) if block == DOWN_BLOCKS[True]],
        "middle_attention": given.get("mid_block_add_attention", True),
        "norm_groups": given.get("norm_num_groups", 32),
        "quant_conv": given.get("use_quant_conv", True),
    }
    taken = to_diffusers_config(arguments)
    if others := [f"{name}={value}" for name, value in given.items() if name not in taken or value != taken[name]]:
        raise ValueError(f"{place}: its {CONFIG} has {', '.join(others)}, which a ConvVAE can't have")
    return arguments


def to_diffusers_config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the `AutoencoderKL` with the networks of a ConvVAE of these arguments."""
    attends = [level in arguments["attention"] for level in range(len(arguments["channels"]))]
    return FIXED | {
        "down_block_types": [DOWN_BLOCKS[attending] for attending in attends],
        "up_block_types": [UP_BLOCKS[attending] for attending in reversed(attends)],
        "block_out_channels": list(arguments["channels"]),
        "layers_per_block": arguments["num_res_blocks"],
        "latent_channels": arguments["latent_channels"],
        "norm_num_groups": arguments["norm_groups"],
        "use_quant_conv": arguments["quant_conv"],
        "use_post_quant_conv": arguments["quant_conv"],
        "mid_block_add_attention": arguments["middle_attention"],
    }


def with_present_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names that diffusers gives them today, of folders that it wrote before it renamed some."""
    former = re.compile("|".join(map(re.escape, FORMER_LAYERS)))
    return {former.sub(lambda match: FORMER_LAYERS[match[0]], name): tensor for name, tensor in tensors.items()}


def _check_options(channels: Sequence[int], attention: Sequence[int], norm_groups: int, **numbers: int | None) -> None:
    if not channels:
        raise ValueError("channels: needs a number for each level, given none")
    at_least(1, channels=channels, norm_groups=norm_groups, **numbers)
    within(0, len(channels) - 1, attention=attention)
    if odd := [width for width in channels if width % norm_groups]:
        raise ValueError(f"channels: must be multiples of norm_groups={norm_groups}, given {odd}")
