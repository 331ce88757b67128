"""Image files as tensors, and back."""

from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from vfm_vae.data.transforms import CentreCrop, to_rgb
from vfm_vae.metrics.reconstruction import from_uint8, to_uint8
from vfm_vae.writing import write_picture


def read_image(path: str | Path, size: int) -> Tensor:
    """Reads an image file.

    Args:
        path: Of anything that Pillow reads.
        size: Sides in pixels, to which it is brought by ADM's centre crop, as diffusion models are trained.

    Returns:
        float32 `[1, 3, size, size]` in [-1, 1].

    Raises:
        ValueError: if there is no such file, or it is no image.
    """
    try:
        with Image.open(path) as image:
            return from_uint8(CentreCrop(size)(to_rgb(image))[None])
    except (FileNotFoundError, IsADirectoryError, UnidentifiedImageError) as error:
        raise ValueError(f"path: there is no image at {str(path)!r} ({type(error).__name__})") from error


def write_image(path: str | Path, images: Tensor) -> None:
    """Writes images side by side into one file.

    Args:
        path: Its ending says in which format.
        images: `[B, 3, H, W]`, nominally in [-1, 1].
    """
    row = torch.cat(list(to_uint8(images)), dim=2)  # [3, H, B·W]
    write_picture(path, row.permute(1, 2, 0).cpu().numpy())
