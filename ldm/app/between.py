"""What the tab Between computes for two images: a path through the latent."""

from typing import Literal

import torch
from torch import Tensor

from vfm_vae.options import at_least, one_of
from vfm_vae.pretrained_tokenizer import PretrainedTokenizer

Interpolation = Literal["linear", "spherical"]


@torch.no_grad()
def images_between(
    tokenizer: PretrainedTokenizer, first: Tensor, second: Tensor, count: int, path: Interpolation = "linear"
) -> Tensor:
    """Images between two, decoded from latents between theirs (the posteriors' modes).

    Args:
        tokenizer: The tokenizer.
        first: `[1, 3, H, W]` in [-1, 1].
        second: The other image, alike.
        count: How many images, both ends included.
        path: `linear`, or `spherical`, see `spherical`.

    Returns:
        `[count, 3, H, W]` in [-1, 1].

    Raises:
        ValueError: if the tokenizer takes no images of this size, or there is no such path.
    """
    at_least(2, images=count)
    one_of("path", path, "linear", "spherical")
    tokenizer.check_image_size(first.shape[-1])
    a, b = (tokenizer.encode(image).mode() for image in (first, second))
    weights = torch.linspace(0, 1, count, device=a.device)
    weigh = torch.lerp if path == "linear" else spherical
    latents = torch.cat([weigh(a, b, weight) for weight in weights])
    images: Tensor = tokenizer.decode(latents).image.clamp(-1, 1)
    return images


def spherical(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Spherical interpolation of two tensors, each as one vector (Shoemake 1985): norms change evenly along the way.

    Where the two point the same way or the opposite one, it is linear.

    Args:
        a: The result at weight 0.
        b: The result at weight 1, alike.
        weight: A scalar in [0, 1].
    """
    norms = a.norm(), b.norm()
    cosine = (a * b).sum() / (norms[0] * norms[1]).clamp_min(1e-12)
    angle = torch.arccos(cosine.clamp(-1, 1))
    sine = torch.sin(angle)
    if sine < 1e-4:
        return torch.lerp(a, b, weight)
    direction = (torch.sin((1 - weight) * angle) * a / norms[0] + torch.sin(weight * angle) * b / norms[1]) / sine
    return torch.lerp(*norms, weight) * direction
