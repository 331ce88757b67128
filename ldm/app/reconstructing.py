"""What the tab Reconstruct computes."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.app import pictures
from vfm_vae.metrics.reconstruction import ReconstructionMetrics
from vfm_vae.pretrained_tokenizer import PretrainedTokenizer


class Reconstruction(NamedTuple):
    """What a tokenizer makes of an image.

    Attributes:
        image: The reconstruction, `[3, H, W]`, nominally in [-1, 1].
        multiscale: The decoder's smaller images, large to small, `[3, h_i, w_i]`; none where it makes none.
        latent: The posterior's mode, `[C, h, w]`.
        psnr: Peak signal-to-noise ratio in dB, as evaluation measures it.
        ssim: Structural similarity, likewise.
    """

    image: Tensor
    multiscale: tuple[Tensor, ...]
    latent: Tensor
    psnr: float
    ssim: float


@torch.no_grad()
def reconstruct(tokenizer: PretrainedTokenizer, image: Tensor) -> Reconstruction:
    """Encodes and decodes an image `[1, 3, H, W]` in [-1, 1] by the posterior's mode.

    Raises:
        ValueError: if the tokenizer takes no images of this size.
    """
    tokenizer.check_image_size(image.shape[-1])
    z = tokenizer.encode(image).mode()
    decoded = tokenizer.decode(z)
    metrics = ReconstructionMetrics().to(image.device)
    metrics.update(decoded.image, image)
    scores = {name: float(value) for name, value in metrics.compute().items()}
    smaller = tuple(part[0] for part in reversed(decoded.multiscale))
    return Reconstruction(decoded.image[0], smaller, z[0], scores["psnr"], scores["ssim"])


def show(image: Tensor, title: str, made: Mapping[str, Reconstruction | str]) -> str:
    """An image beside what tokenizers make of it, as HTML: a row for each.

    Args:
        image: The image, `[1, 3, H, W]` in [-1, 1].
        title: What it is called.
        made: What each tokenizer makes of it by their names, or why it makes nothing.
    """
    found = {name: each for name, each in made.items() if isinstance(each, Reconstruction)}
    errors = {name: pictures.error_map(each.image, image[0]) for name, each in found.items()}
    top = pictures.brightest(list(errors.values())) if errors else 0
    side = f"{image.shape[-1]} x {image.shape[-2]}"
    rows = [pictures.line(f"{name}: {each}", "error") for name, each in made.items() if isinstance(each, str)]
    for name, each in found.items():
        channels, height, width = each.latent.shape
        figures = [
            pictures.figure(pictures.pixels(image[0]), "Input", f"{title}, {side}"),
            pictures.figure(
                pictures.pixels(each.image), "Reconstruction", f"PSNR {each.psnr:.2f} dB, SSIM {each.ssim:.3f}"
            ),
            pictures.figure(pictures.coloured(errors[name], top), "Error", f"black 0, yellow {top} of 255 levels"),
            pictures.figure(
                pictures.principal(each.latent), "Latent", f"PCA of {channels} channels, {width} x {height}"
            ),
        ]
        smaller = [
            pictures.figure(pictures.pixels(small), "", f"{small.shape[-1]} x {small.shape[-2]}")
            for small in each.multiscale
            if small.shape[-1] < each.image.shape[-1]
        ]
        numbers = f"PSNR {each.psnr:.2f} dB · SSIM {each.ssim:.3f} · latent {channels} x {height} x {width}"
        rows.append(pictures.row(figures, name, numbers, "vv-four"))
        if smaller:
            rows.append(pictures.row(smaller, "The decoder's smaller images", "", "vv-strip"))
    return "".join(rows)
