"""Converts images between 8 bits and [-1, 1], and resizes them."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vfm_vae.finite import check_finite

Interpolation = Literal["bilinear", "bicubic"]
Rounding = Literal["round", "truncate"]


def to_uint8(images: Tensor, rounding: Rounding = "round") -> Tensor:
    """Images as a file would hold them: clamped and rounded.

    Args:
        images: `[B, 3, H, W]`, nominally in [-1, 1].
        rounding: `round` to the nearest level, or `truncate`, which darkens by half a level.

    Returns:
        uint8 `[B, 3, H, W]` in 0..255.

    Raises:
        ValueError: if they hold nan, which would become black, or inf.
    """
    check_finite("images", images)
    levels = (images.detach().float().clamp(-1, 1) + 1) * 127.5
    return (levels.round() if rounding == "round" else levels).to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """Images `[B, 3, H, W]` in 0..255, uint8 or float ones between the levels, as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def quantised(images: Tensor, rounding: Rounding = "round") -> Tensor:
    """Images in [-1, 1] that went through 8 bits: what every metric looks at. A second time changes nothing.

    Args:
        images: `[B, 3, H, W]`, nominally in [-1, 1].
        rounding: As for `to_uint8`.

    Returns:
        float32 `[B, 3, H, W]` in [-1, 1].

    Raises:
        ValueError: as `to_uint8`.
    """
    return from_uint8(to_uint8(images, rounding))


def resize(images: Tensor, size: Sequence[int], interpolation: Interpolation, *, antialias: bool = True) -> Tensor:
    """Resizes maps `[B, C, H, W]` to `size` (rows, columns).

    Args:
        images: Floating-point maps; computed in float32 (CPUs antialias in no other precision), returned as given.
        size: Rows and columns wanted.
        interpolation: `bilinear` or `bicubic`.
        antialias: Low-pass filter what shrinks. What grows never needs it, and PyTorch's antialiased bicubic kernel
            is another one than the plain (a = -0.5 against -0.75), so that growing always takes the plain.
    """
    size = tuple(size)
    if size == tuple(images.shape[-2:]):
        return images
    shrinks = size[0] < images.shape[-2] or size[1] < images.shape[-1]
    resized = F.interpolate(images.float(), size=size, mode=interpolation, antialias=antialias and shrinks)
    return resized.to(images.dtype)
