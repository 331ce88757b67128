"""Published weights of tokenizers and discriminators: converting their names to ours and back."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

from vfm_vae.discriminators.patchgan import PatchGAN
from vfm_vae.discriminators.projected import DiscriminatorHead
from vfm_vae.modules.adapter import Adapter, Projection, ProjectionAttention
from vfm_vae.modules.decoder import Decoder
from vfm_vae.modules.layers import UpsampleUnit
from vfm_vae.modules.maps import Blur
from vfm_vae.published_files import Names, from_published, read_yaml, to_published
from vfm_vae.published_names import discriminator_names, patchgan_names, tokenizer_names
from vfm_vae.tokenizer import VFMVAE
from vfm_vae.vfm import FrozenVFM
from vfm_vae.vit import family_of

ENCODER = "vfm_encoder."  # the frozen VFM, which is named and not stored

PROJECTIONS: dict[str, Projection] = {"attnproj": "attention", "conv": "conv"}

# Names of VFMs on the Hugging Face hub → timm's.
VFMS = [
    (r"siglip2-giant-opt-(patch\d+)-(\d+)", r"vit_giantopt_\1_siglip_\2.v2_webli"),
    (r"siglip2-(\w+)-(patch\d+)-(\d+)", r"vit_\1_\2_siglip_\3.v2_webli"),
    (r"siglip-(\w+)-(patch\d+)-(\d+)", r"vit_\1_\2_siglip_\3.webli"),
    (r"dinov2-with-registers-(\w+)", r"vit_\1_patch14_reg4_dinov2.lvd142m"),
    (r"dinov2-(\w+)", r"vit_\1_patch14_dinov2.lvd142m"),
    (r"vit-mae-huge", r"vit_huge_patch14_224.mae"),
    (r"vit-mae-(\w+)", r"vit_\1_patch16_224.mae"),
    (r"clip-vit-(\w+)-(patch\d+)-336", r"vit_\1_\2_clip_quickgelu_336.openai"),
    (r"clip-vit-(\w+)-(patch\d+)", r"vit_\1_\2_clip_quickgelu_224.openai"),
]


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
        ValueError: if the configuration is of another kind of model, or names are missing or left over, or tensors
            are of another shape.
    """
    model = build_published(config, vfm)
    model.load_state_dict(weights_from_published(model, state_dict))
    return model.eval()


def tokenizer_to_published(model: VFMVAE) -> dict[str, Tensor]:
    """All generator weights under their published names, but for the VFM's; for the public code to read.

    Raises:
        ValueError: if the model has a quantizer, whose published names are not known.
    """
    if model.quantizer is not None:
        raise ValueError("model: published names of a quantizer are not known")
    return to_published(model.state_dict(), _names(model), _constants(model))


def build_published(config: Mapping[str, Any], vfm: FrozenVFM | None = None) -> VFMVAE:
    """Builds the model of a public configuration, with fresh weights.

    Raises:
        ValueError: if the configuration lacks options, or asks for what there is not here.
    """
    wanted: dict[str, list[Any]] = {
        "compression_mode": ["continuous"],
        "conditional": [False],
        "use_self_attn": [True],
        "use_cross_attn": [False],
        "use_convnext": [True],
        "how_to_process_concat_z": ["unshuffle", "pooling"],
    }
    for option, values in wanted.items():
        if config.get(option, values[0]) not in values:
            known = " or ".join(map(repr, values))
            raise ValueError(f"config: {option}={config[option]!r} is not supported, only {known} is")
    try:
        adapter = _adapter(config)
        decoder = _decoder(config, config["z_dimension"] * config["decompress_factor"])
    except KeyError as error:
        raise ValueError(f"config: the option {error} is missing; give the public YAML whole") from error
    return VFMVAE(adapter, decoder, vfm)


def timm_name(vfm_name: str) -> str | None:
    """The name in timm of a VFM on the Hugging Face hub, also given as a local path; None if timm has no such VFM."""
    name = vfm_name.rstrip("/").rpartition("/")[2]
    for pattern, replacement in VFMS:
        if re.fullmatch(pattern, name):
            name = re.sub(pattern, replacement, name)
            break
    return name if timm.is_model(name) else None


def _adapter(config: Mapping[str, Any]) -> Adapter:
    layers, feature_channels = list(config["patch_from_layers"]), list(config["patch_in_dimensions"])
    patch = re.search(r"patch(\d+)", timm_name(config["vfm_name"]) or "")
    # Patches of the enlarged image, against the latent's cells.
    unshuffle = config["scale_factor"] * config["resolution_compression_factor"] / (int(patch[1]) if patch else 16)
    return Adapter(
        feature_channels=feature_channels,
        layer_channels=list(config["patch_out_dimensions"]),
        latent_channels=config["z_dimension"],
        unshuffle=round(unshuffle),
        decoded_channels=config["z_dimension"] * config["decompress_factor"],
        alignment_channels=feature_channels[layers.index(-1)] if -1 in layers else feature_channels[-1],
        encode_projection=PROJECTIONS[config["how_to_compress"]],
        decode_projection=PROJECTIONS[config["how_to_decompress"]],
        encode_layers=config["attnproj_quant_layers"],
        decode_layers=config["attnproj_post_quant_layers"],
    )


