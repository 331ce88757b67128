"""Weights under the public implementation's names, brought to ours."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vfm_vae.modules.adapter import Adapter, Projection
from vfm_vae.modules.decoder import Decoder
from vfm_vae.tokenizer import VFMVAE
from vfm_vae.vfm import FrozenVFM

PROJECTIONS: dict[str, Projection] = {"attnproj": "attention", "conv": "conv"}

# Prefixes and infixes, published → ours; applied in this order.
RENAMES = [
    (r"^ldm_adapter\.patch_quants\.(\d+)\.0\.(blocks\.)?", r"adapter.layers.\1."),
    (r"^ldm_adapter\.final_quant\.(blocks\.)?", "adapter.fuse."),
    (r"^ldm_adapter\.post_quant\.(blocks\.)?", "adapter.widen."),
    (r"^ldm_adapter\.linear_proj\.", "adapter.alignment."),
    (r"^mapping\.x_avg$", "decoder.mapping.average"),
    (r"^mapping\.mlp\.fc0\.", "decoder.mapping.hidden."),
    (r"^mapping\.mlp\.fc1\.", "decoder.mapping.out."),
    (r"^synthesis\.blocks\.", "decoder.blocks."),
    (r"\.norm1\.", ".norm_attention."),
    (r"\.norm2\.", ".norm_mlp."),
    (r"\.norm3\.", ".norm_proj."),
    (r"\.mlp\.w0\.", ".mlp.gate."),
    (r"\.mlp\.w1\.", ".mlp.value."),
    (r"\.mlp\.w2\.", ".mlp.out."),
    (r"\.self_attns\.(\d+)\.attn\.to_out\.", r".attention.\1.out."),
    (r"\.self_attns\.(\d+)\.attn\.norm\.gamma$", r".attention.\1.norm.gain"),
    (r"\.self_attns\.(\d+)\.attn\.", r".attention.\1."),
    (r"\.self_attns\.(\d+)\.ff\.0\.gamma$", r".attention.\1.feed_forward.0.gain"),
    (r"\.self_attns\.(\d+)\.ff\.", r".attention.\1.feed_forward."),
    (r"\.attn\.", ".attention."),
    (r"\.seperate_upsample_conv\.", ".upsample."),
    (r"\.last_upsample_conv\.", ".upsample_sum."),
    (r"\.torgb\.affine\.proj\.", ".to_rgb.style.affine."),
    (r"\.torgb\.", ".to_rgb."),
    (r"\.affine_pw1\.proj\.", ".style.affine."),
    (r"\.conv0\.", ".layers.0."),
    (r"\.dwconv\.", ".depthwise."),
    (r"\.pwconv1\.weight$", ".expand"),
    (r"\.pwconv1\.bias$", ".expand_bias"),
    (r"\.pwconv2\.", ".contract."),
    (r"\.gamma$", ".layer_scale"),
    (r"\.noise_const$", ".noise.map"),
    (r"\.noise_strength$", ".noise.strength"),
]

# Constants that our modules make themselves, and the frozen encoder, which is named and not stored.
DROPPED = re.compile(r"^vfm_encoder\.|\.zero_k_bias$|\.blur_weight$|\.resample_filter$")


def tokenizer_from_published(
    state_dict: Mapping[str, Tensor], config: Mapping[str, Any], vfm: FrozenVFM | None = None
) -> VFMVAE:
    """Builds the tokenizer of a public configuration and fills it with public weights.

    Args:
        state_dict: Generator weights under their published names; those of the VFM are passed over.
        config: The public YAML's `G_kwargs`.
        vfm: The frozen encoder that the weights belong to; without it the model takes features from the caller.

    Returns:
        The tokenizer, in eval mode.

    Raises:
        ValueError: if the configuration is of another kind of model, or names are missing or left over.
    """
    model = build(config, vfm)
    weights = dict(_renamed(state_dict))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    missing, unexpected = sorted(shapes.keys() - weights.keys()), sorted(weights.keys() - shapes.keys())
    if missing or unexpected:
        raise ValueError(f"the weights do not fit the config: missing {missing}; left over {unexpected}")
    # 1x1 convolutions are plain matrices here, and gains lack their trailing dimensions.
    model.load_state_dict({name: tensor.reshape(shapes[name]) for name, tensor in weights.items()})
    return model.eval()


def build(config: Mapping[str, Any], vfm: FrozenVFM | None = None) -> VFMVAE:
    """Builds the model of a public configuration, with fresh weights."""
    wanted = {
        "compression_mode": "continuous",
        "conditional": False,
        "use_self_attn": True,
        "use_cross_attn": False,
        "use_convnext": True,
        "how_to_process_concat_z": "unshuffle",
    }
    for option, value in wanted.items():
        if config.get(option, value) != value:
            raise ValueError(f"{option}={config[option]!r} is not supported, only {value!r} is")
    layers, z_channels = list(config["patch_from_layers"]), config["z_dimension"]
    feature_channels = list(config["patch_in_dimensions"])
    decoded_channels = z_channels * config["decompress_factor"]
    # Patches of 16 pixels of the enlarged image, against the latent's cells.
    unshuffle = round(config["scale_factor"] * config["resolution_compression_factor"] / config.get("patch_size", 16))
    adapter = Adapter(
        feature_channels=feature_channels,
        layer_channels=config["patch_out_dimensions"],
        latent_channels=z_channels,
        unshuffle=unshuffle,
        decoded_channels=decoded_channels,
        alignment_channels=feature_channels[layers.index(-1)] if -1 in layers else feature_channels[-1],
        encode_projection=PROJECTIONS[config["how_to_compress"]],
        decode_projection=PROJECTIONS[config["how_to_decompress"]],
        encode_layers=config["attnproj_quant_layers"],
        decode_layers=config["attnproj_post_quant_layers"],
    )
    return VFMVAE(adapter, _decoder(config, decoded_channels), vfm)


def _decoder(config: Mapping[str, Any], decoded_channels: int) -> Decoder:
    synthesis, num_blocks = config["synthesis_kwargs"], config["num_blocks"]
    return Decoder(
        latent_channels=decoded_channels,
        channels=[
            min(synthesis["channel_max"], synthesis["channel_base"] // (256 // 2 ** (num_blocks - 1 - i)))
            for i in range(num_blocks)
        ],
        route_channels=_per_block(config["concat_z_block_indices"], config["concat_z_mapped_dims"]),
        attention_depths=_per_block(config["attn_block_indices"], config["attn_depths"]),
        num_res_blocks=synthesis["num_res_blocks"],
        extra_low_res_layers=config["add_additional_convnext"],
        w_channels=config["z_dim_for_mapping_mlp_output"],
        pooled_size=config["z_pooled_resolution"],
        attention_heads=synthesis.get("attn_heads", 8),
        attention_widening=synthesis.get("attn_ff_mult", 4),
        route_activation=config["activation_for_concat_z"],
        blur=config["use_gaussian_blur"],
        legacy_noise=config["legacy"],
    )


def _per_block(indices: Sequence[int], values: Sequence[int]) -> list[int]:
    """Values by block index, 0 where the index is left out."""
    by_index = dict(zip(indices, values, strict=True))
    return [by_index.get(i, 0) for i in range(max(by_index, default=-1) + 1)]


def _renamed(state_dict: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in state_dict.items():
        if DROPPED.search(name) or name.endswith((".to_k.weight", ".to_v.weight")):
            continue
        if name.endswith(".to_q.weight"):  # queries, keys and values are one matrix here
            tensor = torch.cat([state_dict[name.replace(".to_q.", f".to_{part}.")] for part in "qkv"])
            name = name.replace(".to_q.", ".qkv.")
        yield _rename(name), tensor


def _rename(name: str) -> str:
    if route := re.match(r"synthesis\.z_convs\.(\d+)\.(\d+)\.(\d+)\.(.*)", name):
        block, stage, layer = map(int, route.groups()[:3])
        last = stage == (1 if block == 2 else 2)  # an (un)shuffle stands before or between the two stages
        return f"decoder.routes.{block}.{layer + (6 if last else 1)}.{route[4]}"
    name = re.sub(r"\.convs1\.(\d+)\.", lambda match: f".layers.{int(match[1]) + 1}.", name)
    for pattern, ours in RENAMES:
        name = re.sub(pattern, ours, name)
    return name
