"""Published weights of diffusion models: converting their names to ours and back."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.models.denoiser import Denoiser
from ldm.models.layers import sincos_frequencies
from ldm.models.lightningdit import LightningDiT
from ldm.models.sit import SiT
from vfm_vae.published_files import from_published

# Our modules → published, for both directions. Parameters within them have the same names.
MODULES = {
    "patch_embed.proj": "x_embedder.proj",
    "time_embed.mlp.0": "t_embedder.mlp.0",
    "time_embed.mlp.2": "t_embedder.mlp.2",
    "label_embed": "y_embedder.embedding_table",
    "cls_embed": "cls_projectors2",
    "cls_norm": "wg_norm",
    "projector.0": "projectors.0.0",
    "projector.2": "projectors.0.2",
    "projector.4": "projectors.0.4",
    "final.norm": "final_layer.norm_final",
    "final.modulation": "final_layer.adaLN_modulation.1",
    "final.out": "final_layer.linear",
    "final.cls_out": "final_layer.linear_cls",
}
MODULES_OF_BLOCKS = {
    "norm_attention": "norm1",
    "attention.qkv": "attn.qkv",
    "attention.query_norm": "attn.q_norm",
    "attention.key_norm": "attn.k_norm",
    "attention.out": "attn.proj",
    "norm_mlp": "norm2",
    "mlp.gate_value": "mlp.w12",
    "mlp.out": "mlp.w3",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
    "modulation": "adaLN_modulation.1",
}


class Family(NamedTuple):
    """How a published class is configured.

    Attributes:
        model: Our class.
        prefix: What the names of its sizes begin with.
        options: Published arguments → ours.
        defaults: What the public class takes where its configuration is silent, by our names.
        fixed: Arguments that may have this one value alone; others change the network in ways that no published
            VFM-VAE model uses.
        ignored: Arguments that change no number.
    """

    model: type[LightningDiT]
    prefix: str
    options: dict[str, str]
    defaults: dict[str, Any]
    fixed: dict[str, Any]
    ignored: frozenset[str] = frozenset()


SHARED_OPTIONS = {
    "depth": "depth",
    "hidden_size": "width",
    "num_heads": "num_heads",
    "input_size": "input_size",
    "in_channels": "in_channels",
    "patch_size": "patch_size",
    "num_classes": "num_classes",
}
LIGHTNINGDIT_FAMILY = Family(
    LightningDiT,
    "LightningDiT-",
    SHARED_OPTIONS | {"use_qknorm": "qk_norm", "use_swiglu": "swiglu", "use_rope": "rotary", "use_rmsnorm": "rms_norm"},
    {"qk_norm": False, "swiglu": False, "rotary": False, "rms_norm": False},
    {"wo_shift": False, "learn_sigma": False},
)
REG_FAMILY = Family(
    SiT,
    "SiT-",
    SHARED_OPTIONS
    | {
        "qk_norm": "qk_norm",
        "cls_token_dim": "cls_channels",
        "z_dims": "align_channels",
        "encoder_depth": "align_depth",
        "projector_dim": "projector_width",
    },
    {"qk_norm": False},
    {"use_cfg": True, "learn_sigma": False, "path_type": "linear", "prediction": "v"},
    frozenset({"fused_attn"}),
)

# Arguments of REG's training and sampling → those of its class.
REG_TRAINING = {
    "model": "registry_name",
    "latent_size": "input_size",
    "vae_latent_dim": "in_channels",
    "projector_embed_dims": "z_dims",
}


def published_name(name: str) -> str:
    """Published name of one of our weights, as `state_dict` has it."""
    module, _, parameter = name.rpartition(".")
    if module.startswith("blocks."):
        _, number, part = module.split(".", 2)
        return f"blocks.{number}.{MODULES_OF_BLOCKS[part]}.{parameter}"
    return f"{MODULES[module]}.{parameter}"


def lightningdit_from_published(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> LightningDiT:
    """Builds the LightningDiT of a public configuration and fills it with public weights.

    Args:
        state_dict: Weights under their published names.
        config: Arguments of the public class by their names, such as `hidden_size` and `use_qknorm`; instead of
            depth, width, heads and patch size, `registry_name` may name a size, such as `LightningDiT-XL/1`.

    Returns:
        The model, in eval mode.

    Raises:
        ValueError: if the configuration has options that are not supported, names are missing or left over, or the
            fixed position and rotary tables are not the ones that this model makes itself.
    """
    return _fill(_build(LIGHTNINGDIT_FAMILY, config), state_dict)


def reg_from_published(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> LightningDiT:
    """Builds the SiT of a public configuration and fills it with public weights, for time as this project has it.

    The weights are REG's, or REPA's, which are without a class token.

    Args:
        state_dict: Weights under their published names.
        config: Arguments of the public class by their names, such as `hidden_size` and `z_dims`; instead of depth,
            width, heads and patch size, `registry_name` may name a size, such as `SiT-XL/1`.

    Returns:
        The model, in eval mode: its output at time t is minus the public one's at 1 − t.

    Raises:
        ValueError: as `lightningdit_from_published` does.
    """
    config = dict(config)
    if not any(name.startswith(("cls_projectors2.", "wg_norm.")) for name in state_dict):
        config.setdefault("cls_token_dim", 0)
    if "z_dims" in config:
        if not isinstance(config["z_dims"], Sequence) or len(config["z_dims"]) != 1:
            raise ValueError(f"config: z_dims is a list with the width of one VFM, given {config['z_dims']!r}")
        (config["z_dims"],) = config["z_dims"]
        config.setdefault("cls_token_dim", config["z_dims"])
    if config.pop("decoder_hidden_size", config.get("hidden_size")) != config.get("hidden_size"):
        raise ValueError("config: decoder_hidden_size other than hidden_size is not supported")
    return _fill(_build(REG_FAMILY, config), state_dict)


def denoiser_from_published(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> Denoiser:
    """SiT or LightningDiT from public weights, whichever they are of.

    Args:
        state_dict: Weights under their published names.
        config: The configuration, in any form that `read_config` takes.

    Returns:
        The model, in eval mode.

    Raises:
        ValueError: as `lightningdit_from_published` and `read_config` do.
    """
    is_reg = any(name.startswith(("projectors.", "cls_projectors2.", "wg_norm.")) for name in state_dict)
    return (reg_from_published if is_reg else lightningdit_from_published)(state_dict, read_config(config))


def to_published(model: Denoiser) -> dict[str, Tensor]:
    """Weights and fixed tables under their published names, for the public implementations.

    Args:
        model: LightningDiT or SiT.

    Returns:
        Tensors, which may share memory with the model's. The projector of a LightningDiT, which serves training alone,
        is left out: the public class has none.

    Raises:
        ValueError: for a model of another kind, or a LightningDiT with a class token.
    """
    if not isinstance(model, LightningDiT):
        raise ValueError(f"model: LightningDiT or SiT, given {type(model).__name__}")
    weights = model.state_dict()
    if isinstance(model, SiT):
        weights = _mirrored(weights)
    elif model.cls_channels:
        raise ValueError("model: the public LightningDiT has no class token, but this one has")
    else:
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("projector.")}
    return {published_name(name): tensor for name, tensor in weights.items()} | _tables(model)


def read_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a public class from any form in which configurations are published.

    Args:
        config: One of
            LightningDiT's training YAML, with sections `model`, `data` and `vae`;
            REG's training arguments, where `model` names a size, such as `SiT-XL/1`, and the latent is VFM-VAE's of
            32 × 16 × 16 unless they say otherwise;
            arguments of either class, which come back as they are.
            In the first two, options that say nothing of the network are passed over.

    Returns:
        Arguments, as `lightningdit_from_published` and `reg_from_published` take them.

    Raises:
        ValueError: if a needed section or option is missing, or what the network predicts is not a velocity.
    """
    if isinstance(config.get("model"), Mapping):
        return _read_lightningdit(config)
    if "model" in config:
        return _read_reg({name.replace("-", "_"): value for name, value in config.items()})
    return dict(config)