def _decoder(config: Mapping[str, Any], decoded_channels: int) -> Decoder:
    synthesis, num_blocks = config["synthesis_kwargs"], config["num_blocks"]
    return Decoder(
        in_channels=decoded_channels,
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
        compression=config["resolution_compression_factor"],
        route_downsampling=config.get("how_to_process_concat_z", "unshuffle"),
    )


def _per_block(indices: Sequence[int], values: Sequence[int]) -> list[int]:
    """Values by block index, 0 where the index is left out."""
    by_index = dict(zip(indices, values, strict=True))
    return [by_index.get(i, 0) for i in range(max(by_index, default=-1) + 1)]


def weights_from_published(model: VFMVAE, published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's tensors, taken from published generator weights; those of the VFM are passed over.

    Raises:
        ValueError: if names are missing or left over, or tensors are of another shape.
    """
    trained = {name: tensor for name, tensor in published.items() if not name.startswith(ENCODER)}
    return from_published(model.state_dict(), trained, _names(model), _constants(model))


def _names(model: VFMVAE) -> Names:
    return partial(tokenizer_names, first_scale=model.decoder.first_scale)


def _constants(model: VFMVAE) -> dict[str, Tensor]:
    """What the public code stores and our modules make themselves: biases of keys, and the kernels of blurs."""
    constants = {}
    for name, module in model.named_modules():
        if isinstance(module, ProjectionAttention):
            (published,) = tokenizer_names(f"{name}.zero_k_bias")
            constants[published] = torch.zeros_like(module.q_bias)
        elif isinstance(module, UpsampleUnit) and isinstance(module.blur, Blur):
            (published,) = tokenizer_names(f"{name}.blur_weight")
            constants[published] = module.blur.kernel.repeat(module.pointwise.out_channels // 4, 1, 1, 1)
    return constants


def opponents_from_published(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Discriminators' weights as TokenizerModule names them, `discriminator.heads…` and `patchgan.scales…`.

    Args:
        state_dict: Published discriminator weights: heads, a PatchGAN of either variant, or both; those of the frozen
            backbone are passed over.

    Raises:
        ValueError: if names are missing or left over.
    """
    heads = {name: tensor for name, tensor in state_dict.items() if name.startswith("heads.")}
    patches = {name: tensor for name, tensor in state_dict.items() if name.startswith("patchgan_discriminator.")}
    if other := sorted(n for n in state_dict.keys() - heads.keys() - patches.keys() if not n.startswith("dino.")):
        raise ValueError(f"the discriminators' weights have left over {other}")
    opponents: dict[str, Tensor] = {}
    with torch.device("meta"):
        if heads:
            number = 1 + max(int(name.split(".")[1]) for name in heads)
            width = heads["heads.0.main.0.0.bias"].numel()
            module = nn.ModuleDict({"heads": nn.ModuleList(DiscriminatorHead(width) for _ in range(number))})
            opponents |= _taken("discriminator.", module, heads, discriminator_names(number))
        if patches:
            features = any("_layer" in name for name in patches)
            scales, first = ("scale", "scale0_layer0.0") if features else ("layer", "layer0.0")
            numbers = re.findall(rf"\.{scales}(\d+)", "\n".join(patches))
            number = 1 + max(map(int, numbers))
            channels = patches[f"patchgan_discriminator.{first}.bias"].numel()
            patchgan = PatchGAN(num_scales=number, base_channels=channels)
            opponents |= _taken("patchgan.", patchgan, patches, patchgan_names(number, features))
    return opponents


def _taken(prefix: str, module: nn.Module, published: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    taken = from_published(module.state_dict(), published, names, {})
    return {f"{prefix}{name}": tensor for name, tensor in taken.items()}


def read_config(path: str) -> tuple[dict[str, Any], int]:
    """Reads a public YAML.

    Returns:
        Its `G_kwargs`, and after how many images that stage of training ends (0 if it does not say).

    Raises:
        ValueError: if it is no such file.
    """
    config = read_yaml(path)
    generator = config.get("G_kwargs", config)
    if not isinstance(generator, Mapping) or "patch_from_layers" not in generator:
        raise ValueError(f"config: {path!r} is no public VFM-VAE configuration, which has G_kwargs")
    return dict(generator), 1000 * int(config.get("total_kimg", 0))


def vfm_source_of(config: Mapping[str, Any], name: str | None = None) -> dict[str, Any]:
    """The VFM of a public configuration, as `VFM.source` says it; its weights are not known.

    Args:
        config: The public YAML's `G_kwargs`.
        name: timm's name of the VFM, where the configuration's can't be told.

    Raises:
        ValueError: if there is no such VFM.
    """
    name = name or timm_name(config["vfm_name"])
    if name is None:
        raise ValueError(f"vfm: {config['vfm_name']!r} is no VFM that timm is known to have; give timm's name for it")
    arguments = {"name": name, "layers": list(config["patch_from_layers"]), "input_scale": config["scale_factor"]}
    arguments["antialias_positions"] = family_of(name).antialias_positions
    return FrozenVFM.arguments_of({"init_args": arguments}) | {"fingerprint": None}
