"""Differentiable augmentation of a discriminator's images (Zhao et al., 2020, arXiv 2006.10738)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfm_vae.options import at_least, within


class DifferentiableAugmentation(nn.Module):
    """Brightness, saturation, contrast, translation and cutout, in this order, drawn anew for every sample.

    Images are in [-1, 1], so that areas filled with zeros are grey. Random numbers come from the global generator of
    the images' device. A strength of 0 leaves its part out.

    Args:
        brightness: Adds `U(-brightness, brightness)` to all pixels.
        saturation: Multiplies differences from the mean over channels by `U(1 - saturation, 1 + saturation)`.
        contrast: Multiplies differences from the image's mean by `U(1 - contrast, 1 + contrast)`.
        translation: Largest shift along each axis as a fraction of the image, in whole pixels; zeros move in.
        cutout: Side of a square that is set to zero, as a fraction of the image; its centre lies anywhere in the image.

    Raises:
        ValueError: if a strength is negative, or a fraction is above 1.
    """

    def __init__(
        self,
        brightness: float = 0.5,
        saturation: float = 1.0,
        contrast: float = 0.5,
        translation: float = 0.125,
        cutout: float = 0.2,
    ) -> None:
        super().__init__()
        at_least(0, brightness=brightness, saturation=saturation, contrast=contrast)
        within(0, 1, translation=translation, cutout=cutout)
        self.brightness = brightness
        self.saturation = saturation
        self.contrast = contrast
        self.translation = translation
        self.cutout = cutout

    def forward(self, images: Tensor) -> Tensor:
        """Augments `images: [B, C, H, W]` in [-1, 1]; the result may leave that range."""
        if self.brightness:
            images = images + _uniform(images, self.brightness)
        if self.saturation:
            mean = images.mean(1, keepdim=True)  # [B, 1, H, W]
            images = mean + (images - mean) * (1 + _uniform(images, self.saturation))
        if self.contrast:
            mean = images.mean((1, 2, 3), keepdim=True)  # [B, 1, 1, 1]
            images = mean + (images - mean) * (1 + _uniform(images, self.contrast))
        if self.translation:
            images = _translate(images, self.translation)
        if self.cutout:
            images = _cut_out(images, self.cutout)
        return images


def _uniform(images: Tensor, strength: float) -> Tensor:
    """One number per sample from `U(-strength, strength)`, `[B, 1, 1, 1]`."""
    return (2 * torch.rand(len(images), 1, 1, 1, device=images.device, dtype=images.dtype) - 1) * strength


def _translate(images: Tensor, ratio: float) -> Tensor:
    num, _, height, width = images.shape
    shifts = []
    for side in (width, height):
        largest = int(side * ratio + 0.5)
        pixels = torch.randint(-largest, largest + 1, (num,), device=images.device)
        shifts.append(2 * pixels.to(images.dtype) / side)  # PyTorch's grids span [-1, 1]
    theta = torch.eye(2, device=images.device, dtype=images.dtype).expand(num, 2, 2)
    theta = torch.cat([theta, torch.stack(shifts, 1).unsqueeze(2)], 2)  # [B, 2, 3]
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    # Whole pixels: the nearest neighbour is exact.
    return F.grid_sample(images, grid, mode="nearest", padding_mode="zeros", align_corners=False)


def _cut_out(images: Tensor, ratio: float) -> Tensor:
    inside = []
    for side in images.shape[-2:]:
        length = int(side * ratio + 0.5)
        # A square of even length is centred between pixels, where there is one more place.
        first = torch.randint(0, side + 1 - length % 2, (len(images), 1), device=images.device) - length // 2
        position = torch.arange(side, device=images.device)  # [side]
        inside.append((position >= first) & (position < first + length))  # [B, side]
    rows, columns = inside
    return images.masked_fill((rows[:, :, None] & columns[:, None, :]).unsqueeze(1), 0.0)
