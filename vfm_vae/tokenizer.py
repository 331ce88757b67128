"""VFM-VAE: a frozen vision foundation model as the encoder of a VAE (arXiv 2510.18457)."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from vfm_vae.modules.adapter import Adapter
from vfm_vae.modules.decoder import Decoder
from vfm_vae.modules.posterior import DiagonalGaussian
from vfm_vae.types import Decoded
from vfm_vae.vfm import FrozenVFM


class VFMVAE(nn.Module):
    """Frozen VFM → adapter → posterior → adapter → decoder.

    Args:
        adapter: Between VFM tokens and latents.
        decoder: From latents to images.
        vfm: The encoder; without one the model takes VFM features from the caller, and decodes.

    Raises:
        ValueError: if the parts do not fit each other.
    """

    def __init__(self, adapter: Adapter, decoder: Decoder, vfm: FrozenVFM | None = None):
        super().__init__()
        self.vfm = vfm
        self.adapter = adapter
        self.decoder = decoder
        if vfm is not None:
            self._check_fit(vfm)

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

    def encode(self, images: Tensor) -> DiagonalGaussian:
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

    def encode_features(self, features: Sequence[Tensor], grid: tuple[int, int] | None = None) -> DiagonalGaussian:
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
        return DiagonalGaussian(self.adapter.encode(features, grid))

    def decode(self, z: Tensor, truncation: float = 1.0) -> Decoded:
        """Decodes latents.

        Args:
            z: `[B, C, h, w]`; h and w divide by 4.
            truncation: Below 1 draws the global latent towards its average over training.

        Returns:
            Reconstruction `[B, 3, h · compression, w · compression]` and multi-scale images, small to large.
        """
        return self.decoder(self.adapter.decode(z), truncation)
