"""VFM-VAE: a frozen vision foundation model as the encoder of a VAE (arXiv 2510.18457)."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, final

import torch
from torch import Tensor, nn

from vfm_vae.checkpoints import read_json
from vfm_vae.compilation import compile_regions
from vfm_vae.contracts import VFM
from vfm_vae.conv_vae import ConvVAE
from vfm_vae.derived import fill, options_of, shape_of
from vfm_vae.frozen import Frozen, sha256_of
from vfm_vae.images import Interpolation
from vfm_vae.losses.alignment import pool_tokens
from vfm_vae.modules.adapter import Adapter, AttentionProjection
from vfm_vae.modules.decoder import Decoder
from vfm_vae.modules.posterior import DiagonalGaussian
from vfm_vae.modules.quantizer import QuantizedPosterior, VectorQuantizer
from vfm_vae.options import named_as
from vfm_vae.pretrained import CONFIG, model_folder
from vfm_vae.pretrained_tokenizer import PretrainedTokenizer
from vfm_vae.rae import RAE
from vfm_vae.types import Decoded, Posterior, VFMFeatures
from vfm_vae.vfm import FORMERLY, check_frozen

CARD = """# VFM-VAE: latents of {channels} channels, {compression} times smaller than the image

A tokenizer for latent diffusion models (arXiv 2510.18457). Its encoder is the frozen {vfm}, whose weights are not in
here.