def _read_lightningdit(config: Mapping[str, Any]) -> dict[str, Any]:
    def read(section: str, option: str) -> Any:
        if option not in (config.get(section) or {}):
            raise ValueError(f"config: {section}.{option} is missing")
        return config[section][option]

    data: dict[str, Any] = {"latent_norm": True, "latent_multiplier": 1.0}  # because latents are normalized here
    transport: dict[str, Any] = {"path_type": "Linear", "prediction": "velocity"}
    for section, required in {"data": data, "transport": transport}.items():
        for option, supported in required.items():
            given = (config.get(section) or {}).get(option, supported)
            if given != supported:
                raise ValueError(f"config: {section}.{option} must be {supported}, given {given!r}")
    known = {*LIGHTNINGDIT_FAMILY.options, *LIGHTNINGDIT_FAMILY.fixed}
    return {name: value for name, value in config["model"].items() if name in known} | {
        "registry_name": read("model", "model_type"),
        "in_channels": read("model", "in_chans"),
        "num_classes": read("data", "num_classes"),
        "input_size": read("data", "image_size") // read("vae", "downsample_ratio"),
    }


def _read_reg(config: Mapping[str, Any]) -> dict[str, Any]:
    known = {*REG_FAMILY.options, *REG_FAMILY.fixed, *REG_TRAINING.values()}
    arguments = {REG_TRAINING.get(name, name): value for name, value in config.items()}
    arguments = {name: value for name, value in arguments.items() if name in known}
    if isinstance(widths := arguments.get("z_dims"), str | int):  # on the command line, numbers between commas
        arguments["z_dims"] = [int(width) for width in str(widths).split(",")]
    return arguments


