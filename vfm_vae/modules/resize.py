"""Resizing of images and latents, alike on every device and in every precision."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from vfm_vae.vfm import Interpolation


def resize(images: Tensor, size: Sequence[int], interpolation: Interpolation, *, antialias: bool = True) -> Tensor:
    """Resizes maps `[B, C, H, W]` to `size` (rows, columns).

    Args:
        images: floating-point maps; computed in float32 (CPUs antialias in no other precision), returned as given.
        size: rows and columns wanted.
        interpolation: `bilinear` or `bicubic`.
        antialias: low-pass filter what shrinks. What grows never needs it, and PyTorch's antialiased bicubic kernel
            is another one than the plain (a = -0.5 against -0.75), so that growing always takes the plain.
    """
    size = tuple(size)
    if size == tuple(images.shape[-2:]):
        return images
    shrinks = size[0] < images.shape[-2] or size[1] < images.shape[-1]
    resized = F.interpolate(images.float(), size=size, mode=interpolation, antialias=antialias and shrinks)
    return resized.to(images.dtype)