```python
from vfm_vae.tokenizer import VFMVAE

model = VFMVAE.from_pretrained("this folder, or owner/model on the hub")
z = model.encode(images).mode()  # images [B, 3, H, W] in [-1, 1]
images = model.decode(z).image
```
"""

DIFFUSERS: Mapping[Any, type[ConvVAE | RAE]] = {"AutoencoderKL": ConvVAE, "AutoencoderRAE": RAE}
"""Tokenizers by their classes in diffusers, whose folders they read by `from_diffusers`."""


class VFMVAE(PretrainedTokenizer):
    """Frozen VFM → adapter → posterior → adapter → decoder.

    Args:
        adapter: Maps VFM tokens to latents, and latents to the decoder's input.
        decoder: Maps the adapted latents to images.
        vfm: The encoder. Without one, the model can only decode, or encode VFM features that it is given.
        quantizer: Makes the latent discrete; without one it is Gaussian.

    Raises:
        ValueError: if the parts do not fit each other.
    """

    def __init__(
        self,
        adapter: Adapter,
        decoder: Decoder,
        vfm: VFM | None = None,
        quantizer: VectorQuantizer | None = None,
    ):
        super().__init__()
        self.vfm = vfm
        self.adapter = adapter
        self.decoder = decoder
        self.quantizer = quantizer
        self._check_quantizer()
        if vfm is not None:
            self._check_fit(vfm)

    @classmethod
    def complete(cls, init_args: Mapping[str, Any]) -> dict[str, Any]:
        """Fills in the widths and the factors that follow from the VFM and from each other, see `vfm_vae.derived`."""
        adapter, decoder = init_args.get("adapter"), init_args.get("decoder")
        derived = ("feature_channels", "unshuffle", "alignment_channels")
        is_known = all(options_of(adapter).get(name) is not None for name in derived)
        shape = None if is_known else shape_of(init_args.get("vfm"))
        if shape is not None:
            unshuffle = max(1, round(Decoder.upscaling_of(**options_of(decoder)) / shape.stride))
            widths = {"feature_channels": list(shape.widths), "alignment_channels": shape.width}
            adapter = fill(adapter, unshuffle=unshuffle, **widths)
        decoder = fill(decoder, in_channels=options_of(adapter).get("decoded_channels"))
        return {**init_args, "adapter": adapter, "decoder": decoder}

    def attach_vfm(self, weights: str | None = None) -> Self:
        """Loads the VFM that is known by name, and returns the model.

        Args:
            weights: File with its weights, to take instead of those that training read or of a download.

        Raises:
            ValueError: if its weights can't be had, or they are others.
        """
        vfm = self.load_named_vfm(weights)
        self._check_fit(vfm)
        self.vfm = vfm
        return self

    def model_card(self) -> str:
        """What the card says."""
        source = self.vfm_source()
        name = "vision foundation model" if source is None else source["name"]
        return CARD.format(channels=self.latent_channels, compression=self.compression, vfm=name)

    def _check_quantizer(self) -> None:
        if self.adapter.gaussian != (self.quantizer is None):
            raise ValueError(
                "quantizer: goes with an adapter of gaussian=False, and only with such: "
                f"got gaussian={self.adapter.gaussian} with{'out' if self.quantizer is None else ''} a quantizer"
            )
        if self.quantizer is not None and self.quantizer.width != self.latent_channels:
            raise ValueError(
                f"quantizer: is {self.quantizer.width} wide, but the adapter has latent_channels={self.latent_channels}"
            )

    def _check_fit(self, vfm: VFM) -> None:
        check_frozen(vfm)
        widths = list(vfm.widths)
        if self.adapter.feature_channels != widths:
            raise ValueError(
                f"{vfm.name} gives layers {list(vfm.layers)} of widths {widths}, "
                f"but the adapter has feature_channels={self.adapter.feature_channels}"
            )
        if self.adapter.alignment_channels != vfm.width:
            raise ValueError(
                f"{vfm.name} is {vfm.width} wide, but the adapter has "
                f"alignment_channels={self.adapter.alignment_channels}"
            )
        compression = vfm.stride * self.adapter.unshuffle
        if compression != self.decoder.upscaling:
            raise ValueError(
                f"{vfm.name} with a token for every {vfm.stride:g} pixels and unshuffle {self.adapter.unshuffle} "
                f"compresses {compression:g} times, but {len(self.decoder.blocks)} decoder blocks enlarge "
                f"{self.decoder.upscaling} times; change unshuffle, the VFM's input_scale, or the decoder's "
                "compression or number of channels"
            )

    @property
    def latent_channels(self) -> int:
        """Channels of the latent."""
        return self.adapter.latent_channels

    @property
    def compression(self) -> int:
        """Sides of the image over sides of the latent."""
        return self.decoder.upscaling

    @property
    def side_multiple(self) -> int:
        """What the sides of the latent must divide by."""
        return self.decoder.side_multiple

    @property
    def interpolation(self) -> Interpolation:
        """How training resizes images: as suits the VFM.

        Raises:
            ValueError: if the model has no VFM.
        """
        if self.vfm is None:
            raise ValueError("model: training needs a VFM, but model.vfm is None")
        return self.vfm.target_interpolation

    def compile_regions(self) -> None:
        """Compiles adapter, decoder and VFM layer by layer, each where it is first called."""
        compile_regions((m for m in self.adapter.modules() if isinstance(m, AttentionProjection)), dynamic=True)
        self.decoder.compile_regions()
        if self.vfm is not None:
            self.vfm.compile_regions()

    def latent_identity(self) -> dict[str, Any] | None:
        """What a cache of latents, and a model trained on it, say of where they come from.

        The fingerprint is of all that makes the latents and of nothing else: tokenizers that differ in their decoders
        alone share it. It is None where the VFM's weights are not known; and where nothing is known of the VFM, there
        is no identity.
        """
        source = self.vfm_source()
        if source is None:
            return None
        encoding = nn.ModuleDict({"layers": self.adapter.layers, "fuse": self.adapter.fuse}).state_dict()
        if self.quantizer is not None:
            encoding["codebooks"] = self.quantizer.codebooks
        known, settings = source["fingerprint"] is not None, _encoding_settings(source, self.adapter.unshuffle)
        return {
            "vfm": source["name"],
            "fingerprint": sha256_of(encoding, str(settings)) if known else None,
            "channels": self.latent_channels,
            "compression": self.compression,
        }

    def encode(self, images: Tensor) -> Posterior:
        """Encodes images.

        Args:
            images: `[B, 3, H, W]` in [-1, 1].

        Returns:
            The posterior of latents `[B, C, H / compression, W / compression]`; the caller chooses `mode()` or
            `sample()`.

        Raises:
            ValueError: if the model has no VFM, or the VFM does not take this size.
        """
        return self.encode_with_features(images)[0]

    def encode_with_features(self, images: Tensor) -> tuple[Posterior, VFMFeatures | None]:
        """Encodes images `[B, 3, H, W]` in [-1, 1]; returns the VFM's features, too, of which the posterior is made.

        Raises:
            ValueError: if the model has no VFM, or the VFM does not take this size.
        """
        if self.vfm is None:
            raise ValueError("this VFMVAE has no VFM: pass vfm=FrozenVFM(…), or call encode_features")
        features = self.vfm(images)
        return self.encode_features(features.layers, features.grid), features

    def encode_features(
        self, features: Sequence[Tensor], grid: tuple[int, int] | None = None
    ) -> DiagonalGaussian | QuantizedPosterior:
        """Encodes VFM tokens.

        Args:
            features: Tokens `[B, N, C_i]` of each layer, in the order of the VFM's `layers`.
            grid: Rows and columns of the tokens; square if not given.

        Returns:
            The posterior.

        Raises:
            ValueError: if no grid is given and N is no square.
        """
        if grid is None:
            side = math.isqrt(features[0].shape[1])
            if side * side != features[0].shape[1]:
                raise ValueError(f"{features[0].shape[1]} tokens make no square: pass grid=(rows, columns)")
            grid = (side, side)
        encoded = self.adapter.encode(features, grid)
        return DiagonalGaussian(encoded) if self.quantizer is None else self.quantizer(encoded)

    def decode(self, z: Tensor, truncation: float = 1.0) -> Decoded:
        """Decodes latents.

        Args:
            z: `[B, C, h, w]`; h and w divide by `decoder.side_multiple`.
            truncation: Below 1 draws the global latent towards its average over training.

        Returns:
            Reconstruction `[B, 3, h · compression, w · compression]` and multi-scale images, small to large.
        """
        return self.decoder(self.adapter.decode(z), truncation)

    @property
    def last_encoding_weight(self) -> Tensor:
        """The last weight before the posterior, where the adaptive alignment weight compares gradients."""
        return self.adapter.last_encoding_weight

    @property
    def last_decoding_weight(self) -> Tensor:
        """The last block's weight of images, where an adaptive adversarial weight compares gradients."""
        last: Any = self.decoder.blocks[-1]
        weight: Tensor = last.to_rgb.weight
        return weight

    def align(self, z: Tensor) -> Tensor:
        """Projects latents `[B, C, h, w]` to the VFM's width, `[B, D, h, w]`."""
        return self.adapter.align(z)

    def alignment_target(self, features: VFMFeatures, z: Tensor) -> Tensor:
        """The VFM's final tokens, averaged over each of the latents' positions, `[B, D, h, w]`."""
        return pool_tokens(features.tokens, features.grid, z.shape[2:])


