"""Names of tokenizers' and discriminators' tensors in published files."""

import re
from typing import Any

from vfm_vae.published_files import Names

# Ours → published, applied in this order.
TOKENIZER = [
    (r"^adapter\.layers\.(\d+)\.(\d+)\.", r"ldm_adapter.patch_quants.\1.0.blocks.\2."),
    (r"^adapter\.layers\.(\d+)\.", r"ldm_adapter.patch_quants.\1.0."),
    (r"^adapter\.(fuse|widen)\.(\d+)\.", r"adapter.\1.blocks.\2."),
    (r"^adapter\.fuse\.", "ldm_adapter.final_quant."),
    (r"^adapter\.widen\.", "ldm_adapter.post_quant."),
    (r"^adapter\.alignment\.", "ldm_adapter.linear_proj."),
    (r"^(ldm_adapter.*)\.norm_attention\.", r"\1.norm1."),
    (r"^(ldm_adapter.*)\.norm_mlp\.", r"\1.norm2."),
    (r"^(ldm_adapter.*)\.norm_proj\.", r"\1.norm3."),
    (r"^(ldm_adapter.*)\.attention\.", r"\1.attn."),
    (r"\.mlp\.gate\.", ".mlp.w0."),
    (r"\.mlp\.value\.", ".mlp.w1."),
    (r"\.mlp\.out\.", ".mlp.w2."),
    (r"^decoder\.mapping\.average$", "mapping.x_avg"),
    (r"^decoder\.mapping\.hidden\.", "mapping.mlp.fc0."),
    (r"^decoder\.mapping\.out\.", "mapping.mlp.fc1."),
    (r"^decoder\.blocks\.", "synthesis.blocks."),
    (r"\.layers\.0\.", ".conv0."),
    (r"\.layers\.(\d+)\.", lambda match: f".convs1.{int(match[1]) - 1}."),
    (r"\.upsample\.", ".seperate_upsample_conv."),
    (r"\.upsample_sum\.", ".last_upsample_conv."),
    (r"\.to_rgb\.style\.affine\.", ".torgb.affine.proj."),
    (r"\.to_rgb\.", ".torgb."),
    (r"\.style\.affine\.", ".affine_pw1.proj."),
    (r"^(synthesis.*\.conv.*)\.depthwise\.", r"\1.dwconv."),
    (r"\.expand$", ".pwconv1.weight"),
    (r"\.expand_bias$", ".pwconv1.bias"),
    (r"\.contract\.", ".pwconv2."),
    (r"\.layer_scale$", ".gamma"),
    (r"\.noise\.map$", ".noise_const"),
    (r"\.noise\.strength$", ".noise_strength"),
    (r"\.attention\.(\d+)\.feed_forward\.", r".self_attns.\1.ff."),
    (r"\.attention\.(\d+)\.out\.", r".self_attns.\1.attn.to_out."),
    (r"\.attention\.(\d+)\.", r".self_attns.\1.attn."),
    (r"\.gain$", ".gamma"),
]


def tokenizer_names(ours: str, first_scale: int = -2) -> tuple[str, ...]:
    """Published names of a tensor of VFMVAE: one, or those of queries, keys and values, which are one matrix here.

    Args:
        ours: Its name here.
        first_scale: log2 of the sides that the decoder's first block takes over the latent's.
    """
    if route := re.fullmatch(r"decoder\.routes\.(\d+)\.(\d+)\.(\w+)", ours):
        block, layer = int(route[1]), int(route[2])
        # What shrinks the latent of coarse blocks is counted there, and stands first; so is a shuffle, which is amid.
        scale = first_scale + block
        first = 1 if scale < 0 else 0
        last = first + (2 if scale > 0 else 1)
        stage, layer = (first, layer - 1) if layer < 6 else (last, layer - 6)
        return (f"synthesis.z_convs.{block}.{stage}.{layer}.{route[3]}",)
    name = renamed(ours, TOKENIZER)
    if name.startswith("synthesis.") and name.endswith(".qkv.weight"):
        return tuple(name.replace(".qkv.", f".to_{part}.") for part in "qkv")
    return (name,)


def discriminator_names(num_heads: int) -> Names:
    """Names of the projected discriminator; the head of the patch embedding comes last there, and first here."""

    def names(ours: str) -> tuple[str, ...]:
        return (re.sub(r"^heads\.(\d+)", lambda match: f"heads.{(int(match[1]) - 1) % num_heads}", ours),)

    return names


def patchgan_names(num_scales: int, features: bool) -> Names:
    """Names of the PatchGAN, whose scales count down from the full size.

    Args:
        num_scales: Number of its discriminator's scales.
        features: Whether it is the published variant that gives the features of its layers; the other's layers lie in
            one sequence, activations counted.
    """

    def names(ours: str) -> tuple[str, ...]:
        _, scale, _, number, part, kind = ours.split(".")  # scales.0.layers.0.norm.weight
        place, layer, norm = num_scales - 1 - int(scale), int(number), part == "norm"
        if features:
            return (f"patchgan_discriminator.scale{place}_layer{layer}.{int(norm)}.{kind}",)
        position = 3 * layer - 1 if layer else 0  # convolution, activation; then convolution, norm, activation
        return (f"patchgan_discriminator.layer{place}.{position + norm}.{kind}",)

    return names


def renamed(name: str, rules: list[tuple[str, Any]]) -> str:
    """A name after rules, each a pattern and its replacement, were applied in their order."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
