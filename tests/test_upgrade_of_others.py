"""Tokenizers of others that are made of this project's parts come back from their folders."""

import pytest
import torch
from torch import nn

from vfm_vae.modules.adapter import Adapter
from vfm_vae.modules.decoder import Decoder
from vfm_vae.modules.quantizer import VectorQuantizer
from vfm_vae.pretrained_tokenizer import PretrainedTokenizer
from vfm_vae.tokenizer import VFMVAE
from vfm_vae.vfm import FrozenVFM


class AnyDecoder(PretrainedTokenizer):
    """Takes any module as its decoder."""

    latent_channels, compression = 16, 8

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def encode(self, images):
        """Not asked for."""
        raise NotImplementedError

    def decode(self, z, truncation_psi=1.0):
        """Images of latents."""
        return self.decoder(z)


class Derived(VFMVAE):
    """The project's own, by another name."""


def decoder() -> Decoder:
    return Decoder(16, [16, 16, 16, 16, 8], [16], [], 0, w_channels=16)


def derived(quantizer: VectorQuantizer | None) -> Derived:
    adapter = Adapter([128], [8], 8, 1, 16, 128, gaussian=quantizer is None)
    return Derived(adapter, decoder(), FrozenVFM("vit_photos_patch8_64"), quantizer)


@pytest.mark.parametrize(
    "make",
    [lambda: AnyDecoder(decoder()), lambda: derived(None), lambda: derived(VectorQuantizer(32, 2, 8))],
    ids=["any decoder", "derived", "derived, with a quantizer"],
)
def test_it_comes_back(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert type(loaded.decoder) is Decoder
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