def _encoding_settings(source: Mapping[str, Any], unshuffle: int) -> list[Any]:
    """What latents depend on beside the adapter's weights; caches hold a hash of it, so its form is for ever."""
    if "class_path" in source:  # another class than FrozenVFM, whose arguments are its own
        return [{name: source[name] for name in sorted(source) if name != "weights"}, unshuffle]
    settings = [source["fingerprint"], list(source["layers"]), source["input_scale"], unshuffle]
    settings += [] if source.get("antialias") is None else [source["antialias"]]
    settings += [] if {**FORMERLY, **source}["antialias_positions"] else ["positions without antialias"]
    return settings + ([] if source.get("interpolation") is None else [source["interpolation"]])


@final
class FrozenTokenizer(Frozen):
    """A trained tokenizer of any class; it never trains again and is never saved.

    It computes in float32, or in autocast's precision.

    Args:
        checkpoint: A checkpoint that `python -m vfm_vae fit` wrote, whose averaged weights are used if it has them; or
            a folder that `save_pretrained` or `python -m vfm_vae.convert` wrote, or that diffusers wrote of an
            `AutoencoderKL` or `AutoencoderRAE`; or `owner/model` on the hub.
        vfm_weights: File with the VFM's weights, if the one that training read is not available.
        tokenizer_class: Class of the tokenizer, such as `my_package.MyVAE`. It must be given if a folder holds a
            tokenizer that is not one of this project's; otherwise it is found automatically.

    Attributes:
        network: The tokenizer.
        identity: What identifies its latents, see `Tokenizer.latent_identity`.

    Raises:
        ValueError: if there is no such tokenizer, or its VFM can't be had.
    """

    network: PretrainedTokenizer

    def __init__(
        self,
        checkpoint: str,
        vfm_weights: str | None = None,
        tokenizer_class: type[PretrainedTokenizer] = PretrainedTokenizer,
    ) -> None:
        if not Path(checkpoint).exists() and Path(checkpoint).suffix == ".ckpt":
            raise ValueError(f"checkpoint: there is no tokenizer at {checkpoint!r}; train one first")
        with named_as(name="checkpoint", weights="vfm_weights", vfm_weights="model.tokenizer.vfm_weights"):
            network = read_tokenizer(checkpoint, tokenizer_class, vfm_weights=vfm_weights)
        super().__init__(network)
        identity = network.latent_identity()
        if identity is None:
            raise ValueError(f"checkpoint: the tokenizer at {checkpoint!r} can't tell its latents from others'")
        self.identity = identity

    def compile_regions(self) -> None:
        """Compiles the network's layers, in place."""
        self.network.compile_regions()

    def encode(self, images: Tensor) -> Posterior:
        """The posterior of images `[B, 3, H, W]` in [-1, 1], without gradients."""
        with torch.no_grad():
            return self.network.encode(images)

    def decode(self, z: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] of latents `[B, C, h, w]`, without gradients."""
        with torch.no_grad():
            return self.network.decode(z).image.clamp(-1, 1)


def read_tokenizer(
    source: str | Path, kind: type[PretrainedTokenizer] = PretrainedTokenizer, **options: Any
) -> PretrainedTokenizer:
    """Loads a tokenizer.

    Args:
        source: A checkpoint of training; or a folder that `save_pretrained` wrote, or one in the format of diffusers
            (see `DIFFUSERS`), or such a model's `owner/model` on the hub.
        kind: What it has to be; classes from outside of this project are built from a folder only if they are given.
        **options: Options of both `from_pretrained` and `from_checkpoint`: `vfm`, `vfm_weights`.

    Raises:
        ValueError: if there is no such tokenizer, or its VFM can't be had.
    """
    if Path(source).is_file():
        return kind.from_checkpoint(source, **options)
    written_by = _class_in_diffusers(source)
    if written_by is None:
        return kind.from_pretrained(source, **options)
    published = DIFFUSERS.get(str(written_by))
    if published is None:
        known = " and ".join(DIFFUSERS)
        raise ValueError(f"name: {str(source)!r} holds the class {written_by!r} of diffusers; known are {known}")
    if not issubclass(published, kind):
        raise ValueError(f"name: {str(source)!r} holds a {published.__name__}, and no {kind.__name__}")
    return published.from_diffusers(source, **options)


def _class_in_diffusers(source: str | Path) -> Any:
    """The class that the config of a folder or of a model on the hub names, if that is in the format of diffusers."""
    file = model_folder(source, {"allow_patterns": [CONFIG]}) / CONFIG
    config = read_json(file, "name") if file.is_file() else None
    return config.get("_class_name") if isinstance(config, Mapping) else None
