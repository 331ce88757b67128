"""From decoded images to uint8 tensors: the training crop and the evaluation crops."""

from functools import cache
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.functional import InterpolationMode, center_crop, resize

RESAMPLING = {"lanczos": Image.Resampling.LANCZOS, "bicubic": Image.Resampling.BICUBIC}


class Transform(Protocol):
    """Makes a square uint8 tensor of an image, with randomness from the generator alone."""

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> Tensor:
        """Returns uint8 `[3, image_size, image_size]`."""


class RandomCrop:
    """Training transform (VFM-VAE): a random square, resized with antialiasing, flipped half the time.

    Args:
        image_size: Side of the result in pixels.
        min_crop: Smallest side of the square, as a fraction of the image's short side; the largest is 1.
        resampling: Filter of the resize, `lanczos` or `bicubic`.
    """

    def __init__(
        self, image_size: int, min_crop: float = 0.5, resampling: Literal["lanczos", "bicubic"] = "lanczos"
    ) -> None:
        if not 0 < min_crop <= 1:
            raise ValueError(f"min_crop: a fraction of the short side in (0, 1], given {min_crop}")
        if resampling not in RESAMPLING:
            raise ValueError(f"resampling: {' or '.join(RESAMPLING)}, given {resampling!r}")
        self.image_size = image_size
        self.min_crop = min_crop
        self.resampling = resampling
        self._by_torch = _torch_resizes(resampling)

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> Tensor:
        """Returns uint8 `[3, image_size, image_size]`."""
        width, height = image.size
        side = max(1, round(min(width, height) * generator.uniform(self.min_crop, 1)))
        left = int(generator.integers(width - side, endpoint=True))
        top = int(generator.integers(height - side, endpoint=True))
        resized = self._resize(image.crop((left, top, left + side, top + side)))
        return resized.flip(2) if generator.random() < 0.5 else resized

    def _resize(self, image: Image.Image) -> Tensor:
        size = (self.image_size, self.image_size)
        if not self._by_torch:
            return to_tensor(image.resize(size, RESAMPLING[self.resampling]))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # [3, side, side], channels last in memory
        return interpolate(pixels[None], size, mode=self.resampling, antialias=True)[0].contiguous()


@cache
def _torch_resizes(resampling: str) -> bool:
    """Whether this torch has the filter; it takes a quarter of Pillow's time, and their pixels differ by 2 at most."""
    try:
        interpolate(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), (2, 2), mode=resampling, antialias=True)
    except (NotImplementedError, ValueError):  # older ones have no Lanczos
        return False
    return True


class CentreCrop:
    """Evaluation transform of ADM (Dhariwal and Nichol, arXiv 2105.05233): the largest centred square, resized.

    The image is halved by box filter while its short side is at least twice the target, then resized bicubically.

    Args:
        image_size: Side of the result in pixels.
        flip: Mirror half of the images, which alone is random here.
    """

    def __init__(self, image_size: int, flip: bool = False) -> None:
        self.image_size = image_size
        self.flip = flip

    def __call__(self, image: Image.Image, generator: np.random.Generator | None = None) -> Tensor:
        """Returns uint8 `[3, image_size, image_size]`."""
        while min(image.size) >= 2 * self.image_size:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = self.image_size / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - self.image_size) // 2, (image.height - self.image_size) // 2
        image = image.crop((left, top, left + self.image_size, top + self.image_size))
        if self.flip and generator is not None and generator.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return to_tensor(image)


class ResizeAndCrop:
    """Evaluation transform of much public code: the short side resized bilinearly with antialias, then the centre.

    Args:
        image_size: Side of the result in pixels.
    """

    def __init__(self, image_size: int) -> None:
        self.image_size = image_size

    def __call__(self, image: Image.Image, generator: np.random.Generator | None = None) -> Tensor:
        """Returns uint8 `[3, image_size, image_size]`."""
        image = resize(image, self.image_size, InterpolationMode.BILINEAR)
        return to_tensor(center_crop(image, self.image_size))


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image → uint8 `[3, H, W]`."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
