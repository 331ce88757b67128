"""Image preparation in front of the VFM, against the published reference tensors (whose images are in [0, 1])."""

import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from vfm_vae.vfm import FrozenVFM

REFERENCE = load_file(Path(__file__).parent / "data" / "vfm_prepare.safetensors")
NAMES = {"siglip2": "vit_large_patch16_siglip_512.v2_webli", "dinov2": "vit_large_patch14_dinov2.lvd142m"}
TINY = {"depth": 1, "embed_dim": 16, "num_heads": 1}


@pytest.mark.parametrize("case", sorted(key[len("output/vfm/") :] for key in REFERENCE if key.startswith("output")))
def test_prepare_equals_the_reference(case):
    family, scale, shrink, uint8 = re.fullmatch(r"(\w+?)\.scale(\d\.\d)(?:\.prior(.+))?(\.uint8)?", case).groups()
    vfm = FrozenVFM(NAMES[family], input_scale=float(scale), pretrained=False, model_args=TINY)
    images = REFERENCE["input/vfm/image_uint8"] / 255 if uint8 else REFERENCE["input/vfm/image"]
    images = images * 2 - 1
    if shrink:
        images = F.interpolate(images, scale_factor=float(shrink), mode=vfm.interpolation, antialias=True)

    expected = REFERENCE[f"output/vfm/{case}"]
    torch.testing.assert_close(vfm.prepare(images), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_sequence_of_features_is_made_as_reg_makes_it():
    """Normalised before it is resized, without antialias; the position table resampled once for all."""
    size = {"depth": 2, "embed_dim": 16, "num_heads": 2}
    arguments = {"input_scale": 0.875, "antialias": False, "pretrained": False, "model_args": size}
    vfm = FrozenVFM("vit_base_patch14_dinov2.lvd142m", **arguments)
    network = vfm.network
    assert network.pos_embed.shape == (1, 1 + 37 * 37, 16) and network.num_prefix_tokens == 1
    torch.nn.init.normal_(network.pos_embed)
    images = torch.rand(2, 3, 256, 256)

    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    x = F.interpolate((images - mean) / std, 224, mode="bicubic")
    x = network.patch_embed.proj(x).flatten(2).transpose(1, 2)  # [B, 256, D]
    x = torch.cat([network.cls_token.expand(2, -1, -1), x], dim=1)
    x = x + timm.layers.resample_abs_pos_embed(network.pos_embed, [16, 16])
    for block in network.blocks:
        x = block(x)

    features = vfm(images * 2 - 1)
    assert features.grid == (16, 16)
    torch.testing.assert_close(features.sequence, network.norm(x), rtol=0, atol=2e-5)
    assert torch.equal(features.sequence[:, 0], features.pooled)
