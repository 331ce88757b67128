"""How well the judge orders images: degradations from mild to strong, missing photographs, and reconstructions.

    python tests/bench/judge.py --tokenizers runs/demo/weak/checkpoints/last.ckpt runs/demo/strong/checkpoints/last.ckpt

Prints tables in Markdown, of the judge and of the embedded ViT: the Fréchet distance and the mean distance of pooled
features between held-out crops and what became of them. Tokenizers are given from good to bad.
"""

import argparse
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import gaussian_blur, jpeg

from vfm_vae.contracts import VFM
from vfm_vae.embedded import photos
from vfm_vae.embedded.judge import Judge
from vfm_vae.images import from_uint8, to_uint8
from vfm_vae.metrics.distribution import frechet_distance
from vfm_vae.metrics.semantic import add_noise
from vfm_vae.tokenizer import FrozenTokenizer
from vfm_vae.vfm import FrozenVFM


def blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of so many pixels."""
    return gaussian_blur(images, 2 * math.ceil(3 * sigma) + 1, sigma)


def noise(images: Tensor, sigma: float) -> Tensor:
    """Gaussian noise of this standard deviation, the range of the image being 1."""
    return add_noise(images, sigma, torch.arange(len(images)))


def compress(images: Tensor, quality: float) -> Tensor:
    """JPEG of this quality."""
    return torch.stack([jpeg(image, int(quality)) for image in images])


def downsample(images: Tensor, factor: float) -> Tensor:
    """Smaller by this factor and back again, bicubic."""
    small = F.interpolate(from_uint8(images), scale_factor=1 / factor, mode="bicubic", antialias=True)
    return to_uint8(F.interpolate(small, size=images.shape[-2:], mode="bicubic"))


def shift_colour(images: Tensor, shift: float) -> Tensor:
    """More red and less blue, by this part of the range."""
    return (images + 255 * shift * torch.tensor([1.0, 0.0, -1.0])[:, None, None]).round().clamp(0, 255).to(torch.uint8)


def shuffle(images: Tensor, rows: float) -> Tensor:
    """Cuts images into so many rows and columns of patches and puts them in another order."""
    side = images.shape[-1] // int(rows)
    patches = F.unfold(images.float(), side, stride=side)  # [B, 3 side², rows²]
    order = torch.randperm(patches.shape[-1], generator=torch.Generator().manual_seed(0))
    return F.fold(patches[..., order], images.shape[-2:], side, stride=side).to(torch.uint8)


DEGRADATIONS: dict[str, tuple[Callable[[Tensor, float], Tensor], tuple[float, ...]]] = {
    "blur": (blur, (0.5, 1, 2, 4)),
    "noise": (noise, (0.05, 0.1, 0.2, 0.4)),
    "JPEG": (compress, (75, 30, 10, 5)),
    "downsampling": (downsample, (1.5, 2, 4, 8)),
    "colour shift": (shift_colour, (0.05, 0.1, 0.2, 0.4)),
    "patch shuffling": (shuffle, (2, 4, 8, 16)),
}
"""Functions of uint8 images `[B, 3, H, W]` and a strength, and four strengths from mild to strong."""

MISSING = (1, 3, 6, 9)


class Distances(NamedTuple):
    """Between the pooled features of two sets of images.

    Attributes:
        frechet: Between the sets.
        mean: Between an image and its counterpart, over the mean distance of two images of the first set.
    """

    frechet: float
    mean: float


def held_out_crops(per_tile: int, seed: int = 0) -> Tensor:
    """So many crops of each held-out tile of each photograph, uint8 `[65 · per_tile, 3, 64, 64]`."""
    generator = np.random.default_rng(seed)
    crops = []
    for name in photos.PHOTOS:
        photo = photos.load_photo(name)
        for tile in range(len(photos.HELD_OUT)):
            for _ in range(per_tile):
                box = photos.sample_box(generator, *photo.size, "val", tile)
                crops.append(np.asarray(photos.crop(photo, box, 64)))
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()


def drop_photographs(images: Tensor, number: int) -> Tensor:
    """Puts crops of other photographs in the place of those of the first ones; `images` are sorted by photograph."""
    first = number * len(images) // len(photos.PHOTOS)
    return images[first + torch.arange(len(images)) % (len(images) - first)]


def features_of(vfm: VFM, images: Tensor) -> Tensor:
    """Pooled features `[B, C]` of uint8 images."""
    return torch.cat([vfm(from_uint8(part)).pooled for part in images.split(128)])


def distances(real: Tensor, others: Tensor) -> Distances:
    """Between pooled features `[B, C]`."""
    gaussians = [(features.double().mean(0), features.double().T.cov()) for features in (real, others)]
    frechet = frechet_distance(*gaussians[0], *gaussians[1])
    apart = torch.cdist(real, real).sum() / (len(real) * (len(real) - 1))
    return Distances(float(frechet), float((real - others).norm(dim=1).mean() / apart))


def degraded(vfm: VFM, images: Tensor) -> dict[str, list[Distances]]:
    """Distances of every degradation from the images as they are, from mild to strong."""
    real = features_of(vfm, images)
    return {
        name: [distances(real, features_of(vfm, degrade(images, strength))) for strength in strengths]
        for name, (degrade, strengths) in DEGRADATIONS.items()
    }


def reconstructed(tokenizer: str, images: Tensor) -> Tensor:
    """What a tokenizer makes of uint8 images."""
    frozen = FrozenTokenizer(tokenizer)
    return torch.cat([to_uint8(frozen.decode(frozen.encode(from_uint8(x)).mode())) for x in images.split(32)])


def report(vfms: list[VFM], tokenizers: list[str]) -> None:
    """Prints what the networks say."""
    images, others = held_out_crops(4), held_out_crops(4, seed=1)
    sets = {"other crops of the same tiles": others}
    sets |= {f"other crops, {number} of 13 photographs missing": drop_photographs(others, number) for number in MISSING}
    sets |= {f"reconstructions of {name}": reconstructed(name, images) for name in tokenizers}
    sets["noise alone"] = torch.randint(256, images.shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    columns: list[list[float]] = []
    for vfm in vfms:
        real, rows = features_of(vfm, images), degraded(vfm, images)
        rows |= {name: [distances(real, features_of(vfm, changed))] for name, changed in sets.items()}
        print(f"\n| {vfm.name} | Fréchet distance | mean distance |\n|---|---|---|")
        for name, row in rows.items():
            strengths = ", ".join(map(str, DEGRADATIONS[name][1])) if name in DEGRADATIONS else ""
            frechet, mean = " · ".join(f"{d.frechet:.3g}" for d in row), " · ".join(f"{d.mean:.2f}" for d in row)
            mean = "" if name.startswith("other crops") else mean  # those are nobody's counterparts
            print(f"| {name} {strengths} | {frechet} | {mean} |")
        columns.append([d.frechet for row in rows.values() for d in row])
    print(f"\nrank correlation of {len(columns[0])} Fréchet distances: {spearmanr(*columns).statistic:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure how well the judge orders images.")
    parser.add_argument("--weights", help="the judge's safetensors file (the one of the package)")
    parser.add_argument("--tokenizers", nargs="*", default=[], help="checkpoints or folders, from good to bad")
    arguments = parser.parse_args()
    report([Judge(arguments.weights), FrozenVFM("vit_photos_patch8_64")], arguments.tokenizers)