def _build(family: Family, config: Mapping[str, Any]) -> LightningDiT:
    refused = {name for name, value in family.fixed.items() if config.get(name) not in (None, value)}
    unknown = config.keys() - family.options.keys() - family.fixed.keys() - family.ignored - {"registry_name"}
    if refused or unknown:
        raise ValueError(f"config: {sorted(refused | unknown)} is not supported; known are {', '.join(family.options)}")
    given = {ours: config[name] for name, ours in family.options.items() if name in config}
    options = family.defaults | given
    if "registry_name" in config:
        if sizes := config.keys() & {"depth", "hidden_size", "num_heads", "patch_size"}:
            raise ValueError(f"config: registry_name already sets {sorted(sizes)}; leave one of the two out")
        return family.model.of_size(config["registry_name"].removeprefix(family.prefix), **options)
    return family.model(**options)


def _fill(model: LightningDiT, state_dict: Mapping[str, Tensor]) -> LightningDiT:
    """Loads every published weight; returns the model in eval mode."""
    weights = from_published(model.state_dict(), state_dict, lambda name: (published_name(name),), _tables(model))
    model.load_state_dict(_mirrored(weights) if isinstance(model, SiT) else weights)
    return model.eval()


def _mirrored(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """SiT's weights, under our names, for time and velocity in the other direction. Its own inverse.

    Published weights take t = 1 as noise and predict noise − data; see `ldm.path` for what we do. Time enters as
    `W_c · cos(t·f) + W_s · sin(t·f)`. At 1 − t that is, by the formulas for angles' differences,
    `(W_c · cos f + W_s · sin f) · cos(t·f) + (W_c · sin f − W_s · cos f) · sin(t·f)`. The velocity changes its sign.
    """
    first = weights["time_embed.mlp.0.weight"]  # [D, 2 · frequencies]
    cos, sin = first.double().chunk(2, dim=1)
    frequencies = sincos_frequencies(cos.shape[1]).to(first.device)
    turned = torch.cat(
        [
            cos * frequencies.cos() + sin * frequencies.sin(),
            cos * frequencies.sin() - sin * frequencies.cos(),
        ],
        dim=1,
    )
    outputs = {f"final.{head}.{part}" for head in ("out", "cls_out") for part in ("weight", "bias")}
    return {
        **{name: -tensor if name in outputs else tensor for name, tensor in weights.items()},
        "time_embed.mlp.0.weight": turned.to(first.dtype),
    }


def _tables(model: LightningDiT) -> dict[str, Tensor]:
    """The fixed tables that public models store, and ours make themselves."""
    tables = {"pos_embed": model.position[None]}  # [1, N, D]
    if model.rotary_cos is not None:
        # Stored for every channel of a head, so each pair's angle twice: [N, d].
        tables["feat_rope.freqs_cos"] = model.rotary_cos.repeat_interleave(2, dim=1)
        tables["feat_rope.freqs_sin"] = model.rotary_sin.repeat_interleave(2, dim=1)
    return tables
