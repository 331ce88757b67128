"""Published weights of diffusion models, brought to our names."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.models.lightningdit import LightningDiT

# Published → ours, applied in this order.
RENAMES = [
    (r"^x_embedder\.", "patch_embed."),
    (r"^t_embedder\.", "time_embed."),
    (r"^y_embedder\.embedding_table\.", "label_embed."),
    (r"^final_layer\.norm_final\.", "final.norm."),
    (r"^final_layer\.adaLN_modulation\.1\.", "final.modulation."),
    (r"^final_layer\.linear\.", "final.out."),
    (r"\.adaLN_modulation\.1\.", ".modulation."),
    (r"\.norm1\.", ".norm_attention."),
    (r"\.norm2\.", ".norm_mlp."),
    (r"\.attn\.q_norm\.", ".attention.query_norm."),
    (r"\.attn\.k_norm\.", ".attention.key_norm."),
    (r"\.attn\.proj\.", ".attention.out."),
    (r"\.attn\.", ".attention."),
    (r"\.mlp\.w12\.", ".mlp.gate_value."),
    (r"\.mlp\.w3\.", ".mlp.out."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.2."),
]

OPTIONS = {
    "depth": "depth",
    "hidden_size": "width",
    "num_heads": "num_heads",
    "input_size": "input_size",
    "in_channels": "in_channels",
    "patch_size": "patch_size",
    "num_classes": "num_classes",
    "use_qknorm": "qk_norm",
    "use_swiglu": "swiglu",
    "use_rope": "rotary",
    "use_rmsnorm": "rms_norm",
}

# What the public class takes where its configuration is silent.
DEFAULTS = {"qk_norm": False, "swiglu": False, "rotary": False, "rms_norm": False}

# Options that change the network in ways that no published VFM-VAE model uses.
REFUSED = ("wo_shift", "learn_sigma")


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
    model = _build(config)
    weights = {_rename(name): tensor for name, tensor in state_dict.items()}
    _check_tables(model, weights)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    missing, unexpected = sorted(shapes.keys() - weights.keys()), sorted(weights.keys() - shapes.keys())
    if missing or unexpected:
        raise ValueError(f"the weights do not fit the config: missing {missing}; left over {unexpected}")
    model.load_state_dict(weights)
    return model.eval()


def _build(config: Mapping[str, Any]) -> LightningDiT:
    unused = [name for name in REFUSED if config.get(name)]
    unknown = config.keys() - OPTIONS.keys() - set(REFUSED) - {"registry_name"}
    if unused or unknown:
        raise ValueError(f"config: {sorted({*unused, *unknown})} is not supported; known are {', '.join(OPTIONS)}")
    options = DEFAULTS | {OPTIONS[name]: value for name, value in config.items() if name in OPTIONS}
    if "registry_name" in config:
        if sizes := config.keys() & {"depth", "hidden_size", "num_heads", "patch_size"}:
            raise ValueError(f"config: registry_name says what {sorted(sizes)} are; leave one of them out")
        return LightningDiT.of_size(config["registry_name"].removeprefix("LightningDiT-"), **options)
    return LightningDiT(**options)


def _rename(name: str) -> str:
    for pattern, ours in RENAMES:
        name = re.sub(pattern, ours, name)
    return name


def _check_tables(model: LightningDiT, weights: dict[str, Tensor]) -> None:
    """Takes the fixed tables out of the weights, after a look whether they are ours."""
    expected = {"pos_embed": model.position[None]}
    if model.rotary_cos is not None:  # stored for every channel, so each angle twice
        expected["feat_rope.freqs_cos"] = model.rotary_cos.repeat_interleave(2, dim=1)
        expected["feat_rope.freqs_sin"] = model.rotary_sin.repeat_interleave(2, dim=1)
    for name, table in expected.items():
        stored = weights.pop(name, None)
        if stored is None or stored.is_meta:
            continue
        if stored.shape != table.shape or not torch.allclose(stored.float(), table, atol=1e-4):
            raise ValueError(f"{name}: the stored table is not the fixed one of input_size={model.input_size}")
