"""RAE: a frozen vision foundation model as the encoder, a vision transformer as the decoder (arXiv 2510.11690)."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from vfm_vae.checkpoints import fill as fill_weights
from vfm_vae.compilation import compile_regions
from vfm_vae.contracts import VFM
from vfm_vae.derived import fill, shape_of
from vfm_vae.description import class_path
from vfm_vae.diffusers_folder import WEIGHTS, defaults_of, read_diffusers
from vfm_vae.images import Interpolation
from vfm_vae.modules.posterior import PointPosterior
from vfm_vae.options import at_least, named_as, positive, within
from vfm_vae.pretrained_tokenizer import PretrainedTokenizer
from vfm_vae.towers import config_of
from vfm_vae.transformers_vfm import TransformersVFM
from vfm_vae.types import Decoded, Posterior, VFMFeatures
from vfm_vae.vfm import check_frozen

STD_FLOOR = 1e-5
"""Added to standard deviations by which latents are divided, as in published RAEs."""

DIFFUSERS_STATISTICS = ("encoder_mean", "encoder_std", "_latents_mean", "_latents_std")

ENCODERS: Mapping[str, Mapping[str, Any]] = {
    "dinov2": {"model_type": "dinov2_with_registers", "image_size": 518},
    "siglip2": {"model_type": "siglip_vision_model", "image_size": 256},
    "mae": {"model_type": "vit_mae", "image_size": 224},
}
"""Encoders by diffusers' `encoder_type`, as transformers' configs have them."""

HEAD_WIDTH = 64
"""Channels of each of their attention heads."""


class RAE(PretrainedTokenizer):
    """Frozen VFM → normalised tokens → vision transformer.

    The latent is the sum of the VFM's `layers`, each normalised over its channels without a gain (one layer in RAE, the
    last block's output before the final norm, so `layers: [-2]` of a FrozenVFM; several in RAE v2), and then
    normalised for each channel and position by statistics of training images. These are measured before the first step
    of training, or come with published weights. Nothing is trained but the decoder, which is diffusers' `RAEDecoder`.

    Args:
        vfm: The encoder. Without one, the model can only decode.
        latent_channels: Channels of the latent, which are the VFM's.
        compression: Sides of the image over sides of the latent, which are the VFM's pixels for each token.
        image_size: Height and width of the images in pixels; the decoder's table of positions is for this size alone.
        decoder_width: Width of the decoder.
        decoder_depth: Number of the decoder's blocks.
        decoder_heads: Number of attention heads in each block.
        decoder_mlp_width: Width of the hidden layer in each block's MLP.
        norm_eps: Added to the variance of a token's channels where they are normalised.
        pixel_mean: Mean of the pixels in [0, 1] by which the decoder's output is denormalised, for each colour.
        pixel_std: Standard deviation of the pixels, likewise.
        statistics_images: How many training images the statistics are measured on; 0 leaves latents as they are.

    Attributes:
        mean: Mean of the latents over images, `[C, h, w]`.
        std: Standard deviation of the latents over images, `[C, h, w]`.

    Raises:
        ValueError: if the parts do not fit each other, or there is neither a VFM nor what follows from it.
    """

    decoding_arguments: ClassVar[frozenset[str]] = frozenset(
        {"latent_channels", "compression", "image_size", "pixel_mean", "pixel_std", "statistics_images"}
        | {"decoder_width", "decoder_depth", "decoder_heads", "decoder_mlp_width"}
    )
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        vfm: VFM | None = None,
        latent_channels: int | None = None,
        compression: int | None = None,
        image_size: int = 256,
        decoder_width: int = 1152,
        decoder_depth: int = 28,
        decoder_heads: int = 16,
        decoder_mlp_width: int = 4096,
        norm_eps: float = 1e-6,
        pixel_mean: Sequence[float] = (0.485, 0.456, 0.406),
        pixel_std: Sequence[float] = (0.229, 0.224, 0.225),
        statistics_images: int = 10_000,
    ) -> None:
        from diffusers.models.autoencoders.autoencoder_rae import RAEDecoder  # takes seconds to import

        super().__init__()
        if vfm is not None:
            latent_channels = latent_channels or vfm.widths[0]
            compression = compression or round(vfm.stride)
        if latent_channels is None or compression is None:
            raise ValueError("latent_channels, compression: a RAE without a VFM needs both")
        numbers = {"latent_channels": latent_channels, "decoder_depth": decoder_depth}
        at_least(1, **numbers, decoder_mlp_width=decoder_mlp_width)
        at_least(0, statistics_images=statistics_images)
        positive(norm_eps=norm_eps, pixel_std=pixel_std)
        within(0, 1, pixel_mean=pixel_mean)
        _check_sizes(image_size, compression, decoder_width, decoder_heads)
        if len(pixel_mean) != 3 or len(pixel_std) != 3:
            raise ValueError(f"pixel_mean, pixel_std: 3 numbers each, given {list(pixel_mean)} and {list(pixel_std)}")
        self.vfm, self.norm_eps, self.statistics_images = vfm, norm_eps, statistics_images
        # A checkpoint describes the model without the VFM that these follow from.
        self.arguments |= {"latent_channels": latent_channels, "compression": compression}
        self.decoder = RAEDecoder(
            hidden_size=latent_channels,
            decoder_hidden_size=decoder_width,
            decoder_num_hidden_layers=decoder_depth,
            decoder_num_attention_heads=decoder_heads,
            decoder_intermediate_size=decoder_mlp_width,
            num_patches=(image_size // compression) ** 2,
            patch_size=compression,
            image_size=image_size,
        )
        self.register_buffer("mean", torch.zeros(self.latent_shape))
        self.register_buffer("std", torch.ones(self.latent_shape))
        for name, values in {"pixel_mean": pixel_mean, "pixel_std": pixel_std}.items():
            self.register_buffer(name, torch.tensor(list(values)).view(3, 1, 1), persistent=False)
        if vfm is not None:
            self._check_fit(vfm)

    @classmethod
    def complete(cls, init_args: Mapping[str, Any]) -> dict[str, Any]:
        """Fills in the latent's channels and the compression, which follow from the VFM, see `vfm_vae.derived`."""
        is_known = all(init_args.get(name) is not None for name in ("latent_channels", "compression"))
        shape = None if is_known else shape_of(init_args.get("vfm"))
        if shape is None:
            return dict(init_args)
        return fill(init_args, latent_channels=shape.widths[0], compression=round(shape.stride))

    @classmethod
    def from_diffusers(cls, name: str | Path, vfm: bool = True, vfm_weights: str | None = None, **hub: Any) -> Self:
        """Loads a folder that diffusers' `AutoencoderRAE.save_pretrained` wrote, or such a one of the hub.

        Latents and images are those of `AutoencoderRAE`, but for images in [-1, 1].

        Args:
            name: The folder, or the hub's `owner/model`.
            vfm: Whether to keep the encoder, which decoding does not need; without it, the folder may lack it, too.
            vfm_weights: File with the encoder's weights, to take instead of those beside the decoder's.
            **hub: Options of `huggingface_hub.snapshot_download`: `revision`, `token`, `cache_dir`, …

        Returns:
            The model, in eval mode.

        Raises:
            ValueError: if there is no such model, or its files do not fit each other.
        """
        config, tensors, file = _read_diffusers(name, hub)
        described = _encoder_arguments(config, tensors)
        encoder = None
        if vfm_weights is not None or any(part.startswith("encoder.") for part in tensors):
            with named_as(weights="name" if vfm_weights is None else "vfm_weights"):
                encoder = TransformersVFM(**described, weights=vfm_weights or str(file))
        elif vfm:
            raise ValueError(
                f"name: {str(name)!r} has a decoder alone: its {file.name} lacks the encoder's tensors (encoder.…); "
                "give a file with them as vfm_weights, or only decode, with RAE.from_diffusers(…, vfm=False)"
            )
        model = cls(
            encoder,
            latent_channels=config["encoder_hidden_size"],
            compression=config["patch_size"],
            image_size=config["encoder_input_size"] // config["encoder_patch_size"] * config["patch_size"],
            decoder_width=config["decoder_hidden_size"],
            decoder_depth=config["decoder_num_hidden_layers"],
            decoder_heads=config["decoder_num_attention_heads"],
            decoder_mlp_width=config["decoder_intermediate_size"],
            norm_eps=config_of(described["name"], described["model_args"]).layer_norm_eps,
            pixel_mean=described["mean"],
            pixel_std=described["std"],
            statistics_images=0,
        )
        weights = {name: tensor for name, tensor in tensors.items() if name.startswith("decoder.")}
        weights.pop("decoder.decoder_pos_embed", None)  # a fixed table, which some files hold
        scale = config.get("scaling_factor") or 1.0  # on the normalised latents
        mean, std = (tensors[f"_latents_{name}"].float().expand(1, *model.latent_shape)[0] for name in ("mean", "std"))
        std = std if scale == 1 else (std + STD_FLOOR) / scale - STD_FLOOR
        fill_weights(model, weights | {"mean": mean, "std": std}, f"name: the weights in {str(name)!r} do not fit")
        if encoder is None:
            model.absent_vfm = {"class_path": class_path(TransformersVFM), **described, "fingerprint": None}
        elif not vfm:
            model.absent_vfm, model.vfm = encoder.source(), None
        return model.eval()

    def attach_vfm(self, weights: str | None = None) -> Self:
        """Loads the VFM that is known by name, and returns the model.

        Args:
            weights: File with its weights, to take instead of those that training read or of a download; of a RAE that
                comes from a folder of diffusers, that folder's file.

        Raises:
            ValueError: if its weights can't be had, or they are others.
        """
        source = self.absent_vfm or {}
        if weights is None and source.get("norm_affine") is False and source.get("weights") is None:
            raise ValueError(
                f"vfm_weights: the encoder {source['name']!r} lies beside its decoder in a folder of diffusers; give "
                f"that folder's {WEIGHTS[0]}, or the folder itself instead of this one"
            )
        vfm = self.load_named_vfm(weights)
        self._check_fit(vfm)
        self.vfm = vfm
        return self

    def _check_fit(self, vfm: VFM) -> None:
        check_frozen(vfm)
        if set(vfm.widths) != {self.latent_channels}:
            raise ValueError(
                f"{vfm.name} gives layers {list(vfm.layers)} of widths {list(vfm.widths)}, but this RAE has "
                f"latent_channels={self.latent_channels}, to which they are summed"
            )
        if not math.isclose(vfm.stride, self.compression):
            raise ValueError(
                f"{vfm.name} has a token for every {vfm.stride:g} pixels, but this RAE has "
                f"compression={self.compression}; change the VFM's input_scale"
            )

    @property
    def latent_channels(self) -> int:
        """Channels of the latent."""
        return self.decoder.decoder_embed.in_features

    @property
    def compression(self) -> int:
        """Sides of the image over sides of the latent."""
        return self.decoder.patch_size

    @property
    def image_size(self) -> int:
        """Height and width of the images in pixels."""
        return self.decoder.image_size

    @property
    def grid(self) -> int:
        """Rows, and columns, of the latent."""
        return self.image_size // self.compression

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of the latent."""
        return self.latent_channels, self.grid, self.grid

    @property
    def side_multiple(self) -> int:
        """What the latent's sides must divide by: the only ones that the decoder takes."""
        return self.grid

    @property
    def interpolation(self) -> Interpolation:
        """How training resizes images: as suits the VFM.

        Raises:
            ValueError: if the model has no VFM.
        """
        return self._encoder().target_interpolation

    @property
    def last_decoding_weight(self) -> Tensor:
        """The decoder's last weight, where the adaptive adversarial weight compares gradients."""
        return self.decoder.decoder_pred.weight

    def check_image_size(self, size: int) -> None:
        """Checks that images have the size that the decoder was made for.

        Raises:
            ValueError: if not.
        """
        if size != self.image_size:
            raise ValueError(
                f"image_size: {size} does not fit this RAE, whose decoder has positions for {self.image_size} px "
                f"alone; give {self.image_size}, or train one with model.image_size={size}"
            )

    def compile_regions(self) -> None:
        """Compiles decoder and VFM block by block."""
        compile_regions(self.decoder.decoder_layers)
        if self.vfm is not None:
            self.vfm.compile_regions()

    def encode(self, images: Tensor) -> Posterior:
        """Encodes images `[B, 3, H, W]` in [-1, 1]; nothing is random.

        Those of another size than the decoder takes are normalised by statistics that are averaged over positions, or
        repeated, as their own ones need.

        Raises:
            ValueError: if the model has no VFM, or it does not take this size.
        """
        return self.encode_with_features(images)[0]

    def encode_with_features(self, images: Tensor) -> tuple[Posterior, VFMFeatures | None]:
        """Encodes images, and returns the VFM's features, of which the latents are made, too."""
        features = self._encoder()(images)
        mean, std = (F.adaptive_avg_pool2d(values, features.grid) for values in (self.mean, self.std))
        return PointPosterior((self._raw(features) - mean) / (std + STD_FLOOR)), features

    def raw_latents(self, images: Tensor) -> Tensor:
        """Latents of images before statistics normalise them, float32 `[B, C, h, w]`."""
        return self._raw(self._encoder()(images))

    def take_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Sets the statistics by which latents are normalised, each `[C, h, w]`."""
        self.mean.copy_(mean)
        self.std.copy_(std)

    def _encoder(self) -> VFM:
        if self.vfm is None:
            raise ValueError("model: this RAE has no VFM to encode with; give model.vfm, or call attach_vfm()")
        return self.vfm

    def _raw(self, features: VFMFeatures) -> Tensor:
        layers = [F.layer_norm(tokens, tokens.shape[-1:], eps=self.norm_eps) for tokens in features.layers]
        tokens = torch.stack(layers).sum(0) if len(layers) > 1 else layers[0]  # [B, N, C]
        return tokens.mT.unflatten(2, features.grid)  # [B, C, h, w]

    def decode(self, z: Tensor) -> Decoded:
        """Decodes latents `[B, C, h, w]` to images `[B, 3, h · compression, w · compression]`, of one size only.

        Raises:
            ValueError: if the latents are of another size.
        """
        if z.shape[1:] != self.latent_shape:
            raise ValueError(
                f"latents: this RAE decodes {list(self.latent_shape)} alone, as its decoder has positions for "
                f"{self.image_size} px; given {list(z.shape[1:])}"
            )
        z = z * (self.std + STD_FLOOR) + self.mean
        patches = self.decoder(z.flatten(2).mT.contiguous()).logits  # [B, N, 3 · compression²]
        images = self.decoder.unpatchify(patches) * self.pixel_std + self.pixel_mean  # in [0, 1]
        return Decoded(2 * images - 1, ())


def _check_sizes(image_size: int, compression: int, decoder_width: int, decoder_heads: int) -> None:
    at_least(1, image_size=image_size, compression=compression)
    at_least(1, decoder_width=decoder_width, decoder_heads=decoder_heads)
    if image_size % compression:
        raise ValueError(f"image_size: must be a multiple of {compression}, the compression, given {image_size}")
    if decoder_width % (step := math.lcm(4, decoder_heads)):  # 4 for sine and cosine of rows and columns
        raise ValueError(
            f"decoder_width: must be a multiple of {step} with decoder_heads={decoder_heads}, given {decoder_width}"
        )


def _read_diffusers(name: str | Path, hub: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor], Path]:
    """What the `config.json` of a RAE in diffusers' format says, its tensors by name, and the file that holds them."""
    from diffusers.models.autoencoders.autoencoder_rae import AutoencoderRAE

    config, tensors, file = read_diffusers(name, AutoencoderRAE, hub)
    config = defaults_of(AutoencoderRAE) | config
    if (kind := config["encoder_type"]) not in ENCODERS:
        raise ValueError(f"name: {str(name)!r} has encoder_type={kind!r}; known are {', '.join(ENCODERS)}")
    if not config["reshape_to_2d"]:
        raise ValueError(f"name: {str(name)!r} has reshape_to_2d=false; only latents with rows and columns are known")
    if missing := [statistic for statistic in DIFFUSERS_STATISTICS if statistic not in tensors]:
        raise ValueError(f"name: the weights in {str(name)!r} lack {missing}; they are no AutoencoderRAE's")
    return config, tensors, file


def _encoder_arguments(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of the encoder of a RAE in diffusers' format, which resizes images as there.

    Args:
        config: The RAE's `config.json`.
        tensors: The RAE's tensors, of which mean and standard deviation of pixels are taken.
    """
    kind, width, depth = (config[f"encoder_{name}"] for name in ("type", "hidden_size", "num_hidden_layers"))
    sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": width // HEAD_WIDTH}
    patch_size = config["encoder_patch_size"]
    return {
        "name": f"rae_{kind}_{width}x{depth}",
        "layers": [-2],
        "input_scale": patch_size / config["patch_size"],
        "model_args": {**ENCODERS[kind], **sizes, "patch_size": patch_size},
        "antialias": False,
        "interpolation": "bicubic",
        "target_interpolation": "bicubic",
        "norm_affine": False,
        "mean": tensors["encoder_mean"].flatten().tolist(),
        "std": tensors["encoder_std"].flatten().tolist(),
    }
