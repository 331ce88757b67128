"""Reads image files as tensors, and writes tensors as image files."""

from pathlib import Path

import torch
from torch import Tensor

from vfm_vae.data.decoding import decode
from vfm_vae.data.transforms import CentreCrop
from vfm_vae.images import from_uint8, to_uint8
from vfm_vae.writing import write_picture


def read_image(path: str | Path, size: int) -> Tensor:
    """Reads an image file, turned as its EXIF orientation says, on white where it is transparent.

    Args:
        path: A file in any format that Pillow reads.
        size: Sides in pixels, to which it is brought by ADM's centre crop, as diffusion models are trained.

    Returns:
        float32 `[1, 3, size, size]` in [-1, 1].

    Raises:
        ValueError: if there is no such file, or it is damaged, no image, or one of too many pixels.
    """
    try:
        image = decode(path)
    except ValueError as error:
        raise ValueError(f"path: there is no image that can be read at {str(path)!r} ({error})") from error
    return from_uint8(CentreCrop(size)(image)[None])


def write_image(path: str | Path, images: Tensor) -> None:
    """Writes images side by side into one file.

    Args:
        path: Its ending says in which format.
        images: `[B, 3, H, W]`, nominally in [-1, 1].
    """
    row = torch.cat(list(to_uint8(images)), dim=2)  # [3, H, B·W]
    write_picture(path, row.permute(1, 2, 0).cpu().numpy())
