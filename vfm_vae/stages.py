"""Going from one stage of training to the next, with the same vision foundation model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vfm_vae.vfm import FrozenVFM


def vfm_identity(vfm: FrozenVFM) -> dict[str, str]:
    """What a checkpoint says of the VFM instead of holding its weights."""
    return {"name": vfm.name, "fingerprint": vfm.fingerprint()}


def check_vfm(vfm: FrozenVFM, checkpoint: Mapping[str, Any]) -> None:
    """Compares the VFM at hand with the one that the checkpoint was trained with.

    Raises:
        ValueError: if it is another, by name or by weights.
    """
    stored = checkpoint.get("vfm")
    if stored is None:
        raise ValueError("the checkpoint names no VFM: it is no tokenizer's, or of another version")
    if stored["name"] != vfm.name:
        raise ValueError(f"the checkpoint was trained on the VFM '{stored['name']}', but model.vfm is '{vfm.name}'")
    if stored["fingerprint"] != vfm.fingerprint():
        raise ValueError(
            f"the checkpoint was trained on other weights of '{vfm.name}' (sha256 {stored['fingerprint'][:12]}…) than "
            f"those at hand ({vfm.fingerprint()[:12]}…); set model.vfm.weights to the file that it was trained on"
        )


def read_stage(path: str, vfm: FrozenVFM) -> dict[str, Any]:
    """Reads the checkpoint of a former stage.

    Args:
        path: The checkpoint.
        vfm: What it has to be trained with.

    Returns:
        The checkpoint: `state_dict`, `images_seen`, and `ema` where weights were averaged.

    Raises:
        ValueError: if there is no such file, or it belongs to another VFM.
    """
    if not Path(path).is_file():
        raise ValueError(f"init_from: there is no checkpoint '{path}'; train the former stage first")
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    check_vfm(vfm, checkpoint)
    return checkpoint
