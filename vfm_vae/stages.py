"""Going from one stage of training to the next, with the same vision foundation model."""

from pathlib import Path
from typing import Any

import torch

from vfm_vae.vfm import FrozenVFM, check_vfm


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
