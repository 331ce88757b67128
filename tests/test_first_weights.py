"""Weights begin as in former versions, by the same seed: parts are made in the same order."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from ldm.models.ditdh import DiTDH
from ldm.models.lightningdit import LightningDiT
from ldm.models.sit import SiT
from vfm_vae.discriminators.patchgan import PatchGAN
from vfm_vae.modules.adapter import Adapter
from vfm_vae.modules.decoder import Decoder

DECODER = {"channels": [64, 96, 96, 64, 32], "route_channels": [64] * 4, "w_channels": 64}
DENOISER = {"input_size": 8, "patch_size": 2, "depth": 2, "width": 64, "num_heads": 4, "num_classes": 10}
ALIGNED = {"cls_channels": 64, "align_channels": 64, "align_depth": 1}


def adapter(**options) -> Adapter:
    return Adapter([128] * 3, [64] * 3, 32, unshuffle=2, decoded_channels=128, alignment_channels=128, **options)


# What is made, and the next random number afterwards and a sum over all weights, as a former version had them.
FORMER = {
    "adapter": (adapter, 0.03385889530181885, 2720.946000496366),
    "adapter of convolutions": (
        lambda: adapter(encode_projection="conv", decode_projection="conv"),
        0.09768778085708618,
        -2.8383274661788396,
    ),
    "decoder": (
        lambda: Decoder(128, attention_depths=[1, 1], num_res_blocks=1, **DECODER),
        0.38227593898773193,
        -13878.645685089868,
    ),
    "decoder with noise": (
        lambda: Decoder(128, attention_depths=[1, 2], num_res_blocks=0, legacy_noise=True, **DECODER),
        0.6129359602928162,
        -13987.872375076098,
    ),
    "PatchGAN": (PatchGAN, 0.8555389642715454, 1415.5624963406522),
    "LightningDiT": (lambda: LightningDiT(4, **DENOISER), 0.8981122374534607, 215.96055096336852),
    "LightningDiT with REG": (lambda: LightningDiT(4, **DENOISER, **ALIGNED), 0.20275187492370605, 24.035926417475835),
    "DiTDH": (lambda: DiTDH(4, **DENOISER, head_width=96, head_num_heads=4), 0.5543158650398254, 425.2832441515377),
    "DiTDH with REG": (
        lambda: DiTDH(4, **DENOISER, **ALIGNED, base_depth=1, head_width=96, head_num_heads=4),
        0.04517316818237305,
        86.20273788534159,
    ),
    "SiT": (lambda: SiT(4, **DENOISER, **ALIGNED, projector_width=32), 0.7314580082893372, 57.49135165523749),
}


def traces(make: Callable[[], nn.Module]) -> tuple[float, float]:
    """The next random number, and a sum over all weights that depends on their places."""
    torch.manual_seed(0)
    weights = make().state_dict()
    following = torch.rand(1).item()
    flat = torch.cat([weight.double().flatten() for _, weight in sorted(weights.items())])
    return following, (flat * torch.linspace(0, 1, len(flat), dtype=torch.float64)).sum().item()


@pytest.mark.parametrize("name", FORMER)
def test_weights_begin_as_in_former_versions(name: str):
    make, following, total = FORMER[name]
    assert traces(make) == pytest.approx((following, total), rel=1e-6)
