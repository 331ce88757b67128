"""Transformations of images, to measure whether features keep their meaning (VFM-VAE, section 3)."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import InterpolationMode, resize

from vfm_vae.data.sampling import IndexedNoise

NOISES = (0.05, 0.10, 0.15, 0.20)
SCALES = (1.0, 0.75, 0.5, 0.25)
ROTATIONS = (0, 90, 180, 270)
PUBLISHED_SEED = 42


class Part(NamedTuple):
    """Images or latents of a batch after a transformation that may give them several sizes.

    Attributes:
        rows: Their positions in the batch, int64 `[b]`.
        maps: Images `[b, 3, h, w]`, uint8 or float32 in 0..255, or latents `[b, C, h, w]`.
    """

    rows: Tensor
    maps: Tensor


def add_noise(images: Tensor, sigma: float, index: Tensor, seed: int = 0) -> Tensor:
    """Adds Gaussian noise to images in [0, 1]; the result is clipped, then truncated to 8 bits.

    Args:
        images: uint8 `[B, 3, H, W]`.
        sigma: The noise's standard deviation.
        index: Each image's number, which its noise depends on, int64 `[B]`.
        seed: Seed of the noise.

    Returns:
        uint8 `[B, 3, H, W]`.
    """
    noise = IndexedNoise("noise", seed, index, images.device).normal(*images.shape[1:])
    return ((images / 255 + sigma * noise).clamp(0, 1) * 255).to(torch.uint8)


def scale(maps: Tensor, factor: float) -> Tensor:
    """Resizes images or latents `[B, C, H, W]` to `factor` of their sides, bilinear with antialias."""
    size = [round(side * factor) for side in maps.shape[-2:]]
    return maps if size == list(maps.shape[-2:]) else resize(maps, size, InterpolationMode.BILINEAR, antialias=True)


def rotate(maps: Tensor, degrees: int) -> Tensor:
    """Turns images or latents `[B, C, H, W]` counter-clockwise by a multiple of 90°."""
    return torch.rot90(maps, degrees // 90, (-2, -1))


def geometric_transformations() -> dict[str, Callable[[Tensor], Tensor]]:
    """Scales and rotations of images or latents `[B, C, H, W]` by name: `scale_0.25`, …, `rotation_270`."""
    scales = {f"scale_{factor:g}": partial(scale, factor=factor) for factor in SCALES}
    return {**scales, **{f"rotation_{angle}": partial(rotate, degrees=angle) for angle in ROTATIONS}}


def is_identity(name: str) -> bool:
    """Whether a transformation, by its name, leaves images as they are."""
    return name in ("scale_1", "rotation_0")


def draw_published(number: int) -> tuple[int, float]:
    """The rotation in degrees and the scale of one image by the published protocol.

    They are the first two choices of `numpy.random.RandomState(42 + number)`, in this order.

    Args:
        number: The image's number, see `published_numbers`; negative numbers, which mark padding, draw as 0 does.
    """
    generator = np.random.RandomState(PUBLISHED_SEED + max(number, 0))
    return int(generator.choice(ROTATIONS)), float(generator.choice(SCALES))


def published_numbers(names: Sequence[str]) -> Tensor:
    """Numbers of images in the published protocol: places of their files' stems among all stems, sorted.

    Args:
        names: Paths of the images that take part, such as `n01440764/ILSVRC2012_val_00000293.JPEG`; where stems are the
            same, the whole paths decide.

    Returns:
        int64 `[len(names)]`.
    """
    order = sorted(range(len(names)), key=lambda position: (PurePosixPath(names[position]).stem, names[position]))
    return torch.tensor(order, dtype=torch.int64).argsort()


def transformed(protocol: Literal["each", "published"], images: Tensor, index: Tensor) -> dict[str, list[Part]]:
    """What a protocol does with a batch.

    Args:
        protocol: `each` for the single transformations; `published` for noise of each strength, and `equivariance`:
            one rotation and one scale per image.
        images: uint8 `[B, 3, H, W]`.
        index: Each image's number, int64 `[B]`; with `published`, as `published_numbers` has them.

    Returns:
        By name (`names_of`), the batch in parts of one size each. Images are uint8, but the published protocol leaves
        scaled ones between the levels: those of `equivariance` are float32.
    """
    rows = torch.arange(len(images), device=images.device)
    parts = {f"noise_{sigma:.2f}": [Part(rows, add_noise(images, sigma, index))] for sigma in NOISES}
    return parts | geometric(protocol, images.float() if protocol == "published" else images, index)


def geometric(protocol: Literal["each", "published"], maps: Tensor, index: Tensor) -> dict[str, list[Part]]:
    """A protocol's scales and rotations alone, of images or of latents `[B, C, H, W]`; otherwise as `transformed`."""
    rows = torch.arange(len(maps), device=maps.device)
    if protocol == "each":
        return {name: [Part(rows, turn(maps))] for name, turn in geometric_transformations().items()}
    groups: dict[tuple[int, float], list[int]] = {}
    for row, number in enumerate(index.tolist()):
        groups.setdefault(draw_published(number), []).append(row)
    return {
        "equivariance": [
            Part(rows[chosen], scale(rotate(maps[chosen], angle), factor)) for (angle, factor), chosen in groups.items()
        ]
    }


def names_of(protocol: Literal["each", "published"], geometric_alone: bool = False) -> list[str]:
    """What a protocol's transformations are called, noise left out on demand."""
    noises = [] if geometric_alone else [f"noise_{sigma:.2f}" for sigma in NOISES]
    return noises + (list(geometric_transformations()) if protocol == "each" else ["equivariance"])
