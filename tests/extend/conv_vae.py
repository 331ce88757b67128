"""Tokenizers whose encoder is no VFM, in one file: convolutions that are trained, alone or towards a VFM's features."""

from torch import Tensor, nn

from vfm_vae.contracts import VFM
from vfm_vae.losses.alignment import pool_tokens
from vfm_vae.modules.posterior import DiagonalGaussian
from vfm_vae.pretrained_tokenizer import PretrainedTokenizer
from vfm_vae.types import Decoded, Posterior, VFMFeatures


class OwnVAE(PretrainedTokenizer):
    """Halves the sides of images three times by convolutions, and enlarges latents eight times at once.

    Args:
        channels: Channels of the latent.
        width: Channels of the encoder.
    """

    compression = 8

    def __init__(self, channels: int = 4, width: int = 16) -> None:
        super().__init__()
        steps = [nn.Conv2d(3, width, 4, 2, 1), nn.SiLU(), nn.Conv2d(width, width, 4, 2, 1), nn.SiLU()]
        self.encoder = nn.Sequential(*steps, nn.Conv2d(width, 2 * channels, 4, 2, 1))
        self.decoder = nn.Sequential(nn.Conv2d(channels, 3 * 8 * 8, 3, 1, 1), nn.PixelShuffle(8))

    @property
    def latent_channels(self) -> int:
        return self.decoder[0].in_channels

    def encode(self, images: Tensor) -> Posterior:
        return DiagonalGaussian(self.encoder(images))

    def decode(self, z: Tensor) -> Decoded:
        return Decoded(self.decoder(z), ())


class AlignedVAE(OwnVAE):
    """The same, drawn towards the features of a VFM that it does not encode with.

    Args:
        channels: Channels of the latent.
        vfm: The VFM; only training needs it.
        vfm_width: Channels of its features.
    """

    def __init__(self, channels: int = 4, vfm: VFM | None = None, vfm_width: int = 128) -> None:
        super().__init__(channels)
        self.vfm = vfm
        self.projection = nn.Conv2d(channels, vfm_width, 1, bias=False)

    @property
    def last_encoding_weight(self) -> nn.Parameter:
        return self.encoder[-1].weight

    def align(self, z: Tensor) -> Tensor:
        return self.projection(z)

    def alignment_target(self, features: VFMFeatures, z: Tensor) -> Tensor:
        return pool_tokens(features.tokens, features.grid, z.shape[2:])
