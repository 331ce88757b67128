"""VFMs against published ones: how images are prepared (reference tensors, whose images are in [0, 1]), and features of
Hugging Face's transformers at other grids than the position tables' own.
"""

import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from vfm_vae.vfm import FrozenVFM

REFERENCE = load_file(Path(__file__).parent / "data" / "vfm_prepare.safetensors")
# Networks of random weights and their hidden states 0 and -1, by transformers 5.24.
TRANSFORMERS = load_file(Path(__file__).parent / "data" / "vfm_positions.safetensors")
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
    """Normalised before it is resized, without antialias; the position table resampled once for all, with antialias."""
    size = {"depth": 2, "embed_dim": 16, "num_heads": 2}
    ways = {"antialias": False, "antialias_positions": True}
    arguments = {"input_scale": 0.875, **ways, "pretrained": False, "model_args": size}
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


FAMILIES = {
    "siglip": "vit_large_patch16_siglip_512.v2_webli",
    "dinov2": "vit_large_patch14_dinov2.lvd142m",
    "dinov2_reg": "vit_large_patch14_reg4_dinov2.lvd142m",
}
# Names of transformers, as patterns → timm's.
RENAMES = {
    r"embeddings\.patch_embedding(s\.projection)?\.": "patch_embed.proj.",
    r"embeddings\.position_embedding(\.weight|s)": "pos_embed",
    r"embeddings\.cls_token": "cls_token",
    r"embeddings\.register_tokens": "reg_token",
    r"encoder\.layers?\.": "blocks.",
    r"(self_attn|attention)\.": "attn.",
    r"\.(out|o)_proj": ".proj",
    r"layer_norm(\d)": r"norm\1",
    r"layer_scale(\d)\.lambda1": r"ls\1.gamma",
    r"(post_)?layernorm": "norm",
}


def weights_of(family):
    """The weights as timm has them: q, k and v in one; with registers, the class token has its position in it."""
    start, weights = f"{family}/weights/", {}
    for name, tensor in TRANSFORMERS.items():
        if name.startswith(start):
            name = name.removeprefix(start)
            for pattern, replacement in RENAMES.items():
                name = re.sub(pattern, replacement, name)
            weights[name] = tensor
    for name in [name for name in weights if "q_proj" in name]:
        qkv = [weights.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        weights[name.replace("q_proj", "qkv")] = torch.cat(qkv)
    weights["pos_embed"] = weights["pos_embed"].reshape(1, -1, 32)
    if "reg_token" in weights:
        position, weights["pos_embed"] = weights["pos_embed"].split([1, 64], 1)
        weights["cls_token"] = weights["cls_token"] + position
    return weights


def transformers_vfm(family, **kwargs):
    size = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
    if family == "siglip":
        size["global_pool"] = ""  # without the attention that would pool
    vfm = FrozenVFM(FAMILIES[family], layers=[0, -1], pretrained=False, model_args=size, **kwargs)
    vfm.network.load_state_dict(weights_of(family))
    return vfm


@pytest.mark.parametrize("grid", ["native", "smaller", "larger"])
@pytest.mark.parametrize("family", FAMILIES)
def test_features_at_any_grid_are_those_of_transformers(family, grid):
    images = TRANSFORMERS[f"images/{grid}"] / 127.5 - 1
    features = transformers_vfm(family)(images)
    timms = transformers_vfm(family, antialias_positions=True)(images)
    for layer, tokens, with_antialias in zip((0, -1), features.layers, timms.layers, strict=True):
        expected = TRANSFORMERS[f"{family}/outputs/{grid}/{layer}"][:, -tokens.shape[1] :]  # without prefix tokens
        torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-5)
        error = ((with_antialias - expected).norm() / expected.norm()).item()
        assert error < 1e-5 if grid == "native" or family == "dinov2_reg" else error > 0.01
    if family != "siglip":
        torch.testing.assert_close(
            features.pooled, TRANSFORMERS[f"{family}/outputs/{grid}/-1"][:, 0], rtol=0, atol=1e-5
        )
