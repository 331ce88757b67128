"""Image preparation in front of the VFM, against the published reference tensors (whose images are in [0, 1])."""

import re
from pathlib import Path

import pytest
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
