"""VFM-VAE: a frozen vision foundation model as the encoder of a VAE (arXiv 2510.18457)."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from vfm_vae.modules.adapter import Adapter
from vfm_vae.modules.decoder import Decoder
from vfm_vae.modules.posterior import DiagonalGaussian
from vfm_vae.modules.quantizer import QuantizedPosterior, VectorQuantizer
from vfm_vae.types import Decoded
from vfm_vae.vfm import Frozen, FrozenVFM, check_vfm, sha256_of


class VFMVAE(nn.Module):
    """Frozen VFM → adapter → posterior → adapter → decoder.

    Args:
        adapter: Between VFM tokens and latents.
        decoder: From latents to images.
        vfm: The encoder; without one the model takes VFM features from the caller, and decodes.
        quantizer: Makes the latent discrete; without one it is Gaussian.

    Raises:
        ValueError: if the parts do not fit each other.
    """

    def __init__(
        self,
        adapter: Adapter,
        decoder: Decoder,
        vfm: FrozenVFM | None = None,
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

    def _check_fit(self, vfm: FrozenVFM) -> None:
        widths = [vfm.width] * len(vfm.layers)
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
        compression = vfm.patch_size * self.adapter.unshuffle / vfm.input_scale
        if compression != self.decoder.upscaling:
            raise ValueError(
                f"patch_size {vfm.patch_size} · unshuffle {self.adapter.unshuffle} / input_scale {vfm.input_scale} "
                f"compresses {compression:g} times, but {len(self.decoder.blocks)} decoder blocks enlarge "
                f"{self.decoder.upscaling} times; change unshuffle, input_scale or the number of channels"
            )

    @property
    def compression(self) -> int:
        """Sides of the image over sides of the latent."""
        return self.decoder.upscaling

    def check_image_size(self, size: int) -> None:
        """Says before anything runs whether images of this side can be tokenized.

        Raises:
            ValueError: if not.
        """
        step = 4 * self.compression
        if size < step or size % step:
            raise ValueError(
                f"image_size: {size} does not fit this tokenizer, whose latent needs sides that divide by 4: give a "
                f"multiple of {step} (4 cells of {self.compression} pixels)"
            )

    @property
    def latent_channels(self) -> int:
        """Channels of the latent."""
        return self.adapter.latent_channels

    def latent_identity(self) -> dict[str, str | int]:
        """What a cache of latents, and a model trained on it, say of where they come from.

        The fingerprint is of all that makes the latents and of nothing else: tokenizers that differ in their decoders
        alone share it.

        Raises:
            ValueError: if the model has no VFM.
        """
        if self.vfm is None:
            raise ValueError("this VFMVAE has no VFM, so its latents have no identity: pass vfm=FrozenVFM(…)")
        encoding = nn.ModuleDict({"layers": self.adapter.layers, "fuse": self.adapter.fuse}).state_dict()
        if self.quantizer is not None:
            encoding["codebooks"] = self.quantizer.codebooks
        settings = [self.vfm.fingerprint(), list(self.vfm.layers), self.vfm.input_scale, self.adapter.unshuffle]
        return {
            "vfm": self.vfm.name,
            "fingerprint": sha256_of(encoding, str(settings)),
            "channels": self.latent_channels,
            "compression": self.compression,
        }

    def encode(self, images: Tensor) -> DiagonalGaussian | QuantizedPosterior:
        """Encodes images.

        Args:
            images: `[B, 3, H, W]` in [-1, 1].

        Returns:
            The posterior of latents `[B, C, H / compression, W / compression]`; the caller chooses `mode()` or
            `sample()`.

        Raises:
            ValueError: if the model has no VFM, or the VFM does not take this size.
        """
        if self.vfm is None:
            raise ValueError("this VFMVAE has no VFM: pass vfm=FrozenVFM(…), or call encode_features")
        features = self.vfm(images)
        return self.encode_features(features.layers, features.grid)

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
            z: `[B, C, h, w]`; h and w divide by 4.
            truncation: Below 1 draws the global latent towards its average over training.

        Returns:
            Reconstruction `[B, 3, h · compression, w · compression]` and multi-scale images, small to large.
        """
        return self.decoder(self.adapter.decode(z), truncation)


class FrozenTokenizer(Frozen):
    """A trained tokenizer, read from a checkpoint of its training; it never trains again and is never saved.

    Computes in float32 or, under autocast, as that says.

    Args:
        checkpoint: File that `python -m vfm_vae fit` wrote; its averaged weights are taken where it has them.
        vfm_weights: File with the VFM's weights, where the one that training read is not at hand.

    Attributes:
        network: The VFMVAE.
        identity: Of its latents, see `VFMVAE.latent_identity`.

    Raises:
        ValueError: if there is no such checkpoint, it is no tokenizer's, or its VFM can't be had.
    """

    network: VFMVAE

    def __init__(self, checkpoint: str, vfm_weights: str | None = None) -> None:
        if not Path(checkpoint).is_file():
            raise ValueError(f"checkpoint: there is no tokenizer at {checkpoint!r}; train one first")
        stored = torch.load(checkpoint, map_location="cpu", weights_only=True)
        network = _rebuild(stored, checkpoint, vfm_weights)
        check_vfm(network.vfm, stored)
        weights = stored["state_dict"] | stored.get("ema", {}).get("weights", {})
        prefix = "model."
        weights = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        network.load_state_dict(weights)
        super().__init__(network)
        self.identity = network.latent_identity()

    def encode(self, images: Tensor) -> DiagonalGaussian | QuantizedPosterior:
        """The posterior of images `[B, 3, H, W]` in [-1, 1], without gradients."""
        with torch.no_grad():
            return self.network.encode(images)

    def decode(self, z: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] of latents `[B, C, h, w]`, without gradients."""
        with torch.no_grad():
            return self.network.decode(z).image.clamp(-1, 1)


def _rebuild(stored: Mapping[str, Any], path: str, vfm_weights: str | None) -> VFMVAE:
    """The model that a checkpoint describes, with weights in its VFM only."""
    description = stored.get("hyper_parameters", {}).get("model")
    if not isinstance(description, Mapping) or "vfm" not in stored:
        raise ValueError(
            f"checkpoint: {path!r} does not describe a tokenizer; give one that `python -m vfm_vae fit` wrote"
        )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(VFMVAE, "model")
    if vfm_weights is not None:
        description = {**description, "init_args": {**description["init_args"]}}
        vfm = description["init_args"]["vfm"]
        description["init_args"]["vfm"] = {**vfm, "init_args": {**vfm["init_args"], "weights": vfm_weights}}
    return parser.instantiate_classes(parser.parse_object({"model": description})).model
