"""Going from one stage of training to the next, with the same vision foundation model."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vfm_vae.vfm import FrozenVFM

if TYPE_CHECKING:
    from vfm_vae.module import TokenizerModule


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
        raise ValueError(
            f"the checkpoint was trained on the VFM '{stored['name']}', but model.vfm is '{vfm.name}'"
        )
    if stored["fingerprint"] != vfm.fingerprint():
        raise ValueError(
            f"the checkpoint was trained on other weights of '{vfm.name}' (sha256 {stored['fingerprint'][:12]}…) than "
            f"those at hand ({vfm.fingerprint()[:12]}…); set model.vfm.weights to the file that it was trained on"
        )


def load_stage(module: "TokenizerModule", path: str) -> Mapping[str, Any] | None:
    """Starts a stage from the checkpoint of the former one: weights, discriminator and image counter.

    Args:
        module: The module of the new stage.
        path: Checkpoint of the former stage.

    Returns:
        The averaged weights, as the checkpoint holds them under `ema`, or None.

    Raises:
        ValueError: if there is no such file, or it holds another model.
    """
    if not Path(path).is_file():
        raise ValueError(f"init_from: there is no checkpoint '{path}'; train the former stage first")
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    check_vfm(module.model.vfm, checkpoint)
    try:
        module.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        raise ValueError(f"init_from: '{path}' holds another model: {error}") from error
    module.images_seen = checkpoint["images_seen"]
    return checkpoint.get("ema")
