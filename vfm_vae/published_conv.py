"""Original checkpoints of convolutional VAEs, with the names of the public code of latent diffusion and VA-VAE."""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vfm_vae.conv_vae import ConvVAE
from vfm_vae.published_files import from_published, pick, to_published
from vfm_vae.published_names import renamed
from vfm_vae.vfm import FrozenVFM
from vfm_vae.vit import family_of

PREFIXES = ("", "first_stage_model.")  # of the VAE alone, and of one in a whole latent diffusion model

# Parts of a file that are no part of the VAE: its discriminator and LPIPS, the VFM, and averages in another form.
OTHER_PARTS = ("loss.", "foundation_model.", "model_ema.")

# Ours → published, applied in this order; levels of the decoder are turned around before.
NAMES = [
    (r"^alignment\.", "linear_proj."),
    (r"\.(down|up)_blocks\.", r".\1."),
    (r"\.(down|up)samplers\.0\.", r".\1sample."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.resnets\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
]


def find_conv_vae(content: Any) -> dict[str, Tensor] | None:
    """The tensors of a convolutional VAE in a file, without prefixes and other parts; None if there are none.

    Averaged weights are taken where there are any. Of a whole latent diffusion model, the rest is left out.

    Args:
        content: What the file holds.
    """
    for prefix in PREFIXES:
        trained, averaged = pick(content, f"{prefix}encoder.down.0.block.0.")
        if (found := averaged or trained) is not None:
            tensors = {name.removeprefix(prefix): t for name, t in found.items() if name.startswith(prefix)}
            return {name: tensor for name, tensor in tensors.items() if not name.startswith(OTHER_PARTS)}
    return None


def conv_vae_from_published(tensors: Mapping[str, Tensor]) -> ConvVAE:
    """Builds the VAE whose architecture the names and shapes of published tensors tell, and fills it with them.

    Args:
        tensors: Under published names, as `find_conv_vae` has them.

    Returns:
        The VAE, in eval mode. It does not know which VFM it was aligned to, if it was.

    Raises:
        ValueError: if names are missing or left over, or tensors are of another shape.
    """
    with torch.device("meta"):
        model = ConvVAE(**_arguments(tensors))
    state = from_published(model.state_dict(), tensors, _names(model), {})
    model.load_state_dict(state, assign=True)
    return model.eval()


def conv_vae_to_published(model: ConvVAE) -> dict[str, Tensor]:
    """All tensors under their published names, for the public code to read."""
    return to_published(model.state_dict(), _names(model), {})


def aligned_to(name: str, model: ConvVAE) -> dict[str, Any]:
    """The VFM that a VAE was aligned to, as `VFM.source` says it; its weights are not known.

    Like VA-VAE's, it sees images at the size at which it has a token for each position of the latent.

    Args:
        name: timm's name of the VFM.
        model: The VAE.

    Raises:
        ValueError: if the VAE was not aligned to any, or the name does not tell the size of a patch.
    """
    patch = re.search(r"patch(\d+)", name)
    if model.alignment is None or patch is None:
        why = "does not tell its patch size" if patch is None else "is given, but these weights have no linear_proj"
        raise ValueError(f"vfm: {name!r} {why}; leave it out")
    scale = int(patch[1]) / model.compression
    known = {"name": name, "layers": [-1], "input_scale": scale}
    known["antialias_positions"] = family_of(name).antialias_positions
    return FrozenVFM.arguments_of({"init_args": known}) | {"fingerprint": None}


def _arguments(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Those of the ConvVAE; what is odd shows when its tensors are compared with these."""
    levels = 1 + max(int(number) for number in re.findall(r"encoder\.down\.(\d+)", "\n".join(tensors)))
    blocks = {name.split(".")[4] for name in tensors if name.startswith("encoder.down.0.block.")}
    first = [f"encoder.down.{level}.block.0.conv1.weight" for level in range(levels)]
    try:
        return {
            "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
            "channels": [len(tensors[name]) for name in first],
            "num_res_blocks": len(blocks),
            "attention": [level for level in range(levels) if f"encoder.down.{level}.attn.0.q.weight" in tensors],
            "middle_attention": "encoder.mid.attn_1.q.weight" in tensors,
            "quant_conv": "quant_conv.weight" in tensors,
            "alignment_channels": len(tensors["linear_proj.weight"]) if "linear_proj.weight" in tensors else None,
        }
    except KeyError as error:
        raise ValueError(f"the weights are no convolutional VAE's: there is no {error}") from error


def _names(model: ConvVAE) -> Any:
    return partial(_name, levels=len(model.arguments["channels"]))


def _name(ours: str, levels: int) -> tuple[str]:
    """The published name of a tensor; levels of the decoder are counted from the finest there."""
    turned = re.sub(r"\.up_blocks\.(\d+)", lambda match: f".up_blocks.{levels - 1 - int(match[1])}", ours)
    return (renamed(turned, NAMES),)
