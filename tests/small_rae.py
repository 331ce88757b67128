"""Small RAEs: of this project on the embedded VFM, and random ones of diffusers."""

from functools import partial

import torch
from diffusers import AutoencoderRAE

from vfm_vae.discriminators.projected import ProjectedDiscriminator
from vfm_vae.losses.objective import Objective
from vfm_vae.module import TokenizerModule
from vfm_vae.rae import RAE
from vfm_vae.vfm import FrozenVFM

VFM = "vit_photos_patch8_64"
SMALL = {"image_size": 64, "decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2, "decoder_mlp_width": 64}
IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def build(layers=(-2,), seed=0, vfm=None, **options) -> RAE:
    """Of latents `[B, 128, 8, 8]`."""
    torch.manual_seed(seed)
    return RAE(FrozenVFM(VFM, layers=layers, **(vfm or {})), **SMALL | options)


def module(model: RAE, objective: dict | None = None, **options) -> TokenizerModule:
    losses = {"kl": 0, "alignment": 0, "multi_resolution": 0, "adversarial": 0.1} | (objective or {})
    optimizers = [partial(torch.optim.Adam, lr=3e-3)] * 2
    return TokenizerModule(
        model, ProjectedDiscriminator(VFM, size=64, layers=(2,)), Objective(**losses), *optimizers, **options
    )


def randomised(model: RAE) -> RAE:
    model.take_statistics(torch.randn(model.latent_shape), torch.rand(model.latent_shape) + 0.5)
    return model.eval()


def of_diffusers(kind: str = "dinov2", **options) -> AutoencoderRAE:
    """One for 32 px images that are resized to 28 px; options are those of `AutoencoderRAE`."""
    torch.manual_seed(0)
    statistics = {"latents_mean": torch.randn(64, 4, 4), "latents_std": torch.rand(64, 4, 4) + 0.5}
    encoder = {"hidden_size": 64, "patch_size": 7, "num_hidden_layers": 2, "input_size": 28}
    decoder = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    sizes = {f"encoder_{n}": v for n, v in encoder.items()} | {f"decoder_{n}": v for n, v in decoder.items()}
    others = {"patch_size": 8, "encoder_norm_std": [0.2, 0.3, 0.4]}
    return AutoencoderRAE(kind, **sizes | others | statistics | options).eval()


def reconstructed(model: AutoencoderRAE, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and reconstructions by diffusers, in [-1, 1]."""
    with torch.no_grad():
        z = model.encode((images + 1) / 2).latent
        return z, 2 * model.decode(z).sample - 1
