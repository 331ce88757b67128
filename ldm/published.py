"""Published weights of diffusion models: converting their names to ours and back."""

from collections.abc import Callable, Mapping, Sequence
from math import pi
from typing import Any

import torch
from torch import Tensor

from ldm.models.denoiser import Denoiser
from ldm.models.ditdh import DiTDH
from ldm.models.layers import sincos_frequencies
from ldm.models.lightningdit import LightningDiT
from ldm.models.projectors import Projector
from ldm.models.sit import SiT
from ldm.published_configs import (
    DITDH_FAMILY,
    LIGHTNINGDIT_FAMILY,
    REG_FAMILY,
    Model,
    build,
    of_both_towers,
    read_config,
)
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
    "body_embed.patches.proj": "s_embedder.proj",
    "head_embed.patches.proj": "x_embedder.proj",
    "to_head": "s_projector",
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


def published_name(name: str) -> str:
    """Published name of one of our weights, as `state_dict` has it."""
    if name == "time_embed.frequencies":
        return "t_embedder.W"
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
    return _fill(build(LIGHTNINGDIT_FAMILY, config), state_dict)


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
    return _fill(build(REG_FAMILY, config), state_dict)


def ditdh_from_published(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> DiTDH:
    """Builds the DiTDH of a public configuration and fills it with public weights, for time as this project has it.

    Args:
        state_dict: Weights under their published names.
        config: Arguments of the public class by their names. `depth`, `hidden_size` and `num_heads` are pairs, of the
            body and of the wide head.

    Returns:
        The model, in eval mode: its output at time t is minus the public one's at 1 − t.

    Raises:
        ValueError: as `lightningdit_from_published` does.
    """
    return _fill(build(DITDH_FAMILY, of_both_towers(config)), state_dict)


def denoiser_from_published(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> Denoiser:
    """SiT, LightningDiT or DiTDH from public weights, whichever they are of.

    Args:
        state_dict: Weights under their published names.
        config: The configuration, in any form that `read_config` takes.

    Returns:
        The model, in eval mode.

    Raises:
        ValueError: as `lightningdit_from_published` and `read_config` do.
    """
    importer: Callable[[Mapping[str, Tensor], Mapping[str, Any]], Denoiser] = lightningdit_from_published
    if any(name.startswith("s_embedder.") for name in state_dict):
        importer = ditdh_from_published
    elif any(name.startswith(("projectors.", "cls_projectors2.", "wg_norm.")) for name in state_dict):
        importer = reg_from_published
    return importer(state_dict, read_config(config))


def to_published(model: Denoiser) -> dict[str, Tensor]:
    """Weights and fixed tables under their published names, for the public implementations.

    Args:
        model: LightningDiT, SiT or DiTDH.

    Returns:
        Tensors, which may share memory with the model's. Left out is what the public classes lack: an internal head;
        and the projector, which serves training alone, but for the one that SiT has in public, too.

    Raises:
        ValueError: for a model of another kind, one that predicts data, or one with a class token that is no SiT.
    """
    if not isinstance(model, LightningDiT | DiTDH):
        raise ValueError(f"model: LightningDiT, SiT or DiTDH, given {type(model).__name__}")
    kind = type(model).__name__
    if model.predicts != "velocity":
        raise ValueError(f"model.predicts: the public {kind} predicts the velocity, but this one {model.predicts}")
    if model.cls_channels and not isinstance(model, SiT):
        raise ValueError(f"model: the public {kind} has no class token, but this one has")
    has_projector = isinstance(model, SiT) and isinstance(model.projector, Projector)
    lacks = ("base_final.",) if has_projector else ("base_final.", "projector.")
    weights = _mirrored(model, model.state_dict())
    named = {published_name(name): tensor for name, tensor in weights.items() if not name.startswith(lacks)}
    return named | _tables(model)


def _fill(model: Model, state_dict: Mapping[str, Tensor]) -> Model:
    """Loads every published weight; returns the model in eval mode."""
    weights = from_published(model.state_dict(), state_dict, lambda name: (published_name(name),), _tables(model))
    model.load_state_dict(_mirrored(model, weights))
    return model.eval()


def _mirrored(model: LightningDiT | DiTDH, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of SiT or DiTDH, under our names, for time and velocity in the other direction. Its own inverse.

    Published weights of these take t = 1 as noise and predict noise − data; see `ldm.path` for what we do. Those of
    LightningDiT come back as they are.

    Time enters as `W_c · cos(t·f) + W_s · sin(t·f)`. At 1 − t that is, by the formulas for angles' differences,
    `(W_c · cos f + W_s · sin f) · cos(t·f) + (W_c · sin f − W_s · cos f) · sin(t·f)`. The velocity changes its sign.
    """
    if not isinstance(model, SiT | DiTDH):
        return dict(weights)
    first = weights["time_embed.mlp.0.weight"]  # [D, 2 · frequencies]
    halves = first.double().chunk(2, dim=1)
    if isinstance(model, DiTDH):
        (sin, cos), frequencies = halves, 2 * pi * weights["time_embed.frequencies"].double()
    else:
        (cos, sin), frequencies = halves, sincos_frequencies(halves[0].shape[1]).to(first.device)
    turned_cos = cos * frequencies.cos() + sin * frequencies.sin()
    turned_sin = cos * frequencies.sin() - sin * frequencies.cos()
    turned = (turned_sin, turned_cos) if isinstance(model, DiTDH) else (turned_cos, turned_sin)
    outputs = {f"final.{head}.{part}" for head in ("out", "cls_out") for part in ("weight", "bias")}
    return {
        **{name: -tensor if name in outputs else tensor for name, tensor in weights.items()},
        "time_embed.mlp.0.weight": torch.cat(turned, dim=1).to(first.dtype),
    }


def _tables(model: LightningDiT | DiTDH) -> dict[str, Tensor]:
    """The fixed tables that public models store, and ours make themselves."""
    tables = {"pos_embed": model.position[None]}  # [1, N, D]
    if isinstance(model, DiTDH):
        rotary = {"enc_feat_rope": (model.body_cos, model.body_sin), "dec_feat_rope": (model.head_cos, model.head_sin)}
    else:
        rotary = {} if model.rotary_cos is None else {"feat_rope": (model.rotary_cos, model.rotary_sin)}
    for name, (cos, sin) in rotary.items():
        # Stored for every channel of a head, so each pair's angle twice: [N, d].
        tables[f"{name}.freqs_cos"] = cos.repeat_interleave(2, dim=1)
        tables[f"{name}.freqs_sin"] = sin.repeat_interleave(2, dim=1)
    return tables
